import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from tree_statistics import statistics, tree_levels

from atm_sae.core import generator
from atm_sae.data import synthsaebench
from atm_sae.data.planted import WorldBatches, WorldConfig
from atm_sae.data.synthsaebench import (
    PUBLISHED,
    WORLDS,
    TreeWorld,
    TreeWorldConfig,
    drawn_rates,
    expected_rates,
    get_directions,
    nominal_rates,
    planted_world,
    shared_weights,
    spread_directions,
    tree_parents,
)
from atm_sae.evals.metrics import synthsaebench_metrics
from atm_sae.methods import METHODS
from atm_sae.train.runs import recipe, run_artefact

FIXTURES = Path(__file__).parent / "fixtures"
REFERENCE = json.loads((FIXTURES / "synthsaebench" / "reference.json").read_text("utf-8"))
BENCHMARK = TreeWorldConfig()
TINY = TreeWorldConfig(d_in=12, n_features=60, n_roots=2, n_branches=3, depth=2, spread_steps=0)


def drawn(world, n, seed=0, rows=1000):
    gen = generator(seed, "test")
    return (world.sample(rows, gen) for _ in range(0, n, rows))


# ---- the reference


def test_rates_and_means_are_those_of_the_reference():
    known = REFERENCE["parameters"]
    rates = drawn_rates(nominal_rates(BENCHMARK), tree_parents(BENCHMARK), BENCHMARK.n_branches)
    torch.testing.assert_close(rates[known["features"]], torch.tensor(known["rate"]))
    mean = torch.linspace(BENCHMARK.first_mean, BENCHMARK.last_mean, BENCHMARK.n_features)
    torch.testing.assert_close(mean[known["features"]], torch.tensor(known["mean"]))
    weight, own = shared_weights(BENCHMARK)
    torch.testing.assert_close(weight.square().sum(1) + own.square(), torch.ones(len(own)))
    # root mean square of w_i . w_j over pairs: off-diagonal entries of w w^T
    gram, own_square = weight.T @ weight, weight.square().sum(1).square().sum()
    pairs = len(weight) * (len(weight) - 1)
    rms = ((gram.square().sum() - own_square) / pairs).sqrt()
    assert float(rms) == pytest.approx(known["rms_correlation"], rel=0.02)
    assert known["bias_norm"] == pytest.approx(BENCHMARK.bias, abs=1e-5)


def test_directions_move_as_in_the_reference():
    known = REFERENCE["orthogonal"]
    start = torch.tensor(known["start"])
    found = spread_directions(start, known["steps"], known["lr"])
    torch.testing.assert_close(found, torch.tensor(known["end"]), atol=1e-4, rtol=0)
    assert (F.normalize(start, dim=1) - found).abs().max() > 0.1  # far from where they were


def agree(found, known, loose=1.0):
    "Compare two `statistics`; the tolerances cover other seeds of the world and of the samples."
    assert found["children_without_parent"] == known["children_without_parent"] == 0
    assert found["most_siblings"] == known["most_siblings"] == 1
    for name, tolerance in dict(l0=0.04, l0_std=0.1, norm=0.02, norm_std=0.1).items():
        assert found[name] == pytest.approx(known[name], rel=loose * tolerance), name
    assert found["l0_of_levels"] == pytest.approx(known["l0_of_levels"], rel=loose * 0.06)
    assert found["value_of_levels"] == pytest.approx(known["value_of_levels"], rel=loose * 0.03)
    stds = known["value_std_of_levels"]
    assert found["value_std_of_levels"] == pytest.approx(stds, rel=loose * 0.12)
    shares = known["child_share_of_levels"]
    assert found["child_share_of_levels"] == pytest.approx(shares, abs=loose * 0.02)


@pytest.fixture(scope="module")
def benchmark():
    "SynthSAEBench-16k with random directions, as the reference was recorded."
    return TreeWorld(replace(BENCHMARK, spread_steps=0))


