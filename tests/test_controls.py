"Control dictionaries, and a score beside the truth."

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from atm_sae.evals.constructed import absorbing_sae, letter_world, word_task
from atm_sae.evals.controls import (
    always_active,
    control_dictionaries,
    inactive,
    score_and_truth,
    shuffled_decoder,
    split_limits,
    with_weights,
)


@pytest.fixture(scope="module")
def world():
    return letter_world(4, 64)


@pytest.fixture(scope="module")
def task(world):
    return word_task(world, n=20)


def test_changes_are_made_in_a_copy(world):
    exact = absorbing_sae(world, 0)
    before = exact.b_enc.clone()
    changed = with_weights(exact, b_enc=torch.ones_like(before))
    assert torch.equal(exact.b_enc, before) and (changed.b_enc == 1).all()


def test_shuffling_keeps_the_encoder_and_the_rows(world, task):
    exact = absorbing_sae(world, 0)
    shuffled = shuffled_decoder(exact, seed=3)
    assert torch.equal(shuffled.encode(task.x), exact.encode(task.x))
    assert torch.allclose(shuffled.W_dec.sum(0), exact.W_dec.sum(0), atol=1e-4)
    assert torch.equal(shuffled.W_dec, shuffled_decoder(exact, seed=3).W_dec)


def test_inactive_and_always_active(world, task):
    exact = absorbing_sae(world, 0)
    assert not inactive(exact).encode(task.x).any()
    chosen = torch.arange(world.n_features) == 7
    z = always_active(exact, chosen).encode(task.x)
    assert (z[:, 7] == 1).all()
    assert torch.equal(z[:, ~chosen], exact.encode(task.x)[:, ~chosen])


def test_the_set_of_controls(world, task):
    found = dict(control_dictionaries(world, task, 0.5, d_random=64, dense_l0=8, seed=1))
    assert list(found)[:2] == ["exact", "50% absorbed"] and len(found) == 9
    l0 = {n: float((sae.encode(task.x) > 0).sum(1).float().mean()) for n, sae in found.items()}
    assert math.isclose(l0["random, L0 2"], 2, rel_tol=0.1)
    assert math.isclose(l0["random, L0 8"], 8, rel_tol=0.1)
    assert l0["always on"] == 27  # 26 letters and one child


def test_truth_of_absorbing_dictionaries(world, task):
    for share in (0, 0.5, 1):
        found = score_and_truth(absorbing_sae(world, share), task)
        if share in (0, 1):  # between them, the test words' share differs from the children's
            assert found["exact"] == share
        assert math.isclose(found["error"], found["full"] - found["exact"], abs_tol=1e-12)
        # an absorbed word either counts, or is missed in one of two ways
        missed = found["covered"] + found["too_weak"]
        assert found["full"] + missed == pytest.approx(found["exact"] + found["false_alarm"])


def test_truth_is_unknown_without_a_latent_for_each_letter(world, task):
    found = score_and_truth(absorbing_sae(world, 0), task, own=False)
    assert np.isnan(found["exact"]) and np.isnan(found["moved"]) and found["full"] == 0


def test_split_limits_solve_the_two_inequalities():
    for jump in (0.01, 0.03, 0.1):
        always, never = split_limits(jump)
        assert math.isclose(1 / (2 * always - 1), jump)
        assert math.isclose(2 * never / ((never + 1) * (never + 2)), jump)


def test_outliers_are_left_out_of_controls_and_truth(world, task):
    loud = torch.arange(len(task.x)) % 25 == 0
    spoilt = replace(task, x=torch.where(loud[:, None], 1000 * task.x, task.x))
    exact = absorbing_sae(world, 0)
    assert score_and_truth(exact, spoilt) == score_and_truth(exact, spoilt.only(~loud))
    part = spoilt.only(~loud)
    found, clean = (
        dict(control_dictionaries(world, t, 0.5, d_random=64, dense_l0=8)) for t in (spoilt, part)
    )
    for name in ("random, L0 2", "random, L0 8"):
        assert torch.equal(found[name].threshold, clean[name].threshold)
