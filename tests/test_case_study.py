"Copies of an SAE during training, and what is read from them."

import numpy as np
import pandas as pd
import pytest
import torch

from atm_sae.data.activations import ActivationSpec
from atm_sae.data.planted import PlantedWorld, WorldConfig
from atm_sae.evals.absorption import AbsorptionResult, evaluate_absorption
from atm_sae.evals.case_study import (
    PARTS,
    LetterLatents,
    Snapshot,
    absorber_counts,
    choose_letter,
    excess_at_frequency,
    group_children,
    letter_latents,
    middle_pair,
    read_children,
    read_latents,
    read_mask,
    read_scores,
    record_training,
)
from atm_sae.evals.constructed import absorbing_sae, letter_world, word_task
from atm_sae.evals.metrics import planted_metrics
from atm_sae.evals.stability import same_weights
from atm_sae.train.runs import get_run, grid, recipe

SMALL = WorldConfig(d_in=6, n_parents=1, children_per_parent=2, n_free=0)


def spec(method):
    return recipe(method, SMALL, 6, 8, l0=2, steps=6, batch_size=16)


def test_recording_does_not_change_the_training(tmp_path, monkeypatch):
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path))
    last = record_training(spec("atm"), every=4)[-1]
    assert same_weights(last.sae, get_run(spec("atm")).sae)


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


# ---- a letter and its latents


@pytest.mark.parametrize("method", ["topk+off", "topk+atm", "topk+dropout"])
def test_the_last_copy_on_activations_is_the_run(method, model_folder, cache):
    data = ActivationSpec(model=str(model_folder), layer=1, n_tokens=3000)
    (spec,) = grid([method], data, [4], [0], d_sae=48, steps=12, batch_size=32)
    copies, run = record_training(spec, every=5), get_run(spec)
    assert [s.step for s in copies] == [5, 10, 12]
    assert same_weights(copies[-1].sae, run.sae)
    assert not same_weights(copies[-2].sae, run.sae)
    for name in ("model_name", "hook_name", "max_norm"):
        assert copies[0].sae.metadata[name] == run.sae.metadata[name]


def test_the_untrained_control_is_not_trained():
    with pytest.raises(ValueError, match="'random' is not trained: choose a method that is"):
        record_training(spec("random"), every=2)


@pytest.fixture
def letters():
    return pd.DataFrame(
        dict(
            first_letter=["C", "B", "D", "A"],
            num_probe_true_positives=[120, 100, 99, 500],
            num_full_absorption=[2, 2, 50, 1],
            main_latents=[[1], [3, 0], [2], [8]],
        )
    )


def test_the_letter_with_most_absorbed_words(letters):
    assert choose_letter(letters) == "B"  # as many as C; D has too few words
    assert choose_letter(letters, least_words=101) == "C"
    assert choose_letter(letters, least_words=99) == "D"
    assert choose_letter(letters.assign(num_full_absorption=0)) == "A"
    with pytest.raises(ValueError, match="no letter has 501 test words .* the most are 500: lower"):
        choose_letter(letters, least_words=501)


def test_absorbing_latents_by_number_of_words(letters):
    absorber = [7, 4, 9, 4, 5, 9, 6]
    full = [True, True, True, True, False, True, True]
    words = pd.DataFrame(dict(letter=[*"BBBBBBC"], full=full, absorber=absorber))
    assert absorber_counts(words).to_dict() == {4: 2, 9: 2, 6: 1, 7: 1}
    result = AbsorptionResult(letters, words, {}, {})
    assert letter_latents(result, "B") == LetterLatents("B", [3, 0], [4, 9, 7])
    assert letter_latents(result, "B", most=1).absorbers == [4]
    assert letter_latents(result, "D") == LetterLatents("D", [2], [])
    with pytest.raises(ValueError, match="0 rows of 'E', not 1; it has C, B, D, A"):
        letter_latents(result, "E")


def test_scores_of_a_letter_choose_main_latents_anew():
    world = letter_world(20, 92)
    task = word_task(world, 20, spread=0.0)
    absorbed, moved = absorbing_sae(world, 0.5), absorbing_sae(world, 0.5)
    order = torch.arange(len(moved.W_dec)).roll(3)  # latent i is latent i + 3 of `absorbed`
    moved.W_enc.data, moved.W_dec.data = absorbed.W_enc[:, order], absorbed.W_dec[order]
    result = evaluate_absorption(absorbed, task)
    latents = letter_latents(result, "A")
    table = read_scores([Snapshot(1, moved), Snapshot(2, absorbed)], task, latents)
    silent = result.words[result.words.letter == "A"].silent
    assert latents.main == [0] and table.words.tolist() == [len(silent)] * 2
    assert table.zero.tolist() == [1.0, silent.mean()] and table.kept.tolist() == [0, 1]
    own = result.letters.set_index("first_letter").loc["A"]
    assert 0 < own.full_absorption_rate == silent.mean()
    assert table.full.tolist() == [own.full_absorption_rate] * 2
    assert table.all_full.tolist() == [result.full] * 2


def test_latents_in_each_copy():
    world = letter_world(5, 64)
    copy = absorbing_sae(world, 1)
    masked = Snapshot(2, copy, torch.arange(156.0), torch.full((156,), 0.5), 3.0)
    x = world.directions[[0, 0, 1, 2]] + world.directions[[26, 27, 31, 36]]
    table = read_latents([Snapshot(1, copy), masked], x, world.directions[0])
    first, second = table[table.step == 1], table[table.step == 2]
    assert first.frequency[[26, 27, 28, 31]].tolist() == [0.25, 0.25, 0.0, 0.25]
    assert np.allclose(
        first.cosine[[0, 1, 26]],
        [1, world.directions[0] @ world.directions[1], 0.5**0.5],
        atol=0.01,
    )
    assert first[["importance", "probability", "threshold"]].isna().all(axis=None)
    assert second.importance.tolist() == list(range(156)) and second.threshold.eq(3).all()
    assert second.probability.eq(0.5).all() and second.latent.tolist() == list(range(156))


def test_latents_of_similar_frequency():
    values = np.array([0.5, 0.25, 0.75, 0.9, 0.1, 0.3])
    frequency = np.array([0.1, 0.11, 0.12, 0.5, 0.0, 0.0])
    excess = excess_at_frequency(values, frequency, [0, 3, 4])
    assert excess[0] == 0  # 1 and 2 are within a factor of 1.25
    assert np.isnan(excess[1:]).all()  # no other at 0.5; without activity there is no frequency
    assert excess_at_frequency(values, frequency, [0], within=1.15)[0] == 0.25
    # the chosen ones are not compared with each other
    assert np.allclose(excess_at_frequency(values, frequency, [0, 1]), [-0.25, -0.5])
    assert len(excess_at_frequency(values, frequency, [])) == 0
