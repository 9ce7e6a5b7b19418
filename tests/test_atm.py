"The masker's equations against numbers worked by hand; the free contribution; recovery; messages."

import math

import pytest
import torch

from atm_sae.sae.atm import (
    COMBINE,
    EFFECTS,
    ATMConfig,
    ATMMasker,
    UniformMasker,
    contribution,
    ema_,
    frequency,
    importance,
    importance_threshold,
    magnitude,
    make_masker,
    masking_probability,
    seen_contribution,
)
from small import sized

from atm_sae.sae.architectures import ARCHITECTURE_CLASSES, SAEConfig, nested_share
from atm_sae.sae.sae import SAE
from atm_sae.sae.sparse import DenseSet


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def make(d_sae, steps=100, **settings):
    "A masker without a warm-up."
    return ATMMasker(d_sae, ATMConfig(**dict(warmup=0) | settings), steps)


def uniform(d_sae, steps=100, rates=(), **settings):
    "A control without a warm-up."
    return UniformMasker(d_sae, ATMConfig(**dict(warmup=0) | settings), steps, rates)


def test_ema_by_hand():
    a = torch.zeros(2)
    ema_(a, torch.tensor([2.0, 2.0]), 0.9)
    assert torch.allclose(a, torch.tensor([0.2, 0.2]))
    ema_(a, torch.tensor([2.0, 2.0]), 0.9, seen=torch.tensor([1.0, 0.0]))
    assert torch.allclose(a, torch.tensor([0.38, 0.2]))


def test_statistics_by_hand():
    z = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    assert magnitude(z, DenseSet(4)).tolist() == [1, 0.5] and frequency(
        z, DenseSet(4)
    ).tolist() == [0.5, 0.25]


def test_contribution_by_hand():
    h = torch.tensor([[2.0, 1.0]], requires_grad=True)
    (torch.tensor([[3.0, 1.0]]) - h @ torch.eye(2)).square().sum().backward()
    assert contribution(h.detach(), h.grad, torch.eye(2), DenseSet(1)).tolist() == [[8, 1]]


def test_effects_by_hand():
    """The sample above: residual (1, 0), so the first-order gain is 2 * 2 * 1 and 0.

    The squares are 4 and 1. The second latent lies in half of the nested dictionaries."""
    h, grad, share = (
        torch.tensor([[2.0, 1.0]]),
        torch.tensor([[-2.0, 0.0]]),
        torch.tensor([1.0, 0.5]),
    )
    found = {
        e: contribution(h, grad, torch.eye(2), DenseSet(1), effect=e).tolist() for e in EFFECTS
    }
    assert found == {"exact": [[8, 1]], "first-order": [[4, 0]], "norm": [[4, 1]]}
    shared = {
        e: contribution(h, grad, torch.eye(2), DenseSet(1), share, e).tolist() for e in EFFECTS
    }
    assert shared == {"exact": [[8, 0.5]], "first-order": [[4, 0]], "norm": [[4, 0.5]]}


@pytest.mark.parametrize("architecture", ARCHITECTURE_CLASSES)
@pytest.mark.parametrize("per", ["none", "batch", "sample"])
def test_contribution_is_leave_one_out(architecture, per):
    "For every architecture and mask, against really removing each latent."
    sae = SAE(
        SAEConfig(
            8,
            24,
            architecture,
            **sized(architecture, 4),
            seed=3,
        )
    ).double()
    x = torch.randn(32, 8, generator=gen()).double()
    shape = dict(none=None, batch=(24,), sample=(32, 24))[per]
    loss = sae.loss(
        x, None if shape is None else torch.rand(shape, generator=gen(1)) < 0.7, sparsity=0.5
    )
    loss.total.backward()
    free = contribution(loss.h, loss.h.grad, sae.W_dec, loss.active, nested_share(sae.architecture))

    def nested_error(h):
        parts = sae.decode_nested(h, loss.active)
        return torch.stack([(x - part).square().sum(1) for part in parts]).mean(0)

    with torch.no_grad():
        for i in range(24):
            h = loss.h.clone()
            h[:, i] = 0
            direct = nested_error(h) - nested_error(loss.h)
            assert torch.allclose(free[:, i], direct, atol=1e-5)