def test_samples_are_those_of_the_reference(benchmark):
    known = REFERENCE["statistics"]
    found = statistics(drawn(benchmark, 3000), tree_levels(128, 4, 3, 16_384), 4)
    agree(found, known)
    assert found["root_correlation"] == pytest.approx(known["root_correlation"], abs=0.003)
    assert float(benchmark.rates.sum()) == pytest.approx(known["l0"], rel=0.005)


@pytest.mark.parametrize(
    "changed", [dict(scale_children=False), dict(correlation_scale=0.0), dict(n_branches=3)]
)
def test_other_worlds_are_not_those_of_the_reference(changed):
    config = replace(BENCHMARK, d_in=8, spread_steps=0, **changed)
    levels = tree_levels(128, config.n_branches, 3, 16_384)
    found = statistics(drawn(TreeWorld(config), 1000), levels, config.n_branches)
    known = REFERENCE["statistics"]
    same = {name: known[name] for name in ("norm", "norm_std")}  # of another width
    with pytest.raises(AssertionError):
        agree(found | same, known)
        assert found["root_correlation"] == pytest.approx(known["root_correlation"], abs=0.003)


def test_samples_are_those_of_the_installed_reference():
    pytest.importorskip("sae_lens.synthetic", exc_type=ImportError)
    record = runpy.run_path(str(FIXTURES / "record_synthsaebench.py"))
    levels = tree_levels(16, 4, 3, 2000)
    known = statistics(record["samples"](record["model"](2000, 64, 16), 10_000), levels, 4)
    config = replace(BENCHMARK, d_in=64, n_features=2000, n_roots=16, spread_steps=0)
    agree(statistics(drawn(TreeWorld(config), 10_000), levels, 4), known, loose=3)


class Recorded:
    "The world and the SAE of the recorded scores: fixed samples, latents that ignore them."

    known = REFERENCE["scores"]
    directions = F.normalize(torch.tensor(known["directions"]), dim=1)
    W_dec = torch.tensor(known["decoder"])
    n_features, d_in = directions.shape

    def sample(self, n, generator):
        return torch.randn(n, self.d_in, generator=generator), torch.tensor(self.known["on"])

    def encode(self, x):
        return torch.tensor(self.known["active"]).float()

    def decode(self, z):
        return z @ self.W_dec


def test_scores_are_those_of_the_reference():
    found = synthsaebench_metrics(Recorded(), Recorded(), n=400)
    for name in ("precision", "recall", "f1", "accuracy", "mcc", "uniqueness"):
        assert found[name] == pytest.approx(Recorded.known[name], abs=1e-6), name


def test_published_scores():
    assert len({(row.method, row.l0) for row in PUBLISHED}) == len(PUBLISHED) == 10
    assert {row.method for row in PUBLISHED} <= {*METHODS, "matching pursuit"}
    for row in PUBLISHED:
        for mean, deviation in (row.f1, row.mcc, row.uniqueness, row.explained_variance):
            assert 0.4 < mean < 1 and 0 < deviation < 0.01


# ---- the configuration


@pytest.mark.parametrize(
    "wrong",
    [
        dict(d_in=0),
        dict(n_branches=0),
        dict(zipf=-1.0),
        dict(n_shared=-1),
        dict(bias=math.nan),
        dict(std_mean=math.inf),
        dict(first_mean=0.0),
        dict(min_rate=0.5),
        dict(max_rate=1.5),
        dict(n_features=10_879),
    ],
)
def test_config_names_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=f"TreeWorldConfig: .*{next(iter(wrong))}"):
        replace(BENCHMARK, **wrong)


def test_structure():
    config = replace(TINY, n_features=30)
    assert tree_parents(config).tolist() == [
        *[-1] * 2,
        *[0] * 3,
        *[1] * 3,
        *(parent for parent in range(2, 8) for _ in range(3)),
        *[-1] * 4,
    ]
    world = TreeWorld(config)
    assert world.is_parent.tolist() == [True] * 8 + [False] * 22
    assert [world.children(i).tolist() for i in (0, 7, 8, 29)] == [
        [2, 3, 4],
        [23, 24, 25],
        [],
        [],
    ]


