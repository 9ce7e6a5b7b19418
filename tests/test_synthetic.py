import math
from dataclasses import replace

import pytest
import torch

from atm_sae.core import generator
from atm_sae.data.planted import (
    PlantedWorld,
    WorldBatches,
    WorldConfig,
    active_children,
    active_roots,
    draw_coefficients,
    unit_directions,
    zipf_rates,
)

TINY = WorldConfig(
    d_in=8, n_parents=3, children_per_parent=2, n_free=4, parent_rate=0.2, free_rate=0.1
)


# ---- pieces


def test_zipf_by_hand():
    assert torch.allclose(zipf_rates(3, 0.22, 1), torch.tensor([0.36, 0.18, 0.12]))
    assert torch.allclose(zipf_rates(4, 0.1, 0), torch.full((4,), 0.1))
    assert zipf_rates(0, 0.1, 1).shape == (0,)


@pytest.mark.parametrize("exponent", [0, 0.5, 1, 2])
def test_zipf_keeps_the_mean_and_falls(exponent):
    rates = zipf_rates(20, 0.02, exponent)
    assert abs(rates.mean() - 0.02) < 1e-6 and (rates.diff() <= 0).all()


def test_zipf_says_what_to_change():
    with pytest.raises(ValueError, match="rate of 1.67 > 1: lower the mean rate"):
        zipf_rates(20, 0.3, 1)


def test_directions_are_unit():
    assert torch.allclose(unit_directions(9, 5, generator(0)).norm(dim=1), torch.ones(9))


def test_roots_with_and_without_correlation_keep_their_rates():
    rates, group = torch.tensor([0.05, 0.3, 0.5, 0.8]), torch.tensor([0, 0, 1, 1])
    for rho in (0, 0.3, 0.9):
        assert (
            active_roots(100_000, rates, group, rho, generator(1)).float().mean(0) - rates
        ).abs().max() < 0.006


def test_correlation_by_hand():
    on = active_roots(
        200_000, torch.full((3,), 0.5), torch.tensor([0, 0, 1]), 0.5, generator(2)
    ).float()
    both = on.T @ on / len(on)
    assert (
        abs(both[0, 1] - 1 / 3) < 0.005 and abs(both[0, 2] - 1 / 4) < 0.005
    )  # 1/4 + arcsin(rho)/2 pi


def test_children_exclude_each_other_and_need_their_parent():
    parents = torch.rand(50_000, 3, generator=generator(0)) < 0.5
    on = active_children(parents, torch.tensor([0.5, 0.3, 0.2]), generator(1))
    assert (
        on.sum(2) == parents
    ).all()  # the shares add up to one: exactly one child for each active parent
    assert torch.allclose(on[parents].float().mean(0), torch.tensor([0.5, 0.3, 0.2]), atol=0.01)


def test_coefficients():
    on = torch.rand(1000, 10, generator=generator(0)) < 0.5
    a = draw_coefficients(on, 0.25, generator(1))
    assert torch.equal(a > 0, on) and a[on].min() >= 0.75 and a[on].max() <= 1.25
    assert torch.equal(draw_coefficients(on, 0, generator(1)), on.float())


# ---- the configuration


@pytest.mark.parametrize(
    "wrong",
    [
        dict(d_in=0),
        dict(parent_rate=1.5),
        dict(child_given_parent=-0.1),
        dict(zipf=-1),
        dict(spread=1),
        dict(noise=-1),
        dict(correlation=1),
        dict(group_size=0),
        dict(noise=math.nan),
    ],
)
def test_config_names_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=f"WorldConfig: {next(iter(wrong))} = "):
        WorldConfig(**wrong)


def test_config_needs_features():
    with pytest.raises(ValueError, match="needs features"):
        WorldConfig(n_parents=0, n_free=0)


# ---- the world


def test_default_world_by_hand():
    world = PlantedWorld()
    assert (world.n_features, world.d_in, world.directions.shape) == (160, 64, (160, 64))
    assert abs(world.rates.sum() - 3.9) < 1e-4  # 20*.06 + 20*.06*.75 + 60*.03
    x, a = world.sample(30_000, generator(0, "test"))
    assert abs((a > 0).sum(1).float().mean() - 3.9) < 0.05


def test_structure():
    world = PlantedWorld(TINY)
    assert world.n_features == 13
    assert world.parent.tolist() == [-1] * 3 + [0, 0, 1, 1, 2, 2] + [-1] * 4
    assert world.is_parent.tolist() == [True] * 3 + [False] * 10
    assert [world.children(i).tolist() for i in (0, 2, 3, 12)] == [[3, 4], [7, 8], [], []]