def test_importance_by_hand():
    m, f, c = torch.tensor([3.0, 1.0]), torch.tensor([0.75, 0.25]), torch.tensor([8.0, -1.0])
    # over their means 2, .5 and 4 (the negative one counts as 0): (1.5, .5), (1.5, .5), (2, 0)
    expect = dict(
        geometric=[4.5 ** (1 / 3), 0],
        product=[4.5, 0],
        sum=[5 / 3, 1 / 3],
        magnitude=[1.5, 0.5],
        frequency=[1.5, 0.5],
        contribution=[2, 0],
    )
    assert set(expect) == set(COMBINE)
    for how, value in expect.items():
        assert torch.allclose(importance(m, f, c, how), torch.tensor(value).float()), how


def test_importance_of_nothing_is_zero_and_masks_nothing():
    masker = make(3)
    assert masker.importance().tolist() == [0, 0, 0] and masker.mask_probability().tolist() == [
        0,
        0,
        0,
    ]


def test_threshold_by_hand():
    four = torch.tensor([0.0, 1.0, 1.0, 2.0])
    assert importance_threshold(four) == 1
    assert importance_threshold(four, 1.0).item() == pytest.approx(1 + math.sqrt(0.5))


def test_probability_by_hand():
    p = masking_probability(torch.tensor([0.0, 0.5, 1.0, 2.0]), torch.tensor(1.0), r=2.0)
    assert torch.allclose(p, torch.tensor([1 - math.exp(-2), 1 - math.exp(-1), 0, 0]))


@pytest.mark.parametrize("theta", [0.0, -0.3])
def test_no_mask_below_a_threshold_that_is_not_positive(theta):
    assert masking_probability(torch.tensor([0.0, 1.0]), torch.tensor(theta)).tolist() == [0, 0]


def test_first_observation_needs_no_warmth():
    z = torch.rand(16, 5, generator=gen())
    masker = make(5, decay=0.999)
    masker.observe(z, z.square())
    assert torch.allclose(
        masker.importance(), importance(z.mean(0), z.sign().mean(0), z.square().mean(0)), atol=1e-3
    )


def test_hidden_contribution_waits():
    masker, ones = make(2, decay=0.5), torch.ones(1, 2)
    masker.observe(ones, ones)
    for _ in range(20):
        masker.observe(ones, torch.tensor([[1.0, 0.0]]), torch.tensor([True, False]))
    assert torch.allclose(masker.contribution / masker.weight, torch.ones(2)) and torch.allclose(
        masker.importance(), torch.ones(2)
    )


def test_seen_contribution_by_hand():
    c = torch.tensor([3.0, 0.0])
    mean, seen = seen_contribution(c, torch.tensor([[True, False], [False, False]]))
    assert mean.tolist() == [6, 0] and seen.tolist() == [1, 0]
    mean, seen = seen_contribution(c, torch.tensor([True, False]))
    assert mean.tolist() == [3, 0] and seen.tolist() == [1, 0]


def follow(careful):
    "Importance over threshold of a latent that is silent for 100 steps and useful from then on."
    masker, g, path = make(4, decay=0.95, r=3.0), gen(), []
    for t in range(800):
        z = torch.tensor([[1.2, 1.1, float(t >= 100), 0.1]])
        keep = masker.sample(g)
        h = z * keep
        masker.observe(*((z, h.square(), keep) if careful else (h, h.square())))
        path.append((masker.importance()[2] / masker.threshold()).item())
    return path


def test_a_useful_latent_recovers_and_the_naive_masker_starves_it():
    careful, naive = follow(True), follow(False)
    assert max(careful[50:99]) == 0  # silent, hence unimportant
    assert min(careful[300:]) > 1  # recovered within 200 steps, for good
    assert max(naive[300:]) < 0.6  # starved


def test_a_masked_useful_latent_recovers_in_training():
    "Hide one useful latent for many steps of real training; once it may speak it is spared again."
    torch.manual_seed(0)
    sae = SAE(SAEConfig(4, 4, l1=0.01))
    sae.W_enc.data, sae.W_dec.data = torch.eye(4), torch.eye(4)
    masker, optimiser, g = (
        make(4, decay=0.9, r=3.0),
        torch.optim.Adam(sae.parameters(), lr=1e-4),
        gen(),
    )
    for t in range(150):
        x = (
            torch.rand(64, 4, generator=g)
            * (torch.rand(64, 4, generator=g) < 0.5)
            * torch.tensor([1.0, 1.0, 1.0, 0.1])
        )
        keep = torch.tensor([t >= 100 or t == 0, True, True, True])
        loss = sae.loss(x, keep)
        optimiser.zero_grad()
        loss.total.backward()
        masker.observe(loss.z, contribution(loss.h, loss.h.grad, sae.W_dec, loss.active), keep)
        optimiser.step()
    assert masker.mask_probability()[0] == 0 and masker.importance()[0] > 1


