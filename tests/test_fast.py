"The sparse code path gives the loss, gradients, statistics and trainings of the dense one."

import pytest
import torch

from atm_sae.data.batches import data_batches
from atm_sae.data.planted import WorldConfig
from atm_sae.sae.atm import ATMConfig, contribution, make_masker
from atm_sae.ranks import ALONE
from small import sized

from atm_sae.sae.architectures import ARCHITECTURE_CLASSES, SAEConfig, Standard, nested_share
from atm_sae.sae.sae import SAE
from atm_sae.sae.sparse import ActiveSet, DenseSet, find_active_set, window_sums
from atm_sae.train.loop import TrainConfig, train
from atm_sae.train.loop import train_together
from atm_sae.train.runs import make_trainer, recipe

D, F, B = 24, 300, 50
SIZES = {name: sized(name, 4) for name in ARCHITECTURE_CLASSES} | dict(
    standard=dict(l1=0.1),
    tanh=dict(l1=0.1, penalty="tanh"),
    jumprelu=dict(target_l0=5.0, init_threshold=0.5),
    wide_window=dict(target_l0=5.0, init_threshold=0.5, bandwidth=1.0),  # half of all places
)
NAMES = dict(tanh="standard", wide_window="jumprelu")


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def sparse_sae(architecture):
    "An SAE of which some 2% of the latents fire on `samples()`, with biases that are not zero."
    sae = SAE(
        SAEConfig(
            D,
            F,
            NAMES.get(architecture, architecture),
            seed=2,
            **SIZES[architecture],
        )
    )
    sae.b_dec.data = 0.05 * torch.randn(D, generator=gen(1))
    by_sign = isinstance(sae.architecture, Standard)  # active where the pre-activation is positive
    sae.b_enc.data = 0.02 * torch.randn(F, generator=gen(2)) - (0.4 if by_sign else 0)
    return sae


def samples(seed=0):
    return 0.2 * torch.randn(B, D, generator=gen(seed))


@pytest.mark.parametrize("name", ["W_enc", "W_dec"])
def test_the_gradient_of_a_frozen_weight_is_not_computed(name, monkeypatch):
    sae, calls, computed = sparse_sae("topk"), [], ActiveSet.row_gradient
    getattr(sae, name).requires_grad_(False)
    monkeypatch.setattr(ActiveSet, "row_gradient", lambda *args: calls.append(1) or computed(*args))
    loss = sae.loss(samples(), fast=True)
    assert isinstance(loss.active, ActiveSet)
    loss.total.backward()
    assert getattr(sae, name).grad is None and len(calls) == 1


def mask(per):
    if per is None:
        return None
    if per == "rescaled":
        return mask("sample") / torch.linspace(0.4, 0.8, F)
    return torch.rand((F,) if per == "batch" else (B, F), generator=gen(3)) < 0.6


def both(architecture, per):
    "(loss, gradients) dense and fast."
    out = []
    for fast in (False, True):
        sae = sparse_sae(architecture)
        loss = sae.loss(samples(), mask(per), 0.7, torch.tensor([3, 5, 299]), fast)
        loss.total.backward()
        out.append((loss, {n: p.grad for n, p in sae.named_parameters()}))
    return out


@pytest.mark.parametrize("per", [None, "batch", "sample", "rescaled"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURE_CLASSES, *NAMES])
def test_loss_and_gradients_equal_the_dense_ones(architecture, per):
    (dense, d), (fast, f) = both(architecture, per)
    assert isinstance(dense.active, DenseSet) and isinstance(fast.active, ActiveSet)
    for part in ("total", "reconstruction", "penalty", "auxiliary"):
        assert getattr(fast, part).item() == pytest.approx(getattr(dense, part).item(), rel=1e-5), (
            part
        )
    assert torch.allclose(fast.x_hat, dense.x_hat, atol=1e-5)
    for n in d:
        assert d[n].abs().max() > 0, n
        assert torch.allclose(f[n], d[n], rtol=0, atol=1e-5 * d[n].abs().max().item()), n
    rows, cols = fast.active.rows, fast.active.cols
    assert (
        torch.allclose(dense.z[rows, cols], fast.z, atol=1e-6)
        and dense.z.count_nonzero() == fast.z.count_nonzero() > 0
    )
    fires = fast.h != 0
    assert torch.allclose(dense.h.grad[rows, cols][fires], fast.h.grad[fires], atol=1e-6)


