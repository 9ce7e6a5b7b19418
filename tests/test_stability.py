"Agreement between seeds, movement within a run, and the SAE that reads on."

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from atm_sae.core import generator
from atm_sae.data.planted import WorldConfig
from atm_sae.evals.stability import (
    churn,
    frozen_movement,
    mean_agreement,
    most_frequent,
    movement,
    observed_method,
    persistence,
    pseudo_values,
    read_without_learning,
    same_weights,
    without_mask_settings,
)
from atm_sae.sae.atm import ATMConfig, make_masker
from atm_sae.train.runs import get_run, recipe


def dictionary(*rows):
    return SimpleNamespace(W_dec=torch.tensor(rows, dtype=torch.float32))


def test_most_frequent_never_takes_a_latent_that_is_always_zero():
    frequency = torch.tensor([0.0, 0.3, 0.0])
    assert most_frequent(frequency, 3).tolist() == [False, True, False]


def test_agreement_leaves_out_inactive_latents():
    one, other = dictionary([1, 0], [0, 1]), dictionary([1, 0], [0, -1])
    half = torch.tensor([0.5, 0.0])
    assert mean_agreement(one, half, [(other, half)], 2)["best_cosine"] == 1
    all_active = torch.tensor([0.5, 0.5])
    # best cosines 1 and 0 in both directions; one to one |1| and |-1|
    found = mean_agreement(one, all_active, [(other, all_active)], 2)
    assert found == dict(best_cosine=0.5, mcc=1.0, frequent_cosine=0.5)


def test_agreement_is_the_mean_over_the_other_seeds():
    one, active = dictionary([1, 0]), torch.tensor([1.0])
    others = [(dictionary([1, 0]), active), (dictionary([0, 1]), active)]
    assert mean_agreement(one, active, others, 1)["best_cosine"] == 0.5


def test_pseudo_values_are_what_leaving_a_seed_out_changes():
    rng = np.random.default_rng(0)
    pairs = np.triu(rng.random((5, 5)), 1)
    pairs = pairs + pairs.T
    means = pairs.sum(1) / 4
    whole = pairs[np.triu_indices(5, 1)].mean()
    for seed, value in enumerate(pseudo_values(means)):
        kept = np.delete(np.delete(pairs, seed, 0), seed, 1)
        without = kept[np.triu_indices(4, 1)].mean()
        assert np.isclose(value, 5 * whole - 4 * without)


def test_the_jackknife_needs_three_seeds():
    with pytest.raises(ValueError, match="2 seeds"):
        pseudo_values([0.1, 0.2])


def test_nothing_moves_between_equal_importances():
    importance = torch.tensor([0.5, 1.5, 1.0])
    assert set(movement(importance, importance).values()) == {0.0}


def test_churn_and_persistence_by_hand():
    log = SimpleNamespace(threshold=[1.0, 1.0], mask_rate=[0.1, 0.3])
    before, after = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0])
    history = SimpleNamespace(
        table=log, snapshots={9: dict(importance=before), 10: dict(importance=after)}
    )
    found = churn(history, (9, 10), hides=True)
    assert found["threshold_movement"] == 0 and np.isclose(found["mask_rate_movement"], 0.5)
    assert found["changed_sides"] == 0.5
    assert np.isnan(churn(history, (9, 10), hides=False)["mask_rate_movement"])


def test_persistence_where_nothing_is_hidden():
    snapshot = dict(importance=torch.tensor([1.0, 2.0]), probability=torch.zeros(2))
    found = persistence(snapshot, snapshot)
    assert found == pytest.approx(dict(rank_correlation=1.0, mask_overlap=0.0))


def test_reading_on_measures_what_each_latent_contributes():
    sae = SimpleNamespace(encode=torch.relu, decode=lambda z: z, W_dec=torch.eye(2))
    masker = make_masker(ATMConfig(combine="contribution", r=0.0), 2, steps=10)
    x = torch.tensor([[3.0, 1.0], [3.0, 1.0]])
    read = read_without_learning(sae, masker, iter([x, x]), 2, generator(0, "test"))
    # the error is zero, so leaving latent i out costs z_i^2: 9 and 1, over their mean 5
    assert torch.allclose(read, torch.tensor([1.8, 0.2]))


def test_reading_on_leaves_outliers_out():
    sae = SimpleNamespace(encode=torch.relu, decode=lambda z: z, W_dec=torch.eye(2), max_norm=9.0)
    masker = make_masker(ATMConfig(combine="contribution", r=0.0), 2, steps=10)
    x = torch.tensor([[3.0, 1.0], [0.0, 100.0]])
    read = read_without_learning(sae, masker, iter([x, x]), 2, generator(0, "test"))
    assert torch.allclose(read, torch.tensor([1.8, 0.2]))


def test_frozen_movement_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path))
    spec = recipe("atm", WorldConfig(), 64, 32, l0=4, steps=10, batch_size=32)
    found = frozen_movement(get_run(spec), (9, 10), first=3)
    assert set(found) == {f"{name}_frozen" for name in movement(torch.ones(2), torch.ones(2))}
    assert found["importance_movement_frozen"] > 0


def test_without_a_mask_there_is_nothing_to_follow(tmp_path, monkeypatch):
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path))
    run = get_run(recipe("random", WorldConfig(), 64, 32, l0=4, steps=1, batch_size=32))
    with pytest.raises(ValueError, match="'random' has no mask"):
        frozen_movement(run, (0, 1), first=1)


def test_names_and_settings_of_observed_methods():
    assert observed_method("jumprelu") == "jumprelu+atm watched"
    assert observed_method("standard+off r=2") == "atm r=2 off watched"
    with pytest.raises(ValueError, match="has a mask"):
        observed_method("topk+atm")
    assert without_mask_settings(dict(lr=1e-3, anneal=0.5)) == dict(lr=1e-3)


def test_same_weights():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert not same_weights(a, b)
    b.load_state_dict(a.state_dict())
    assert same_weights(a, b)