# ---- the world


def test_expected_rates_are_the_measured_ones_without_correlation():
    world = TreeWorld(replace(TINY, n_shared=0))
    ((x, a),) = drawn(world, 40_000, rows=40_000)
    on = (a > 0).float().mean(0)
    assert (on - world.rates).abs().max() < 0.01
    assert (on[world.parent >= 0] > 0).all()


def test_expected_rates_by_hand():
    found = expected_rates(torch.tensor([0.5, 0.6, 0.5]), torch.tensor([-1, 0, 0]), 2, 1)
    torch.testing.assert_close(found, torch.tensor([0.5, 0.5 * 0.6 * 0.75, 0.5 * 0.5 * 0.7]))


def test_samples_are_sums_of_their_features():
    world = TreeWorld(TINY)
    x, a = world.sample(500, generator(0))
    assert x.dtype == a.dtype == torch.float32 and (a >= 0).all()
    torch.testing.assert_close(x, a @ world.directions + world.bias)
    assert float(world.bias.norm()) == pytest.approx(0.5)
    assert torch.equal(a, world.sample(500, generator(0))[1])
    assert not torch.equal(a, world.sample(500, generator(1))[1])


def test_a_sample_without_features_is_the_bias():
    world = TreeWorld(replace(TINY, max_rate=1e-6, min_rate=1e-6))
    x, a = world.sample(8, generator(0))
    assert not a.any() and torch.equal(x, world.bias.expand(8, -1))


@pytest.mark.parametrize("changed", [dict(n_roots=0), dict(depth=0), dict(n_branches=1)])
def test_worlds_of_other_shapes(changed):
    world = TreeWorld(replace(TINY, **changed))
    ((x, a),) = drawn(world, 4000, rows=4000)
    assert (a > 0).sum(1).float().mean() == pytest.approx(float(world.rates.sum()), rel=0.1)


def test_another_seed_is_another_world():
    one, two = TreeWorld(TINY), TreeWorld(replace(TINY, seed=1))
    assert not torch.equal(one.directions, two.directions) and not torch.equal(one.bias, two.bias)


def test_directions_are_kept(cache, monkeypatch):
    config = replace(TINY, spread_steps=3)
    made = get_directions(config)
    monkeypatch.setattr(synthsaebench, "spread_directions", None)
    assert torch.equal(get_directions(config), made)
    with pytest.raises(TypeError):
        get_directions(replace(config, spread_steps=4))


def test_batches_resume():
    one = WorldBatches(TreeWorld(TINY), 16, seed=3)
    next(one)
    state, expected = one.state_dict(), next(one)
    two = WorldBatches(TreeWorld(TINY), 16, seed=3)
    two.load_state_dict(state)
    assert torch.equal(next(two), expected)
    with pytest.raises(ValueError, match="world is"):
        WorldBatches(TreeWorld(replace(TINY, bias=1.0)), 16, 3).load_state_dict(state)


# ---- its use


def test_worlds_by_name():
    assert WORLDS == {"planted": WorldConfig(), "planted:synthsaebench-16k": BENCHMARK}
    assert isinstance(planted_world(TINY), TreeWorld)
    assert planted_world(WorldConfig()).n_features == 160


def test_the_two_worlds_do_not_depend_on_each_others_code(cache):
    specs = [recipe("topk", data, 12, 16, 3, 5) for data in (TINY, WorldConfig(d_in=12))]
    trees, planted = (run_artefact(spec).closure.definitions.keys() for spec in specs)
    assert {"data.synthsaebench.TreeWorld", "data.planted.WorldBatches"} <= trees
    assert "data.planted.PlantedWorld" not in trees
    assert not {name for name in planted if name.startswith("data.synthsaebench")}
    other = recipe("topk", replace(TINY, scale_children=False), 12, 16, 3, 5)
    assert specs[0].key != other.key
