"""Worlds of letters, words and dictionaries by hand: exact where they should be, absorbing as much
as they were asked to."""

import pandas as pd
import pytest
import torch

from atm_sae.evals.absorption import evaluate_absorption
from atm_sae.evals.constructed import absorbing_sae, letter_world, word_task
from atm_sae.data.planted import PlantedWorld, WorldConfig

WORLD = letter_world(5, 64)
TASK, EVEN = word_task(WORLD, 10), word_task(WORLD, 10, spread=0.0)  # 260 words, 2 of each child
AMOUNT = torch.tensor(TASK.words.amount.to_numpy())
EPS = 0.001  # the bias, taken off every latent that fires; rounding is below .0008
CHILD = 26 + torch.arange(26).repeat_interleave(10) * 5 + torch.arange(260) % 5


def own(sae, task):
    "How strongly each word's own letter fires."
    return sae.encode(task.x)[torch.arange(len(task.x)), task.letter]


# ---- world and words


def test_children_stand_at_right_angles_to_all_letters():
    P, C = WORLD.directions.split([26, 130])
    assert WORLD.d_in == 64 and WORLD.n_features == 156
    assert (P @ C.T).abs().max() < 1e-5 and torch.allclose(
        WORLD.directions.norm(dim=1), torch.ones(156)
    )
    assert not torch.equal(
        letter_world(5, 64, seed=1).directions, WORLD.directions
    ) and torch.equal(letter_world(5, 64).directions, WORLD.directions)


def test_a_word_is_its_letter_and_the_next_child():
    assert torch.allclose(EVEN.x, WORLD.directions[EVEN.letter] + WORLD.directions[CHILD])
    assert (
        (EVEN.words.amount == 1).all()
        and EVEN.words.text[11] == "B-11"
        and EVEN.words.letter[11] == "B"
    )
    assert 0.5 <= AMOUNT.min() < 0.6 and 1.4 < AMOUNT.max() <= 1.5
    b = (TASK.x * WORLD.directions[CHILD]).sum(1)  # the letter has no part in it
    assert torch.allclose(
        TASK.x,
        AMOUNT[:, None] * WORLD.directions[TASK.letter] + b[:, None] * WORLD.directions[CHILD],
        atol=1e-5,
    )
    assert (
        0.5 <= b.min() + 1e-5 and b.max() <= 1.5 + 1e-5 and not torch.allclose(b, AMOUNT, atol=0.1)
    )


def test_a_fifth_is_tested_and_the_seed_decides():
    assert int(TASK.test.sum()) == 26 * 2 and TASK.seed == 0
    other = word_task(WORLD, 10, seed=1)
    assert not torch.equal(other.x, TASK.x) and not torch.equal(other.test, TASK.test)


# ---- dictionaries


def test_exact_dictionary_by_hand():
    sae = absorbing_sae(WORLD, 0)
    expected = torch.zeros(260, 156)
    expected[torch.arange(260), EVEN.letter] = expected[torch.arange(260), CHILD] = 1 - EPS
    assert (
        torch.allclose(sae.encode(EVEN.x), expected, atol=8e-4)
        and ((sae.encode(EVEN.x) > 0) == (expected > 0)).all()
    )
    error = (sae(TASK.x) - TASK.x).norm(dim=1)
    assert (
        abs(error.mean() - EPS * 2**0.5) < 1e-4 and error.max() < 0.003
    )  # two latents, each EPS short, at right angles


@pytest.mark.parametrize(
    "share, children", [(0, 0), (0.2, 1), (0.4, 2), (0.5, 2), (0.8, 4), (1, 5)]
)  # half of 5 is rounded to 2
def test_as_many_words_are_silent_as_asked_for(share, children):
    sae = absorbing_sae(WORLD, share, seed=3)
    silent = (own(sae, TASK) == 0).view(26, 10)
    assert (silent.sum(1) == 2 * children).all()  # 2 words of each child, in every letter
    assert int((sae.encode(TASK.x) > 0).sum()) == 2 * 260 - 26 * 2 * children
    assert torch.allclose(
        own(sae, TASK)[~silent.flatten()], AMOUNT[~silent.flatten()] - EPS, atol=8e-4
    )