def test_samples_keep_the_promises():
    world = PlantedWorld(TINY)
    x, a = world.sample(40_000, generator(0))
    on = a > 0
    assert x.dtype == a.dtype == torch.float32 and (a >= 0).all()
    assert torch.allclose(x, a @ world.directions, atol=1e-5)
    assert (on.float().mean(0) - world.rates).abs().max() < 0.01
    for i in range(3):
        kids = on[:, world.children(i)]
        assert kids.sum(1).max() == 1 and not (kids.any(1) & ~on[:, i]).any()
        assert abs(kids.any(1)[on[:, i]].float().mean() - 0.75) < 0.02


def test_noise():
    world = PlantedWorld(WorldConfig(noise=0.5))
    x, a = world.sample(5_000, generator(0))
    assert abs((x - a @ world.directions).std() - 0.5) < 0.005


@pytest.mark.parametrize(
    "kind",
    [
        dict(children_per_parent=0),
        dict(n_parents=0),
        dict(n_free=0),
        dict(correlation=0.5),
        dict(n_parents=0, correlation=0.5),
    ],
)
def test_other_worlds(kind):
    world = PlantedWorld(WorldConfig(**kind))
    x, a = world.sample(64, generator(0))
    assert x.shape == (64, 64) and a.shape == (64, world.n_features) == (64, len(world.rates))
    assert bool(world.is_parent.any()) == (
        "n_parents" not in kind and "children_per_parent" not in kind
    )


def test_seeds_are_separate():
    a, b, c = (
        PlantedWorld(TINY),
        PlantedWorld(TINY),
        PlantedWorld(
            WorldConfig(
                seed=1,
                **{
                    k: getattr(TINY, k)
                    for k in ("d_in", "n_parents", "children_per_parent", "n_free")
                },
            )
        ),
    )
    assert torch.equal(a.directions, b.directions) and not torch.equal(a.directions, c.directions)
    assert torch.equal(a.sample(5, generator(0))[0], b.sample(5, generator(0))[0])
    assert torch.equal(a.sample(500, generator(0))[1] > 0, b.sample(500, generator(0))[1] > 0)


# ---- batches


def test_batches_resume_bit_exactly():
    one = WorldBatches(PlantedWorld(TINY), 16, seed=3)
    assert iter(one) is one and one.d_in == 8
    for _ in range(3):
        x = next(one)
    assert x.shape == (16, 8) and x.dtype == torch.float32
    state = one.state_dict()
    expected = [next(one) for _ in range(3)]
    two = WorldBatches(PlantedWorld(TINY), 16, seed=3)
    next(two)
    two.load_state_dict(state)
    assert all(torch.equal(next(two), e) for e in expected)
    one.load_state_dict(state)  # the saved state was not moved by drawing
    assert torch.equal(next(one), expected[0])


@pytest.mark.parametrize(
    "other, says",
    [
        (WorldBatches(PlantedWorld(replace(TINY, seed=1)), 16, 3), "world is '.*', not '.*'"),
        (WorldBatches(PlantedWorld(replace(TINY, noise=0.1)), 16, 3), "world is"),
        (WorldBatches(PlantedWorld(TINY), 8, 3), "batch_size is 16, not 8"),
        (WorldBatches(PlantedWorld(TINY), 16, 4), "seed is 3, not 4"),
    ],
)
def test_a_state_of_another_stream_is_refused(other, says):
    state = WorldBatches(PlantedWorld(TINY), 16, 3).state_dict()
    expected = next(WorldBatches(other.world, other.batch_size, other.seed))
    with pytest.raises(ValueError, match=f"the state of another reader: {says}"):
        other.load_state_dict(state)
    assert torch.equal(next(other), expected)  # and changes nothing


def test_a_state_without_settings_is_refused():
    state = {"generator": WorldBatches(PlantedWorld(TINY), 16, 3).state_dict()["generator"]}
    with pytest.raises(ValueError, match="world is None"):
        WorldBatches(PlantedWorld(TINY), 16, 3).load_state_dict(state)


def test_batches_differ_between_seeds():
    world = PlantedWorld(TINY)
    assert not torch.equal(next(WorldBatches(world, 4, 0)), next(WorldBatches(world, 4, 1)))
    assert torch.equal(next(WorldBatches(world, 4, 0)), next(WorldBatches(world, 4, 0)))


def test_batch_size_is_checked():
    with pytest.raises(ValueError, match="batch_size = 0"):
        WorldBatches(PlantedWorld(TINY), 0, 0)