def test_sampling_rate_warmup_and_shape():
    masker, g = make(3, steps=100, warmup=0.02), gen()
    z = torch.tensor([[2.0, 1.0, 0.0]])
    masker.observe(z, z.square())
    assert masker.warmup == 2 and masker.sample(g).all()  # one step seen, and the warm-up is two
    masker.observe(z, z.square())
    rate = 1 - torch.stack([masker.sample(g) for _ in range(4000)]).float().mean(0)
    assert torch.allclose(rate, masker.mask_probability(), atol=0.03) and rate[0] == 0
    each = make(3, per="sample")
    assert each.sample(g, 7).shape == (7, 3)
    with pytest.raises(ValueError, match="needs their number"):
        each.sample(g)


def at(p, **options):
    "A masker whose probabilities are `p`, whatever it sees."
    masker = make(len(p), **options)
    masker.mask_probability = lambda: torch.tensor(p)
    return masker


P, DRAWS = [0.0, 0.1, 0.4, 0.4, 0.9], 20_000
TOLERANCE = (
    5 * (torch.tensor(P) * (1 - torch.tensor(P)) / DRAWS).sqrt()
)  # five standard errors of a share


@pytest.mark.parametrize("draw", ["independent", "nested"])
def test_either_draw_hides_the_same_share_on_average(draw):
    hidden = ~at(P, draw=draw, per="sample").sample(gen(), DRAWS)
    assert ((hidden.float().mean(0) - torch.tensor(P)).abs() <= TOLERANCE).all()
    assert hidden.sum(1).unique().tolist() == (
        [0, 1, 3, 4] if draw == "nested" else [0, 1, 2, 3, 4]
    )


def test_one_number_decides_over_a_nested_mask():
    "u below .1, .4, .9, or above: there are four masks."
    masks = {tuple(at(P, draw="nested").sample(gen(s)).int().tolist()) for s in range(60)}
    assert masks == {(1, 0, 0, 0, 0), (1, 1, 0, 0, 0), (1, 1, 1, 1, 0), (1, 1, 1, 1, 1)}


def test_a_nested_draw_hides_the_least_important():
    masker, z = (
        make(20, draw="nested", per="sample"),
        torch.rand(64, 20, generator=gen()) * torch.rand(20, generator=gen(1)),
    )
    masker.observe(z, z.square())
    kept = masker.sample(gen(), 200)[:, masker.importance().argsort()]
    assert (kept[:, 1:] >= kept[:, :-1]).all() and len(kept.sum(1).unique()) > 5


@pytest.mark.parametrize("draw", ["independent", "nested"])
def test_rescaled_latents_keep_their_mean(draw):
    "Dropout's factor, keep / (1 - p), has mean 1 and variance p / (1 - p)."
    masker = at(P, draw=draw, per="sample", rescale=True)
    sae, x = SAE(SAEConfig(4, 5, seed=1)), torch.randn(1, 4, generator=gen()).expand(DRAWS, 4)
    loss = sae.loss(x, masker.factor(masker.sample(gen(1), DRAWS)))
    p = torch.tensor(P)
    assert (loss.z[0] * p > 0).sum() > 1  # some of those that fire are hidden at times
    assert (
        (loss.h.mean(0) - loss.z[0]).abs() <= 5 * loss.z[0] * (p / (1 - p) / DRAWS).sqrt() + 1e-5
    ).all()


def test_factor_by_hand():
    keep = torch.tensor([True, True, True, False, False])
    assert torch.allclose(
        at(P, rescale=True).factor(keep), torch.tensor([1, 1 / 0.9, 1 / 0.6, 0, 0])
    )
    assert at(P).factor(keep) is keep
    assert (
        at(P, rescale=True, warmup=0.01).factor(keep[:3].repeat(2)[:5]).tolist() == [1] * 5
    )  # nothing is hidden yet, and nothing enlarged


