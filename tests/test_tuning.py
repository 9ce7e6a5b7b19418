"Tuning: what each method may vary, trials that fill the space evenly, and the choice, by hand."

import math

import pandas as pd
import pytest

from atm_sae.data.planted import WorldConfig
from atm_sae.methods import METHODS, method_parts
from atm_sae.train.runs import default_lr, grid
from atm_sae.train.tuning import (
    RANGES,
    choose,
    chosen_settings,
    search_space,
    trial_settings,
    trials,
)


def share(value, low, high):
    "Where a value lies in its range, from 0 to 1: the inverse of how trials are made."
    return math.log(value / low) / math.log(high / low) if low > 0 else (value - low) / (high - low)


def table(method, l0, absorption, fvu=0.0):
    return pd.DataFrame(dict(method=method, l0=l0, absorption=absorption, fvu=fvu))


# ---- what is tried


def test_each_method_varies_what_it_has():
    expect = {
        "lr_scale": {*METHODS},
        "bandwidth": {"random", "jumprelu"} | {m for m in METHODS if m.startswith("jumprelu+")},
    }
    masked = {m for m in METHODS if method_parts(m)[1] == "atm"}
    assert {"atm", "topk+atm", "jumprelu+atm"} <= masked
    expect |= {"c": masked, "r": masked}
    assert {n: {m for m in METHODS if n in search_space(m)} for n in RANGES} == expect
    assert (
        search_space("jumprelu+atm")
        == RANGES
        == dict(lr_scale=(0.25, 4), c=(-1, 1), r=(0.25, 4), bandwidth=(0.05, 0.8))
    )
    with pytest.raises(ValueError, match="unknown method 'atn'"):
        search_space("atn")


def test_first_the_default_and_then_as_many_as_were_asked_for():
    for budget in (1, 2, 3, 8, 9):
        first, *rest = trials("atm", budget)
        assert first == {} and len(rest) == budget - 1
        for t in rest:
            assert all(low <= t[n] <= high for n, (low, high) in search_space("atm").items())


def test_a_budget_counts_the_default():
    with pytest.raises(ValueError, match="the budget counts the default: at least 1, not 0"):
        trials("atm", 0)


def test_trials_fill_every_dimension_evenly():
    """Of 8 points one lies in each eighth of each range, logarithmic where the range is positive.
    Of 8 random points that is so in 1 of 400 draws, for one dimension."""
    for seed in range(3):
        _, *points = trials("jumprelu+atm", 9, seed)
        for name, bounds in RANGES.items():
            assert sorted(int(8 * share(p[name], *bounds)) for p in points) == [*range(8)], name


def test_a_larger_budget_goes_on_where_the_smaller_ended():
    assert (
        trials("atm", 16)[:8] == trials("atm", 8)
        and trials("atm", 8, seed=1)[1:] != trials("atm", 8)[1:]
    )


def test_trials_are_a_grid_of_variants():
    tried = trial_settings(["topk", "atm"], 2, seed=3)
    assert list(tried) == ["topk trial 0", "topk trial 1", "atm trial 0", "atm trial 1"]
    assert [*tried.values()] == trials("topk", 2, 3) + trials("atm", 2, 3)
    specs = {
        s.method: s
        for s in grid(
            list(tried), WorldConfig(), targets=[4], seeds=[0], d_sae=200, steps=10, tuned=tried
        )
    }
    assert list(specs) == list(tried)
    plain, moved = specs["atm trial 0"], specs["atm trial 1"]
    assert plain.train.lr == default_lr(200, "standard") and (plain.atm.c, plain.atm.r) == (0, 1)
    assert moved.train.lr == tried["atm trial 1"]["lr_scale"] * plain.train.lr and (
        moved.atm.c,
        moved.atm.r,
    ) == (tried["atm trial 1"]["c"], tried["atm trial 1"]["r"])


# ---- what is chosen


def test_the_cheapest_within_reach_is_chosen():
    found = choose(
        table(
            [f"topk trial {i}" for i in range(4)],
            [5, 4.6, 5.4, 10],
            [0.5, 0.3, 0.1, 0.1],
            [0.1, 0.2, 0.5, 0.05],
        ),
        5,
    )
    assert found.cost.tolist() == pytest.approx([0.6, 0.5, 0.6, 0.15])
    assert found.in_reach.tolist() == [True, True, True, False] and found.chosen.tolist() == [
        False,
        True,
        False,
        False,
    ]


def test_a_method_of_two_words_keeps_its_name():
    found = choose(table(["frozen decoder trial 0"], [5], [0.5]), 5)
    assert found.method.tolist() == ["frozen decoder"]


def test_trials_are_judged_by_their_means():
    "Two seeds each: either seed of the second trial is out of reach, their mean is not."
    found = choose(
        table(
            ["topk trial 0", "topk trial 1"] * 2,
            [5, 4, 5, 6],
            [0.5, 0.3, 0.5, 0.1],
            [0.1, 0.1, 0.3, 0.3],
        ),
        5,
    )
    assert found.trial.tolist() == ["topk trial 0", "topk trial 1"] and found.l0.tolist() == [5, 5]
    assert found.cost.tolist() == pytest.approx([0.7, 0.4]) and found.chosen.tolist() == [
        False,
        True,
    ]


def test_where_none_is_within_reach_the_nearest_is_taken_whatever_it_costs():
    found = choose(
        table(["atm trial 0", "atm trial 1", "atm trial 2"], [10, 4, 6.5], [0, 0.9, 0]), 5
    )
    assert not found.in_reach.any() and found.chosen.tolist() == [
        False,
        True,
        False,
    ]  # 4 is nearer to 5 than 6.5


def test_slack_says_how_far_is_within_reach():
    rows = table(["topk trial 0", "topk trial 1"], [5, 6], [0.5, 0.1])
    assert choose(rows, 5).chosen.tolist() == [True, False] and choose(
        rows, 5, slack=0.3
    ).chosen.tolist() == [False, True]


def test_equal_trials_leave_the_default():
    assert choose(table(["topk trial 0", "topk trial 1"], 5, 0.5), 5).chosen.tolist() == [
        True,
        False,
    ]


def test_one_trial_is_chosen_for_each_method():
    tried = trial_settings(["topk", "topk+atm", "atm"], 3)
    found = choose(table(list(tried), 5, [0.3, 0.2, 0.1, 0.1, 0.2, 0.3, 0.2, 0.1, 0.3]), 5)
    assert found.method.tolist() == ["topk"] * 3 + ["topk+atm"] * 3 + ["atm"] * 3
    assert chosen_settings(found, tried) == {
        "topk": tried["topk trial 2"],
        "topk+atm": {},
        "atm": tried["atm trial 1"],
    }