@pytest.mark.parametrize("per", [None, "batch", "sample"])
@pytest.mark.parametrize("architecture", ARCHITECTURE_CLASSES)
def test_the_masker_sees_the_same(architecture, per):
    maskers = []
    for loss, _ in both(architecture, per):
        maskers.append(make_masker(ATMConfig(per=per or "batch"), F, 10))
        W_dec = sparse_sae(architecture).W_dec
        maskers[-1].observe(
            loss.z,
            contribution(
                loss.h,
                loss.h.grad,
                W_dec,
                loss.active,
                nested_share(sparse_sae(architecture).architecture),
            ),
            mask(per),
            loss.active,
        )
    for n, dense in maskers[0].state_dict().items():
        assert torch.allclose(
            torch.as_tensor(dense), torch.as_tensor(maskers[1].state_dict()[n]), atol=1e-6
        ), n
    assert maskers[0].contribution.abs().max() > 0


def chosen(config, pre):
    "The active set of these pre-activations."
    sae = SAE(config)
    return find_active_set(pre, lambda pre: sae.architecture.places(pre, sae, ALONE))


def test_places_by_hand():
    pre = torch.zeros(2, 40)
    pre[0, [3, 7]], pre[1, [0, 39]] = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 5.0])
    found = chosen(SAEConfig(2, 40, "topk", k=2), pre)
    assert found.rows.tolist() == [0, 0, 1, 1]
    assert sorted(found.cols[:2].tolist()) == [3, 7] and sorted(found.cols[2:].tolist()) == [0, 39]
    assert found.at(torch.arange(40)).tolist() == found.cols.tolist()
    mean = found.mean(torch.tensor([1.0, 1.0, 1.0, 3.0]))
    assert mean[found.cols[3]] == 1.5  # 3 over two samples
    assert chosen(SAEConfig(2, 40, "batchtopk", k=1), pre).cols.tolist() == [3, 39]


def test_pieces_of_a_dictionary_by_hand():
    "Latents 0, 2 and 3 of two samples: the second has none before 2, and neither any from 4 on."
    active, W = (
        ActiveSet(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 3]), 2, 5),
        torch.tensor([[1.0], [10.0], [100.0], [1000.0], [9.0]]),
    )
    h = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    pieces = {
        (a, b): active.decode(h, W, a, b) for a, b in [(0, 2), (2, 3), (2, 5), (3, 3), (4, 5)]
    }
    assert {k: p.flatten().tolist() for k, p in pieces.items()} == {
        (0, 2): [1, 0],
        (2, 3): [200, 0],
        (2, 5): [200, 3000],
        (3, 3): [0, 0],
        (4, 5): [0, 0],
    }
    sum(p.sum() for p in pieces.values()).backward()
    assert h.grad.tolist() == [
        1,
        2 * 100,
        1000,
    ]  # the piece from 2 to 3 lies in the one from 2 to 5
    full = torch.tensor([[1.0, 0, 2, 0, 0], [0, 0, 0, 3, 0]])
    for (a, b), p in pieces.items():
        assert torch.equal(DenseSet(2).decode(full, W, a, b), p)