def test_absorbed_children_bring_their_letter():
    sae = absorbing_sae(WORLD, 0.4)
    silent = own(sae, EVEN) == 0
    brought = (sae.W_dec[CHILD] * WORLD.directions[EVEN.letter]).sum(1)
    assert torch.allclose(brought, silent.float(), atol=1e-5)
    assert torch.allclose(sae(EVEN.x), EVEN.x, atol=3e-3)  # a = b = 1: nothing is lost
    moved = (sae(TASK.x) - TASK.x) @ torch.linalg.pinv(
        WORLD.directions[:26]
    )  # else (b - a) of the letter
    b = (TASK.x * WORLD.directions[CHILD]).sum(1)
    assert torch.allclose(
        moved[torch.arange(260), TASK.letter], torch.where(silent, b - AMOUNT, 0.0), atol=3e-3
    )


def test_the_seed_chooses_the_children():
    first, second = (own(absorbing_sae(WORLD, 0.4, seed=s), TASK) == 0 for s in (0, 1))
    assert first.sum() == second.sum() and not torch.equal(first, second)


@pytest.mark.parametrize("part", [0, 0.1, 0.3])
def test_part_moves_exactly_the_part(part):
    sae = absorbing_sae(WORLD, 1, part, part)
    assert torch.allclose(own(sae, EVEN), torch.full((260,), 1 - part - EPS), atol=8e-4)
    b = (TASK.x * WORLD.directions[CHILD]).sum(1)
    assert torch.allclose(own(sae, TASK), AMOUNT - part * b - EPS, atol=8e-4)
    assert torch.allclose(
        (sae.W_dec[CHILD] * WORLD.directions[TASK.letter]).sum(1),
        torch.full((260,), float(part)),
        atol=1e-5,
    )
    assert torch.allclose(sae(TASK.x), TASK.x, atol=3e-3)


# ---- an evaluator finds what was put in


def test_evaluator_agrees_on_every_word():
    world = letter_world(20, 92)
    task = word_task(world, 20, spread=0.0)
    for share in (0, 0.25, 0.5, 1):
        sae = absorbing_sae(world, share)
        result = evaluate_absorption(sae, task)
        silent = (own(sae, task) == 0).numpy()[
            pd.Index(task.words.text).get_indexer(result.words.text)
        ]
        assert len(silent) == 26 * 4 and (silent == result.words.full).all()
        assert abs(result.full - silent.mean()) < 1e-6  # as many scored words in every letter
        assert abs(result.full - share) <= (
            0.15 if 0 < share < 1 else 0
        )  # between: by the luck of the split


# ---- impossible wishes


@pytest.mark.parametrize(
    "wish, message",
    [
        (
            lambda: letter_world(40, 65),
            "letter_world: 26 letters and 40 children of one need at least 66 dimensions, not 65",
        ),
        (lambda: letter_world(0), "letter_world: 0 children, .* give at least 1"),
        (
            lambda: absorbing_sae(WORLD, 1.1),
            "absorbing_sae: share = 1.1 is no share: give a number from 0 to 1",
        ),
        (lambda: absorbing_sae(WORLD, -0.1), "share = -0.1 is no share"),
        (lambda: absorbing_sae(WORLD, float("nan")), "share = nan is no share"),
        (
            lambda: absorbing_sae(WORLD, 0.5, part=1.5),
            "absorbing_sae: part = 1.5 is no share: give a number from 0 to 1",
        ),
        (
            lambda: absorbing_sae(letter_world(20, 46, seed=1), 0),
            "46 dimensions are too tight to tell 20 children .* give letter_world more, 92 say",
        ),
        (
            lambda: absorbing_sae(PlantedWorld(), 0.5),
            "no world of letters .* make it with letter_world",
        ),
        (
            lambda: word_task(PlantedWorld(WorldConfig(n_parents=26))),
            "no world of letters .* make it with letter_world",
        ),
    ],
)  # not at right angles
def test_errors_say_what_to_do(wish, message):
    with pytest.raises(ValueError, match=message):
        wish()


def test_the_least_dimensions_are_enough_for_a_world():
    assert letter_world(2, 28).directions.shape == (78, 28)


@pytest.mark.parametrize("options", [dict(n=0), dict(spread=2.0), dict(spread=-0.1)])
def test_words_that_cannot_be_made(options):
    with pytest.raises(
        ValueError, match="n must be at least 5 .a fifth is tested. and spread lie in"
    ):
        word_task(letter_world(5, d_in=64), **options)
