"Masks whose targets are chosen: probabilities, weights, and a training with them."

import pytest
import torch

from atm_sae.data.planted import PlantedWorld, WorldConfig
from atm_sae.evals.chosen_masks import (
    ChosenMasker,
    kind_weights,
    row_overlap,
    scaled_probabilities,
    train_chosen,
)
from atm_sae.evals.controls import with_weights
from atm_sae.evals.stability import same_weights
from atm_sae.sae.atm import ATMConfig, ATMMasker
from atm_sae.sae.sae import SAE, SAEConfig
from atm_sae.train.runs import get_run, recipe

SMALL = WorldConfig(d_in=4, n_parents=1, children_per_parent=2, n_free=1)


@pytest.mark.parametrize(
    "weights, rate, wanted",
    [
        ([1, 1, 0, 0], 0.25, [0.5, 0.5, 0, 0]),
        ([4, 2, 1, 1], 0.5, [0.95, 0.525, 0.2625, 0.2625]),  # 1.05 = 2 - 0.95 over 2 + 1 + 1
        ([8, 4, 1, 1], 0.6, [0.95, 0.95, 0.25, 0.25]),  # two at the cap, the second only then
        ([1, 0, 0, 0], 0.5, [0.95, 0, 0, 0]),  # the mean cannot be reached
        ([0, 0, 0, 0], 0.5, [0, 0, 0, 0]),
        ([1, 2, 3, 4], 0, [0, 0, 0, 0]),
    ],
)
def test_probabilities_by_hand(weights, rate, wanted):
    found = scaled_probabilities(torch.tensor(weights, dtype=torch.float32), rate)
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)


def dictionary(rows):
    return with_weights(SAE(SAEConfig(4, len(rows))), W_dec=rows)


@pytest.mark.parametrize("kind, wanted", [("parents", [3]), ("children", [0, 4]), ("free", [2])])
def test_kinds_follow_the_present_decoder(kind, wanted):
    world = PlantedWorld(SMALL)
    rows = torch.zeros(5, 4)
    rows[[3, 0, 4, 2]] = world.directions  # parent, two children, free feature; 1 is left over
    rows[1] = -world.directions[0]
    masker = ATMMasker(5, ATMConfig(), 10)
    weights = kind_weights(world, kind)(dictionary(rows), masker)
    assert weights.nonzero()[:, 0].tolist() == wanted


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown kind 'child': choose one of parents, children"):
        kind_weights(PlantedWorld(SMALL), "child")


def test_only_the_less_frequent_of_two_overlapping_rows_has_a_weight():
    rows = torch.eye(4)[[0, 0, 1, 2, 3]]
    rows[1] = torch.tensor([0.6, 0.8, 0, 0])  # cosine 0.6 with row 0, 0.8 with row 2
    masker = ATMMasker(5, ATMConfig(), 10)
    masker.frequency = torch.tensor([0.5, 0.2, 0.1, 0.3, 0.4])
    # row 1 is rarer than row 0 alone, row 2 is rarer than row 1; the median is 0
    assert torch.allclose(row_overlap(dictionary(rows), masker), torch.tensor([0, 0.6, 0.8, 0, 0]))
    masker.frequency[2] = 1e-5  # almost never active
    assert row_overlap(dictionary(rows), masker)[2] == 0
    masker.frequency.zero_()
    assert not row_overlap(dictionary(rows), masker).any()


def test_the_masker_computes_weights_again_every_few_steps():
    asked = []

    def weights(sae, masker):
        asked.append(masker.step)
        return torch.ones(4)

    sae = SAE(SAEConfig(4, 4))
    masker = ChosenMasker(sae, ATMConfig(warmup=0.25), 8, weights, 0.3, every=3)
    for step in range(8):
        masker.step = step
        masker.current_probability()
        probability = masker.current_probability()
        assert torch.allclose(probability, torch.full((4,), 0.3 if step >= 2 else 0.0))
    assert asked == [2, 3, 6]


def test_a_rate_of_zero_trains_as_without_a_mask(tmp_path, monkeypatch):
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path))
    settings = dict(l0=1, steps=12, batch_size=32)
    masked = train_chosen(recipe("atm", SMALL, 4, 8, **settings), "none", row_overlap, 0.0)
    bare = get_run(recipe("standard", SMALL, 4, 8, **settings))
    assert same_weights(masked.sae, bare.sae) and masked.spec.method == "none"
    with pytest.raises(ValueError, match="'standard' has no mask"):
        train_chosen(bare.spec, "none", row_overlap, 0.1)