def test_dense_where_skipping_does_not_pay():
    x = samples()
    crowded = SAE(SAEConfig(D, F, "standard", l1=0.1))  # about half of all places fire
    assert isinstance(crowded.loss(x, fast=True).active, DenseSet)
    assert isinstance(SAE(SAEConfig(D, F, "topk", k=F // 4)).loss(x, fast=True).active, DenseSet)
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(sparse_sae("topk").loss(x, fast=True).active, DenseSet)


@pytest.mark.parametrize(
    "architecture",
    [name for name, kind in ARCHITECTURE_CLASSES.items() if not issubclass(kind, Standard)],
)
def test_sparse_from_the_first_step_at_the_width_of_a_real_model(architecture):
    "JumpReLU's window holds every positive pre-activation here, and its step is still sparse."
    size = dict(target_l0=32.0) if architecture == "jumprelu" else dict(k=32)
    sae = SAE(SAEConfig(576, 2048, architecture, **size))
    x = torch.nn.functional.normalize(torch.randn(8, 576, generator=gen()))
    loss = sae.loss(x, fast=True)
    assert isinstance(loss.active, ActiveSet)
    if architecture == "jumprelu":
        assert loss.active.window.float().mean() > 0.4


@pytest.mark.parametrize("mask", ["", "+atm"])
@pytest.mark.parametrize("architecture", ARCHITECTURE_CLASSES)
def test_a_usual_training_becomes_sparse(architecture, mask, monkeypatch):
    sets, loss = [], SAE.loss

    def watched(self, *arguments):
        result = loss(self, *arguments)
        sets.append(type(result.active))
        return result

    monkeypatch.setattr(SAE, "loss", watched)
    world = WorldConfig()
    method = "atm" if architecture + mask == "standard+atm" else architecture + mask
    spec = recipe(method, world, world.d_in, 200, l0=4, steps=60, batch_size=64)
    trainer = make_trainer(spec, data_batches(world, 64, 0), None, torch.device("cpu"))
    assert train_together([trainer], progress=False) == [None]
    assert set(sets[-20:]) == {ActiveSet}


def test_sums_over_a_window_in_pieces():
    window = torch.rand(5, 7, generator=gen()) < 0.5
    samples, rows = torch.randn(5, 3, generator=gen(1)), torch.randn(7, 3, generator=gen(2))
    expected = (window * (samples @ rows.T)).sum(0)
    for chunk in (1, 3, 7, 512):
        assert torch.allclose(window_sums(window, samples, rows, chunk), expected, atol=1e-6)


def test_nothing_fires():
    sae = sparse_sae("standard")
    sae.b_enc.data.fill_(-9.0)
    loss = sae.loss(samples(), fast=True)
    loss.total.backward()
    assert len(loss.z) == 0 and loss.penalty == 0 and sae.W_enc.grad.abs().max() == 0
    assert torch.allclose(loss.x_hat, sae.b_dec.expand(B, D))


class Same:
    "Batches that repeat every five steps."

    def __init__(self):
        self.i = 0

    def __next__(self):
        self.i += 1
        return samples(self.i % 5)


def trained(architecture, **settings):
    sae = sparse_sae(architecture)
    masker = make_masker(ATMConfig(warmup=0.2), F, 40)
    history = train(
        sae,
        Same(),
        TrainConfig(40, B, lr=1e-3, log_every=10, dead_after=0.2, **settings),
        masker,
        progress=False,
    )
    return sae, history


@pytest.mark.parametrize("architecture", ARCHITECTURE_CLASSES)
def test_a_training_ends_alike(architecture, monkeypatch):
    sets, loss = [], SAE.loss

    def watched(self, *arguments):
        result = loss(self, *arguments)
        sets.append(type(result.active))
        return result

    monkeypatch.setattr(SAE, "loss", watched)
    dense, slow = trained(architecture, fast=False)
    assert set(sets) == {DenseSet}
    fast, quick = trained(architecture)
    assert ActiveSet in sets
    assert torch.allclose(fast.W_dec, dense.W_dec, atol=1e-3) and torch.allclose(
        fast.W_enc, dense.W_enc, atol=1e-3
    )
    assert slow.table.loss.values == pytest.approx(quick.table.loss.values, rel=1e-3)
    assert slow.table.mask_rate.values == pytest.approx(quick.table.mask_rate.values, abs=0.02)


@pytest.mark.parametrize("architecture", ARCHITECTURE_CLASSES)
def test_bf16_trains_and_keeps_its_weights_in_fp32(architecture):
    sae, history = trained(architecture, precision="bf16")
    assert {p.dtype for p in sae.parameters()} == {torch.float32}
    assert history.table.loss.iloc[-1] < history.table.loss.iloc[0] * 1.05
    exact = trained(architecture)[1].table
    assert history.table.reconstruction.values == pytest.approx(
        exact.reconstruction.values, rel=0.05
    )


def test_precision_is_one_of_three():
    with pytest.raises(ValueError, match="precision must be 'auto', 'fp32' or 'bf16', not 'half'"):
        TrainConfig(1, precision="half")


def test_the_encoder_lies_in_memory_as_its_gradient_does():
    sae = sparse_sae("topk")
    sae.loss(samples(), fast=True).total.backward()
    assert sae.W_enc.stride() == sae.W_enc.grad.stride() == (1, D)