def test_a_rescaled_mask_is_finite_where_all_is_hidden():
    "At r = 40 the probability of a latent that never fires is 1 in fp32."
    masker = make(3, r=40, rescale=True)
    masker.observe(z := torch.tensor([[3.0, 1.0, 0.0]]), z.square())
    p, keep = masker.current_probability(), masker.sample(gen())
    assert (
        p[2] == 1
        and not keep[2]
        and masker.factor(keep)[2] == 0
        and masker.factor(keep).isfinite().all()
    )


def test_the_mask_fades_to_nothing():
    "Over the last 10 of 30 steps, after a warm-up of 5."
    masker = make(3, steps=30, warmup=5 / 30, anneal=10 / 30)
    z = torch.tensor([[3.0, 1.0, 0.0]])
    masker.observe(z, z.square())
    full = masking_probability(masker.importance(), masker.threshold())
    assert full.max() > 0
    for step, share in {4: 0, 5: 1, 20: 1, 21: 0.9, 25: 0.5, 29: 0.1}.items():
        masker.step = step
        now = masking_probability(masker.importance(), masker.threshold())
        assert torch.allclose(masker.current_probability(), share * now), step
    for step in (30, 31):
        masker.step = step
        assert masker.current_probability().tolist() == [0] * 3 and masker.sample(gen()).all()


def test_without_annealing_the_mask_stays():
    masker, z = make_masker(ATMConfig(), 3, 2), torch.tensor([[3.0, 1.0, 0.0]])
    for _ in range(5):
        masker.observe(z, z.square())
    assert masker.current_probability().max() > 0


def test_sampling_is_reproducible():
    masker = make(50)
    masker.observe(z := torch.rand(8, 50, generator=gen(0)), z)
    assert torch.equal(masker.sample(gen(1)), masker.sample(gen(1))) and not torch.equal(
        masker.sample(gen(1)), masker.sample(gen(2))
    )


def test_dropout_masks_at_the_rate_of_the_step_whatever_the_importance():
    z, atm, control = (
        torch.tensor([[9.0, 1.0, 0.0, 0.0]]),
        make(4),
        uniform(4, rates=[0.0, 0.5, 0.25]),
    )
    found = [control.mask_probability().tolist()]
    for _ in range(3):
        for masker in (atm, control):
            masker.observe(z, z)
        found.append(control.mask_probability().tolist())
    assert found == [[0.0] * 4, [0.5] * 4, [0.25] * 4, [0.25] * 4]
    assert torch.equal(control.importance(), atm.importance())


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_a_dropout_mask_has_no_order_to_nest_by(per):
    "The control of a nested mask draws each latent by itself, and not all or none."
    config = ATMConfig(control="dropout", draw="nested", per=per, warmup=0)
    masker = make_masker(config, 400, 10, rates=[0.5])
    kept = masker.sample(gen(), 50 if per == "sample" else None).float().mean(-1)
    assert ((0.35 < kept) & (kept < 0.65)).all()


def test_a_dropout_mask_does_not_fade_twice():
    "The rates are those of a twin that fades itself."
    control = uniform(4, steps=2, rates=[0.5, 0.25], anneal=1.0)
    control.step = 1
    assert control.current_probability().tolist() == [0.25] * 4


@pytest.mark.parametrize(
    "control, text",
    [
        ("dropout", "the dropout control needs the mask rate of each step"),
        ("activity", "the activity control needs the mask rate of each step"),
        ("shuffled", "the shuffled control needs the seed of its permutation"),
    ],
)
def test_a_control_needs_rates_or_a_seed(control, text):
    with pytest.raises(ValueError, match=text):
        make_masker(ATMConfig(control=control), 4, 10)


class Given(ATMMasker):
    "Mask probabilities and mean magnitudes of four latents, by hand."

    def __init__(self, **settings):
        super().__init__(4, ATMConfig(warmup=0, **settings), steps=10)
        self.magnitude.copy_(torch.tensor([4.0, 2.0, 1.0, 1.0]))

    def mask_probability(self):
        return torch.tensor([0.0, 0.25, 0.5, 1.0])


def test_the_removed_activity_by_hand():
    "Shares 0.5, 0.25, 0.125 and 0.125 of the mass: 0.0625 + 0.0625 + 0.125 of it is removed."
    assert Given().masked_activity() == 0.25
    assert make(4).masked_activity() == 0  # nothing was observed
    waiting = Given()
    waiting.warmup = 5
    assert waiting.masked_activity() == 0


