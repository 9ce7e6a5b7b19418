"Components of variance, and what a comparison of two arms can show."

import math

import numpy as np
import pytest

from atm_sae.stats import detectable_effect, runs_needed, two_arm_power, variance_components


def test_components_by_hand():
    # rows 0 and 2 differ by 2 everywhere, columns by 4: no residual
    scores = np.array([[0.0, 4.0], [2.0, 6.0]])
    assert variance_components(scores) == (2.0, 8.0, 0.0)


def test_negative_estimates_count_as_zero():
    # all variance is interaction: means of rows and columns are equal
    parts = variance_components(np.array([[1.0, -1.0], [-1.0, 1.0]]))
    assert parts == (0.0, 0.0, 4.0) and parts.one_run == 4.0


def test_components_of_simulated_noise():
    rng = np.random.default_rng(0)
    n = 400
    scores = rng.normal(0, 2, (n, 1)) + rng.normal(0, 3, (1, n)) + rng.normal(0, 1, (n, n))
    assert np.allclose(variance_components(scores), (4, 9, 1), rtol=0.2)


@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (3,)])
def test_one_seed_or_evaluation_is_refused(shape):
    with pytest.raises(ValueError, match="two seeds"):
        variance_components(np.zeros(shape))


def test_power_of_no_effect_is_half_the_level():
    assert math.isclose(two_arm_power(0.0, 5), 0.025, rel_tol=1e-6)


def test_detectable_effect_and_runs_needed_are_inverse():
    for n in (3, 5, 10, 20):
        effect = detectable_effect(n)
        assert math.isclose(two_arm_power(effect, n), 0.8, rel_tol=1e-6)
        assert runs_needed(effect * 1.001) == n and runs_needed(effect * 0.999) == n + 1


def test_runs_needed_at_the_ends():
    assert runs_needed(50.0) == 2 and math.isnan(runs_needed(math.inf))
    assert abs(runs_needed(0.1) - 16 / 0.01) < 40  # the rule of thumb
