"Copies of an SAE during training, and what is read from them."

import numpy as np
import pandas as pd
import pytest
import torch

from atm_sae.data.planted import PlantedWorld, WorldConfig
from atm_sae.evals.case_study import (
    PARTS,
    group_children,
    middle_pair,
    read_children,
    read_mask,
    record_training,
)
from atm_sae.evals.metrics import planted_metrics
from atm_sae.evals.stability import same_weights
from atm_sae.train.runs import get_run, grid, recipe

SMALL = WorldConfig(d_in=6, n_parents=1, children_per_parent=2, n_free=0)


def spec(method):
    return recipe(method, SMALL, 6, 8, l0=2, steps=6, batch_size=16)


def test_recording_does_not_change_the_training(tmp_path, monkeypatch):
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path))
    last = record_training(spec("atm"), every=4)[-1]
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(last.sae(x), get_run(spec("atm")).sae(x), atol=1e-5)


def test_a_run_without_a_mask_has_no_importance():
    snapshots = record_training(spec("standard"), every=3)
    assert [s.step for s in snapshots] == [3, 6]
    assert all(s.importance is None and np.isnan(s.threshold) for s in snapshots)


def test_absorption_of_children_agrees_with_the_metrics():
    world, snapshots = PlantedWorld(SMALL), record_training(spec("atm"), every=6)
    x, a = world.sample(500, torch.Generator().manual_seed(1))
    table = read_children(snapshots, world, x, a)
    assert table.step.tolist() == [6, 6]
    sae = snapshots[0].sae
    silent = sae.encode(x)[:, table.parent_latent[0]] <= 1e-8
    with_first = (a[:, 1] > 0).numpy()
    assert np.isclose(table.absorption[0], silent.numpy()[with_first].mean())
    loud = read_children(snapshots, world, torch.cat([x, 1e4 * x[:9]]), torch.cat([a, a[:9]]))
    assert loud.equals(table)  # outliers are left out
    excess = planted_metrics(sae, world, n=100)["excess_cosine"]
    assert np.isclose(table.excess_cosine.mean(), excess, atol=1e-5)


def test_every_latent_has_one_kind():
    world, snapshots = PlantedWorld(SMALL), record_training(spec("atm"), every=3)
    mask = read_mask(snapshots, world)
    assert len(mask) == 2 * 8 and mask.rate[mask.kind == "unmatched"].isna().all()
    assert mask.rate[mask.kind == "parents"].eq(float(world.rates[0])).all()


@pytest.fixture
def readings():
    children = pd.DataFrame(
        dict(child=[1, 2, 3], standard=[0.9, 0.5, 0.4], atm=[0.1, 0.4, 0.2], p=[0.5, 0.5, 0.5])
    )
    frames = [
        children.assign(
            method=m,
            seed=0,
            step=5,
            absorption=children[m],
            probability_child=children.p if m == "atm" else np.nan,
            parent_latent=0,
            child_latent=children.child,
            child_cosine=0.9,
            parent_cosine=0.9,
        )
        for m in ("standard", "atm")
    ]
    return pd.concat(frames, ignore_index=True)


def test_the_middle_pair(readings):
    # falls of 0.8, 0.1 and 0.2: the middle one is child 3
    assert middle_pair(group_children(readings, last=5)) == (3, 3)


def test_other_latents_and_spared_children_are_no_candidates(readings):
    readings.loc[(readings.method == "atm") & (readings.child == 3), "child_latent"] = 7
    readings.loc[readings.child == 2, "probability_child"] = 0.05
    grouped = group_children(readings, last=5)
    assert grouped[grouped.child == 3].same.tolist() == [False, False]
    assert grouped[grouped.child == 2].group.unique().tolist() == ["spared"]
    assert middle_pair(grouped) == (1, 1)


def test_without_a_candidate_all_children_are(readings):
    readings["child_cosine"] = 0.1
    assert middle_pair(group_children(readings, last=5)) == (3, 3)


def test_the_pair_beside_a_twin_of_another_name(readings):
    named = readings.replace({"method": {"standard": "standard+off"}})
    assert middle_pair(group_children(named, last=5), "standard+off") == (3, 3)


def test_the_parts_give_the_importance():
    world, snapshots = PlantedWorld(SMALL), record_training(spec("atm"), every=3)
    mask = read_mask(snapshots, world)
    assert np.allclose(mask[[*PARTS]].prod(axis=1) ** (1 / 3), mask.importance, rtol=1e-4)
    assert np.allclose(mask.groupby("step").frequency.mean(), 1)
    assert not record_training(spec("standard"), every=6)[0].parts


def test_the_twin_with_the_mask_off_is_the_base_with_the_settings_of_atm():
    tuned = {"atm": {"lr_scale": 2.0, "c": 0.8}}
    size = dict(d_sae=8, steps=6, batch_size=16)
    (twin,) = grid(["standard+off"], SMALL, [2], [0], tuned=tuned, **size)
    (base,) = grid(["standard"], SMALL, [2], [0], tuned={"standard": {"lr_scale": 2.0}}, **size)
    assert same_weights(*(record_training(s, every=6)[-1].sae for s in (twin, base)))