def test_the_activity_control_removes_the_same_mass_as_its_twin():
    "Uniform at 0.25: the same expected mass, but 25% of the latents and not 44%."
    twin = Given()
    rate = twin.masked_activity().item()
    control = make_masker(ATMConfig(control="activity", warmup=0), 4, 10, rates=[rate])
    control.magnitude.copy_(twin.magnitude)
    assert control.masked_activity() == twin.masked_activity()
    assert control.mask_probability().mean() == 0.25
    assert twin.mask_probability().mean() == 0.4375
    draw = gen()
    masks = torch.stack([control.sample(draw) for _ in range(4000)]).float()
    assert (masks @ control.magnitude / 8).mean() == pytest.approx(0.75, abs=0.02)


def test_shuffled_has_atms_probabilities_in_another_order():
    def shuffled(seed, **settings):
        config = ATMConfig(control="shuffled", warmup=0, **settings)
        return make_masker(config, 4, 10, seed=seed)

    masker, atm = shuffled(1), make(4, steps=10)
    for step in range(3):
        z = torch.tensor([[9.0, 3.0, 1.0, 0.0]]) * (1 + step)
        for each in (masker, atm):
            each.observe(z, z)
        p, own = masker.mask_probability(), atm.mask_probability()
        assert p.tolist() == own[masker.order].tolist() and p.tolist() != own.tolist()
        assert sorted(p.tolist()) == sorted(own.tolist())
    assert torch.equal(masker.order, shuffled(1).order)  # the same at every step and in every run
    orders = {tuple(shuffled(seed).order.tolist()) for seed in range(20)}
    assert len(orders) > 5 and all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert shuffled(1).settings() != shuffled(2).settings()


@pytest.mark.parametrize("control", ["", "dropout", "activity", "shuffled"])
def test_rescale_keeps_the_expectation_of_each_latent(control):
    "(1 - p) times the factor of a kept latent is 1."
    config = ATMConfig(control=control, rescale=True, warmup=0)
    masker = make_masker(config, 4, 10, rates=[0.25], seed=1)
    z = torch.tensor([[9.0, 3.0, 1.0, 0.5]])
    masker.observe(z, z)
    factor = masker.factor(torch.ones(4, dtype=torch.bool))
    assert masker.mask_probability().max() > 0
    assert torch.allclose((1 - masker.mask_probability()) * factor, torch.ones(4))


def test_settings_name_what_the_masks_depend_on():
    "Two controls with other rates are not the same run."
    a, b = (uniform(4, rates=[rate]).settings() for rate in (0.5, 0.25))
    assert a != b and a["steps"] == 100 and a["config"] == b["config"]


def test_state_round_trip():
    a, b = make(6), make(6)
    for s in range(5):
        z = torch.rand(8, 6, generator=gen(s))
        a.observe(z, z.square(), torch.rand(6, generator=gen(s)) < 0.5)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.importance(), b.importance()) and a.step == b.step


def test_make_masker():
    assert make_masker(None, 4, 100) is None
    assert make_masker(ATMConfig(warmup=0.3, per="sample"), 4, 100).warmup == 30
    masker = make_masker(ATMConfig(effect="norm", draw="nested", rescale=True, anneal=0.25), 4, 100)
    assert (masker.anneal, masker.steps, masker.config.effect) == (25, 100, "norm")
    assert make_masker(ATMConfig(control="dropout"), 4, 100, rates=[0.3]).rates == [0.3]
    assert type(make_masker(ATMConfig(), 4, 100)) is ATMMasker


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(combine="mean"), "unknown combine 'mean': choose one of geometric"),
        (dict(per="token"), "'batch' or 'sample'"),
        (
            dict(effect="second-order"),
            "unknown effect 'second-order': choose one of exact, first-order, norm",
        ),
        (dict(draw="sorted"), "draw must be 'independent' or 'nested', not 'sorted'"),
        (dict(anneal=1.5), "anneal is a share of the steps, 0 to 1, not 1.5"),
        (dict(decay=1.0), "decay must lie in"),
        (dict(r=-1.0), "r must not be negative"),
        (dict(warmup=2.0), "warmup is a share"),
    ],
)
def test_config_refuses(settings, text):
    with pytest.raises(ValueError, match=text):
        ATMConfig(**settings)


def test_masker_refuses_another_width():
    with pytest.raises(ValueError, match="follows 4 latents, not 5"):
        make(4).observe(torch.ones(2, 5), torch.ones(2, 5))
