"Architectures, losses and gradients by hand; saving, loading, folding; messages."

import copy
import json
import math
import re
from types import SimpleNamespace
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file, save_file

from atm_sae import methods
from atm_sae.sae.losses import (
    auxk_loss,
    batch_topk,
    geometric_median,
    jump_relu,
    l0_penalty,
    l1_penalty,
    project_rows_,
    squared_error,
    step,
    tanh_count,
    topk,
)
from small import FOLLOWING, sized, small

from torch.nn.functional import normalize
from atm_sae.sae.architectures import (
    ARCHITECTURE_CLASSES,
    MaskedBatch,
    SAEConfig,
    nearest_rows,
    nested_share,
)
from atm_sae.data.planted import WorldConfig
from atm_sae.sae.formats import export_sae, from_pretrained
from atm_sae.train.runs import get_run, recipe
from atm_sae.sae.sae import SAE, calibrate_l0, gate_latents, random_sae
from atm_sae.sae.sparse import ActiveSet, DenseSet


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def config(architecture, **more):
    return SAEConfig(6, 12, architecture, seed=1, **sized(architecture, 2) | more)


def identity(architecture="standard", **more):
    "Two latents in two dimensions, encoder and decoder the identity, b_dec = (1, 0)."
    sae = SAE(SAEConfig(2, 2, architecture, **more))
    sae.W_enc.data, sae.W_dec.data, sae.b_dec.data = (
        torch.eye(2),
        torch.eye(2),
        torch.tensor([1.0, 0.0]),
    )
    return sae


# ---- configuration


@pytest.mark.parametrize(
    "settings, text",
    [
        (
            dict(architecture="tpok"),
            "unknown architecture 'tpok': choose one of standard, gated, topk, batchtopk, ",
        ),
        (dict(architecture="topk"), "topk needs k"),
        (dict(architecture="batchtopk", k=99), "1 <= k <= 12, not 99"),
        (dict(target_l0=0), "target_l0 must lie between 0 and d_sae = 12"),
        (dict(target_l0=12.0), "target_l0"),
        (dict(architecture="matryoshka"), "matryoshka needs k"),
        (dict(penalty="l2"), "penalty must be 'l1' or 'tanh', not 'l2'"),
        (dict(outlier_ratio=1), "outlier_ratio must be above 1, or None for no rule, not 1"),
        (dict(outlier_ratio=math.nan), "outlier_ratio must be above 1"),
        *(
            (
                dict(architecture="matryoshka", k=1, prefixes=bad),
                "growing shares of the dictionary and end with 1",
            )
            for bad in [(0.5,), (0, 1), (0.5, 0.25, 1), (0.5, 0.5, 1), (0.5, 1, 2)]
        ),
    ],
)
def test_config_refuses(settings, text):
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        SAEConfig(6, 12, **settings)


def test_config_refuses_sizes():
    with pytest.raises(ValueError, match="must be positive"):
        SAEConfig(0, 12)


def ends(d_sae, architecture="matryoshka", **more):
    config = SAEConfig(6, d_sae, architecture, k=1, **more)
    return ARCHITECTURE_CLASSES[architecture](config).ends


def test_ends_by_hand():
    assert ends(40) == (2, 5, 10, 20, 40)  # 2.5 is rounded to the even 2
    assert ends(12) == (1, 2, 3, 6, 12)
    assert ends(8, prefixes=[0.7, 1]) == (6, 8)
    assert {ends(8, name) for name in ARCHITECTURE_CLASSES if name != "matryoshka"} == {(8,)}


@pytest.mark.parametrize(
    "d_sae, more, found",
    [
        (8, {}, "(0, 1, 2, 4, 8)"),
        (9, {}, "(1, 1, 2, 4, 9)"),
        (100, dict(prefixes=(0.5, 0.504, 1)), "(50, 50, 100)"),
        (100, dict(prefixes=(0.5, 0.996, 1)), "(50, 100, 100)"),
    ],
)
def test_rounded_prefixes_must_grow(d_sae, more, found):
    with pytest.raises(ValueError, match=re.escape(f"d_sae = {d_sae}")) as error:
        ends(d_sae, **more)
    assert f"dictionaries of {found} latents, which must grow" in str(error.value)


def test_prefixes_of_a_list_are_the_same_config():
    "JSON has no tuples."
    assert hash(SAEConfig(6, 8, prefixes=[0.5, 1])) == hash(
        SAEConfig(6, 8, prefixes=(0.5, 1))
    ) and SAEConfig(6, 8, prefixes=[0.5, 1]).prefixes == (0.5, 1)


def test_same_seed_same_weights():
    a, b, c = SAE(config("standard")), SAE(config("topk")), SAE(SAEConfig(6, 12, seed=2))
    assert torch.equal(a.W_dec, b.W_dec) and not torch.equal(a.W_dec, c.W_dec)
    assert torch.equal(a.W_enc, a.W_dec.T) and torch.allclose(a.W_dec.norm(dim=1), torch.ones(12))


@pytest.mark.parametrize("architecture", ARCHITECTURE_CLASSES)
def test_the_table_of_methods_says_what_the_class_has(architecture):
    row, sae = methods.ARCHITECTURES[architecture], SAE(config(architecture))
    assert set(row.tensors) == set(sae.state_dict())
    assert set(row.settings) <= {field.name for field in fields(SAEConfig)}
    assert (row.sized_by == "k") == (not sae.architecture.has_penalty)
    assert list(methods.ARCHITECTURES) == list(ARCHITECTURE_CLASSES)


def fields_read(architecture):
    "The fields of its configuration that an SAE reads to make its weights, to train and to encode."
    read = set()

    class Recording(SAEConfig):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    given = config(architecture)
    sae = SAE(given)
    sae.config = Recording(**{f.name: getattr(given, f.name) for f in fields(SAEConfig)})
    sae.architecture = ARCHITECTURE_CLASSES[architecture](sae.config)
    read.clear()  # what its making copied
    sae.architecture.check()
    sae.architecture.tensors()
    x = torch.randn(16, sae.W_dec.shape[1])
    for fast in (False, True):
        loss = sae.loss(x, dead=torch.arange(3), fast=fast)
        loss.total.backward()
        sae.update_threshold(loss.z)
    sae.constrain()
    sae.encode(x)
    return read & {f.name for f in fields(SAEConfig)}


@pytest.mark.parametrize("architecture", ARCHITECTURE_CLASSES)
def test_the_settings_of_a_row_are_what_the_class_reads(architecture):
    "They are part of the cache key: a setting that is missing there would be found stale."
    base = {"d_in", "d_sae", "architecture", "seed"}
    assert fields_read(architecture) <= base | set(methods.ARCHITECTURES[architecture].settings)


# ---- activations


def test_topk_by_hand():
    pre = torch.tensor([[3.0, -1.0, 2.0, 0.5], [-1.0, -2.0, -3.0, 0.25]])
    assert topk(pre, 2).tolist() == [[3, 0, 2, 0], [0, 0, 0, 0.25]]


def test_topk_gradient_reaches_the_kept_only():
    pre = torch.tensor([[3.0, -1.0, 2.0, 0.5]], requires_grad=True)
    topk(pre, 2).sum().backward()
    assert pre.grad.tolist() == [[1, 0, 1, 0]]


def test_batch_topk_by_hand():
    pre = torch.tensor([[3.0, 2.0, 1.0], [0.5, 0.1, -1.0]], requires_grad=True)
    z = batch_topk(pre, 1)
    z.sum().backward()
    assert z.tolist() == [[3, 2, 0], [0, 0, 0]] and pre.grad.tolist() == [[1, 1, 0], [0, 0, 0]]


def test_batch_topk_is_topk_for_one_sample():
    pre = torch.randn(1, 20, generator=gen())
    assert torch.equal(batch_topk(pre, 5), topk(pre, 5))


def test_jumprelu_gradients_by_hand():
    pre, theta = (
        torch.tensor([[0.45], [0.55], [0.9]], requires_grad=True),
        torch.tensor([0.5], requires_grad=True),
    )
    z = jump_relu(pre, theta, 0.2)
    z.sum().backward()
    assert torch.allclose(
        z.flatten(), torch.tensor([0, 0.55, 0.9])
    ) and pre.grad.flatten().tolist() == [0, 1, 1]
    assert theta.grad.item() == pytest.approx(-2 * 0.5 / 0.2)


def test_step_gradients_by_hand():
    pre, theta = (
        torch.tensor([[0.45], [0.55], [0.9]], requires_grad=True),
        torch.tensor([0.5], requires_grad=True),
    )
    on = step(pre, theta, 0.2)
    (on * torch.tensor([[1.0], [3.0], [5.0]])).sum().backward()
    assert on.flatten().tolist() == [0, 1, 1] and pre.grad is None
    assert theta.grad.item() == pytest.approx(-(1 + 3) / 0.2)


def test_window_is_whole_below_zero():
    theta = torch.tensor([0.05], requires_grad=True)
    step(torch.tensor([[-0.04]]), theta, 0.2).sum().backward()
    assert theta.grad.item() == pytest.approx(-5)


# ---- losses


def test_squared_error_by_hand():
    assert (
        squared_error(
            torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
        )
        == 3
    )


def test_l1_by_hand():
    assert l1_penalty(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [3.0, 4.0]])) == 1 + 10


def test_tanh_by_hand():
    h, W_dec = (
        torch.tensor([[0.5, 0.0], [1.0, 0.25]], requires_grad=True),
        torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
    )
    norms = W_dec.norm(dim=1)
    penalty = DenseSet(2).mean(tanh_count(h, norms)).sum()  # (tanh 2 + tanh 4 + tanh 2) / 2
    penalty.backward()
    assert penalty.item() == pytest.approx((0.96403 + 0.99933 + 0.96403) / 2, abs=1e-5)
    # slope 4 |d| (1 - tanh^2) / 2
    assert h.grad.flatten().tolist() == pytest.approx(
        [2 * (1 - 0.96403**2), 4, 2 * (1 - 0.99933**2), 4 * (1 - 0.96403**2)], abs=1e-4
    )
    active = ActiveSet(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2, 2)
    sparse = active.mean(tanh_count(torch.tensor([0.5, 1.0, 0.25]), active.at(norms))).sum()
    assert sparse.item() == pytest.approx(penalty.item())


def test_l0_by_hand():
    assert l0_penalty(torch.tensor(6.0)) == 6 and l0_penalty(torch.tensor(6.0), 4) == 0.25


def test_auxk_by_hand():
    e = torch.tensor([[2.0, 0.0], [0.0, 0.0]], requires_grad=True)
    pre = torch.tensor([[1.0], [-3.0]], requires_grad=True)
    W_dec = torch.tensor([[1.0, 0.0]], requires_grad=True)
    aux = auxk_loss(e, pre, W_dec, 1)
    aux.backward()
    assert aux == 0.5 and e.grad is None
    assert pre.grad.tolist() == [[-1], [0]] and W_dec.grad.tolist() == [[-1, 0]]


def test_auxk_takes_at_most_k():
    W_dec = torch.eye(3)[:2, :2]
    only = torch.tensor(
        [[1.0, 0.0], [0.0, 0.0]]
    )  # residual of the first sample; latent 1 wins, and is wrong
    assert auxk_loss(only, torch.tensor([[0.5, 1.0]] * 2), W_dec, 1) == pytest.approx(
        (1 + 1 + 1) / 2 / 0.25
    )
    assert auxk_loss(only, torch.tensor([[0.5, 1.0]] * 2), W_dec, 9) == pytest.approx(
        (0.25 + 1 + 0.25 + 1) / 2 / 0.25
    )


def test_auxk_without_dead_is_zero():
    assert auxk_loss(torch.ones(2, 2), torch.ones(2, 0), torch.ones(0, 2), 1) == 0


def test_auxk_does_not_count_b_dec():
    sae = identity("topk", k=1, aux_coef=1.0)
    sae.b_dec.data = torch.tensor([5.0, 5.0])
    x = torch.tensor(
        [[6.0, 5.25], [5.5, 5.0]]
    )  # pre = (1, .25), (.5, 0): latent 0 wins; e = (0, .25), (0, 0)
    loss = sae.loss(x, dead=torch.tensor([1]))
    assert loss.auxiliary == 0 and loss.reconstruction.item() == pytest.approx(0.25**2 / 2)


def test_standard_loss_by_hand():
    loss = identity(l1=0.5).loss(torch.tensor([[3.0, -1.0]]))
    assert loss.z.tolist() == [[2, 0]] and loss.x_hat.tolist() == [[3, 0]]
    assert (loss.reconstruction, loss.penalty, loss.total) == (1, 1, 2)
    loss.total.backward()
    assert loss.h.grad.tolist() == [[0, 2]]


def test_sparsity_scales_the_penalty_and_not_h_grad():
    sae = identity(l1=0.5)
    loss = sae.loss(torch.tensor([[3.0, -1.0]]), sparsity=torch.tensor(4.0))
    loss.total.backward()
    assert loss.penalty == 4 and loss.h.grad.tolist() == [[0, 2]]


@pytest.mark.parametrize("keep", [torch.tensor([False, True]), torch.tensor([[False, True]])])
def test_masked_loss_by_hand(keep):
    loss = identity(l1=0.5).loss(torch.tensor([[3.0, -1.0]]), keep=keep)
    assert loss.z.tolist() == [[2, 0]] and loss.h.tolist() == [[0, 0]]
    assert loss.reconstruction == 5 and loss.penalty == 0


def test_tanh_loss_by_hand():
    sae, x = identity(l1=0.5, penalty="tanh"), torch.tensor([[1.5, -1.0]])  # z = (.5, 0)
    loss = sae.loss(x, sparsity=torch.tensor(3.0))
    loss.total.backward()
    assert loss.penalty.item() == pytest.approx(
        3 * 0.5 * 0.96403, abs=1e-5
    ) and loss.h.grad.tolist() == [[0, 2]]
    assert sae.loss(x, keep=torch.tensor([False, True])).penalty == 0  # the hidden pay nothing


def nested():
    "`identity` as a matryoshka of one latent in two, which shrinks what it reads."
    sae = identity("matryoshka", k=2, prefixes=(0.5, 1))
    sae.b_enc.data = torch.tensor([-1.0, -0.5])
    return sae


def test_matryoshka_loss_by_hand():
    loss = nested().loss(
        torch.tensor([[4.0, 1.0]])
    )  # z = (2, .5); errors (1, 1) of the first latent alone, (1, .5) of both
    loss.total.backward()
    assert loss.z.tolist() == [[2, 0.5]] and loss.x_hat.tolist() == [[3, 0.5]]
    assert loss.reconstruction == (2 + 1.25) / 2 == loss.total and loss.h.grad.tolist() == [
        [-2, -0.5]
    ]


def test_masked_matryoshka_loss_by_hand():
    loss = nested().loss(
        torch.tensor([[4.0, 1.0]]), keep=torch.tensor([False, True])
    )  # (3, 1) without any, (3, .5) with the second
    assert loss.x_hat.tolist() == [[1, 0.5]] and loss.reconstruction == (10 + 9.25) / 2


def test_nested_share_by_hand():
    share = nested_share(
        SAE(SAEConfig(6, 4, "matryoshka", k=1, prefixes=(0.25, 0.5, 1))).architecture
    )
    assert share.tolist() == pytest.approx([1, 2 / 3, 1 / 3, 1 / 3])
    share = nested_share(SAE(SAEConfig(6, 12, "matryoshka", k=1)).architecture)  # 1, 2, 3, 6, 12
    assert share.tolist() == pytest.approx([1, 0.8, 0.6, *3 * [0.4], *6 * [0.2]])
    assert nested_share(SAE(config("topk")).architecture) is None


def test_each_nested_dictionary_decodes_its_own_latents_alone():
    sae = SAE(config("matryoshka", prefixes=(0.25, 0.5, 1)))
    sae.b_dec.data = torch.randn(6, generator=gen(1))
    h = torch.rand(8, 12, generator=gen(2))
    for end, x_hat in zip((3, 6, 12), sae.decode_nested(h, DenseSet(8)), strict=True):
        assert torch.allclose(x_hat, sae.decode(h * (torch.arange(12) < end)), atol=1e-6)


@pytest.mark.parametrize("fast", [False, True])
def test_a_matryoshka_of_one_dictionary_is_batchtopk(fast):
    x, grads = torch.randn(8, 6, generator=gen()), []
    for sae in (
        SAE(SAEConfig(6, 100, "matryoshka", k=2, prefixes=(1,))),
        SAE(SAEConfig(6, 100, "batchtopk", k=2)),
    ):
        loss = sae.loss(x, dead=torch.tensor([1, 5]), fast=fast)
        loss.total.backward()
        assert isinstance(loss.active, ActiveSet if fast else DenseSet)
        grads.append([loss.total, *(p.grad for p in sae.parameters())])
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_jumprelu_loss_by_hand():
    sae = identity("jumprelu", target_l0=1.5, l0_coef=2.0, init_threshold=0.5)
    loss = sae.loss(
        torch.tensor([[2.0, 1.0], [1.4, 1.0], [3.0, 2.0], [1.0, 0.0]])
    )  # pre: (1,1), (.4,1), (2,2), (0,0): L0 = 5/4
    assert loss.penalty.item() == pytest.approx(2 * (1.25 / 1.5 - 1) ** 2)
    free = identity("jumprelu", l0_coef=2.0, init_threshold=0.5).loss(torch.tensor([[2.0, 1.0]]))
    assert free.penalty == 2 * 2


def test_jumprelu_counts_before_the_mask():
    sae = identity("jumprelu", target_l0=1.0, init_threshold=0.5)
    x = torch.tensor([[2.0, 1.0]])
    assert sae.loss(x).penalty == sae.loss(x, keep=torch.tensor([False, False])).penalty


@pytest.mark.parametrize("architecture", ARCHITECTURE_CLASSES)
def test_mask_of_ones_changes_nothing(architecture):
    sae, x = SAE(config(architecture)), torch.randn(8, 6, generator=gen())
    a, b = sae.loss(x), sae.loss(x, keep=torch.ones(12, dtype=torch.bool))
    assert torch.equal(a.total, b.total) and torch.equal(a.z, b.h)


def test_encoder_bias_trick_keeps_gradients():
    sae, x = SAE(config("standard")), torch.randn(16, 6, generator=gen())
    sae.b_dec.data = torch.randn(6, generator=gen(1))
    plain = torch.autograd.grad(
        ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).square().sum(),
        list(sae.parameters())[:4],
        allow_unused=True,
    )
    quick = torch.autograd.grad(
        sae.pre_activations(x).square().sum(), list(sae.parameters())[:4], allow_unused=True
    )
    for p, q in zip(plain, quick):
        assert (p is None and q is None) or torch.allclose(p, q, rtol=1e-3, atol=1e-3)


# ---- decoder, start


def test_projection_by_hand():
    g = project_rows_(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.6, 0.8]]))
    assert torch.allclose(g, torch.tensor([[-0.32, 0.24]]))


def test_decoder_methods():
    sae, x = SAE(config("standard", l1=0.1)), torch.randn(16, 6, generator=gen())
    sae.loss(x).total.backward()
    sae.project_decoder_gradient()
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-5
    sae.W_dec.data *= 3
    sae.constrain()
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(12))


def test_geometric_median_ignores_an_outlier():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1e4, 1e4]])
    assert geometric_median(x, 200).max() < 1.1
    assert torch.allclose(geometric_median(torch.ones(5, 3)), torch.ones(3))


@pytest.mark.parametrize("architecture", FOLLOWING)
def test_threshold_average_by_hand(architecture):
    sae = SAE(SAEConfig(3, 3, architecture, k=1, prefixes=(0.5, 1)))
    sae.update_threshold(torch.tensor([[0.0, 2.0, 3.0]]))
    sae.update_threshold(torch.tensor([[1.0, 0.0, 3.0]]))
    assert sae.threshold.item() == pytest.approx(1.99)
    sae.update_threshold(torch.zeros(1, 3))  # a batch in which nothing fired
    assert sae.threshold.item() == pytest.approx(1.99)


def test_negative_thresholds_are_clipped():
    sae = SAE(config("jumprelu"))
    sae.threshold.data[0] = -1
    sae.constrain()
    assert sae.threshold[0] == 0


# ---- after training


def trained(architecture):
    "An SAE with all its numbers moved a little, as training does."
    sae = SAE(config(architecture))
    sae.b_dec.data, sae.b_enc.data = (
        torch.randn(6, generator=gen(1)),
        0.1 * torch.randn(12, generator=gen(2)),
    )
    if architecture in FOLLOWING:
        sae.threshold.fill_(0.3)
    return sae


@pytest.mark.parametrize("architecture", ARCHITECTURE_CLASSES)
def test_fold_input_scale(architecture):
    sae, x = trained(architecture), torch.randn(32, 6, generator=gen())
    before = sae(7 * x) / 7
    sae.fold_input_scale(7.0)
    assert torch.allclose(sae(x), before, atol=1e-5)


def test_fold_refuses_a_zero_scale():
    with pytest.raises(ValueError, match="positive"):
        trained("standard").fold_input_scale(0.0)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_fold_decoder_norm(architecture):
    sae, x = trained(architecture), torch.randn(32, 6, generator=gen())
    sae.W_dec.data *= torch.linspace(0.5, 2, 12)[:, None]
    before = sae(x)
    sae.fold_decoder_norm()
    assert torch.allclose(sae(x), before, atol=1e-5) and torch.allclose(
        sae.W_dec.norm(dim=1), torch.ones(12)
    )


def test_fold_decoder_norm_refuses_topk():
    sae = trained("topk")
    sae.W_dec.data[0] *= 2
    with pytest.raises(ValueError, match="would change which are active"):
        sae.fold_decoder_norm()


@pytest.mark.parametrize("architecture", ARCHITECTURE_CLASSES)
def test_save_and_load(architecture, tmp_path):
    sae, x = trained(architecture), torch.randn(32, 6, generator=gen())
    again = SAE.load(sae.save(tmp_path / "sae"))
    assert again.config == sae.config and torch.equal(again(x), sae(x))
    assert sorted(p.name for p in (tmp_path / "sae").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]


@pytest.mark.parametrize("architecture", FOLLOWING)
def test_saelens_layout(architecture, tmp_path):
    trained(architecture).save(tmp_path / "b")
    cfg = json.loads((tmp_path / "b/cfg.json").read_text())
    assert (
        cfg["architecture"] == "jumprelu"
        and cfg["normalize_activations"] == "none"
        and cfg["apply_b_dec_to_input"] is True
    )
    w = load_file(tmp_path / "b/sae_weights.safetensors")
    assert {n: tuple(t.shape) for n, t in w.items()} == dict(
        W_enc=(6, 12), W_dec=(12, 6), b_enc=(12,), b_dec=(6,), threshold=(12,)
    )


def test_fields_that_came_later_have_their_defaults(tmp_path):
    path = trained("topk").save(tmp_path / "s") / "cfg.json"
    cfg = json.loads(path.read_text())
    assert cfg["metadata"]["atm_sae"].pop("prefixes") and cfg["metadata"]["atm_sae"].pop("penalty")
    path.write_text(json.dumps(cfg))
    assert SAE.load(tmp_path / "s").config == config("topk")


def test_a_folder_of_another_library_is_named(tmp_path):
    "Only from_pretrained reads the ways in which SAELens subtracts, scales and normalises."
    trained("batchtopk").save(tmp_path / "b")
    cfg = json.loads((tmp_path / "b/cfg.json").read_text())
    (tmp_path / "b/cfg.json").write_text(
        json.dumps({k: v for k, v in cfg.items() if k != "metadata"})
    )
    with pytest.raises(
        ValueError, match="written by another library: read it with atm_sae.from_pretrained"
    ):
        SAE.load(tmp_path / "b")


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", r"cfg\.json holds a list, where an object was expected: save or fetch"),
        ('{"metadata": "none"}', "written by another library"),
        ('{"metadata": {"atm_sae": 3}}', "written by another library"),
        ('{"metadata": {"atm_sae": {"d_in": "six", "d_sae": 8}}}', "has a wrong type"),
        ('{"metadata": {"atm_sae": {"d_in": 6}}}', "a setting is missing"),
        ("{", r"cfg\.json is not valid JSON .*: save or fetch"),
    ],
)
def test_settings_that_are_no_settings_are_named(tmp_path, content, message):
    path = trained("topk").save(tmp_path / "s") / "cfg.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        SAE.load(tmp_path / "s")


def test_settings_saved_by_another_editor_are_read(tmp_path):
    path = trained("topk").save(tmp_path / "s") / "cfg.json"
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert SAE.load(tmp_path / "s").config == config("topk")


def test_load_refuses(tmp_path):
    folder = trained("standard").save(tmp_path / "s")
    path = folder / "sae_weights.safetensors"
    good, cfg = load_file(path), (folder / "cfg.json").read_text()
    save_file(good | dict(W_dec=good["W_dec"][:5].contiguous()), path)
    with pytest.raises(ValueError, match=r"W_dec is \(5, 6\) where cfg.json says \(12, 6\)"):
        SAE.load(folder)
    save_file(good | dict(b_dec=torch.tensor([torch.nan] * 6)), path)
    with pytest.raises(ValueError, match="b_dec holds 6 values that are NaN or infinite"):
        SAE.load(folder)
    save_file({n: t for n, t in good.items() if n != "b_enc"}, path)
    with pytest.raises(ValueError, match="has no b_enc"):
        SAE.load(folder)
    path.write_bytes(b"not a tensor")
    with pytest.raises(ValueError, match="no readable safetensors file"):
        SAE.load(folder)
    (folder / "cfg.json").write_text(cfg.replace('"standard"', '"temporal"'))
    with pytest.raises(ValueError, match="unknown architecture 'temporal'"):
        SAE.load(folder)
    path.unlink()
    (folder / "sae.pt").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match="sae.pt is a pickle, which this library does not open"
    ):
        SAE.load(folder)


def test_load_names_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no cfg.json in"):
        SAE.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "x, text",
    [
        (torch.zeros(2, 5), r"\(2, 5\)"),
        (torch.full((2, 6), torch.nan), "NaN"),
        (torch.zeros(6), r"\(6,\)"),
    ],
)
def test_encode_refuses(x, text):
    with pytest.raises(ValueError, match=text):
        SAE(config("standard")).encode(x)


def doors(sae):
    "What takes activations, by name."
    return dict(
        encode=sae.encode,
        forward=sae,
        pre_activations=sae.pre_activations,
        loss=lambda x: sae.loss(x).total,
        fast_loss=lambda x: sae.loss(x, fast=True).total,
        init_b_dec=lambda x: [sae.init_b_dec(x), sae.b_dec.detach().clone()][1],
        decode=lambda x: sae.decode(x.repeat(1, 2)) if torch.is_tensor(x) else sae.decode(x),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("architecture", ARCHITECTURE_CLASSES)
def test_activations_of_any_precision(architecture, dtype):
    sae, x = trained(architecture), torch.randn(40, 6, generator=gen()).to(dtype)
    for name, door in doors(sae).items():
        found = door(x)
        assert found.dtype == torch.float32 and torch.equal(found, door(x.float())), name
    sae.to(torch.float64)
    assert sae(x).dtype == torch.float64


@pytest.mark.parametrize("name", doors(SAE(SAEConfig(6, 12))))
def test_activations_of_another_kind(name):
    door, x = doors(SAE(config("standard")))[name], torch.ones(3, 6)
    for wrong, got in ((x.numpy(), "ndarray"), (x.tolist(), "list"), (x.long(), "torch.int64")):
        with pytest.raises(TypeError, match=f"got {got}"):
            door(wrong)
    with pytest.raises(ValueError, match=r"on device meta.*use x.to\('cpu'\)"):
        door(x.to("meta"))
    with pytest.raises(ValueError, match=r"expected shape \(batch, (6|12)\)"):
        door(torch.ones(3, 5))


# ---- trained or not, and the limit of the norm


def test_folding_makes_an_sae_of_raw_activations(tmp_path):
    sae = SAE(config("jumprelu"), dict(max_norm=6.0))
    assert not sae.is_trained and not SAE.load(sae.save(tmp_path / "fresh")).is_trained
    sae.fold_input_scale(2.0)
    assert sae.is_trained and sae.max_norm == 3
    again = SAE.load(sae.save(tmp_path / "trained"))
    assert again.is_trained and again.max_norm == 3 and again.config == sae.config
    assert calibrate_l0(random_sae(config("topk")), torch.randn(50, 6), 2).is_trained


def test_max_norm():
    assert SAE(config("topk")).max_norm is None
    assert SAE(config("topk", outlier_ratio=None), dict(max_norm=3.0)).max_norm == math.inf


def test_a_decoder_row_of_zeros_stays(tmp_path):
    sae = trained("standard")
    sae.W_dec.data[3] = 0
    x = torch.randn(8, 6, generator=gen())
    before = sae(x)
    assert torch.allclose(sae.fold_decoder_norm()(x), before, atol=1e-5)
    sae.constrain()
    assert sae.W_dec.isfinite().all() and not sae.W_dec[3].any()


# ---- gate


@pytest.mark.parametrize("architecture", ARCHITECTURE_CLASSES)
def test_gated_latents_never_fire(architecture):
    sae, x, keep = (
        trained(architecture),
        3 * torch.randn(200, 6, generator=gen()),
        torch.arange(12) % 3 > 0,
    )
    gated = gate_latents(sae, keep)
    before, after = sae.encode(x), gated.encode(x)
    assert (before[:, ~keep] > 0).any(0).all() and after[:, ~keep].abs().max() == 0
    if architecture == "topk":
        assert (after[:, keep] > 0).sum() > (
            before[:, keep] > 0
        ).sum()  # others take the free places
    else:
        assert torch.equal(after[:, keep], before[:, keep])
    assert torch.equal(sae.encode(x), before)  # the SAE itself is as it was


def test_gate_with_all_open_changes_nothing():
    sae, x = trained("topk"), torch.randn(32, 6, generator=gen())
    assert torch.equal(gate_latents(sae, torch.ones(12, dtype=torch.bool))(x), sae(x))


def test_gate_refuses_another_width():
    with pytest.raises(ValueError, match="the SAE has 12 latents, not 5"):
        gate_latents(trained("standard"), torch.ones(5, dtype=torch.bool))


# ---- control


def test_calibrate_l0():
    x = torch.randn(1000, 6, generator=gen())
    sae = calibrate_l0(random_sae(config("matryoshka")), x, 2.5)
    assert (sae.encode(x) > 0).sum() == 2500 and not any(p.requires_grad for p in sae.parameters())
    with pytest.raises(ValueError, match="12000 active latents in all, of 12000"):
        calibrate_l0(sae, x, 12)
    with pytest.raises(ValueError, match="0.004 on 100 samples asks for 0 active latents.*more sa"):
        calibrate_l0(sae, x[:100], 0.004)
    with pytest.raises(ValueError, match="only .* pre-activations of a sample are positive"):
        calibrate_l0(random_sae(SAEConfig(8, 8)), torch.randn(50, 8), 7)


def test_calibration_leaves_outliers_out():
    x = torch.randn(1000, 6, generator=gen())
    loud = torch.cat([x, torch.full((100, 6), 1e4)])
    sae, other = (calibrate_l0(random_sae(config("topk")), rows, 2.5) for rows in (x, loud))
    assert torch.equal(sae.threshold, other.threshold)
    assert other.max_norm == pytest.approx(10 * float(x.norm(dim=1).median()), rel=0.1)


def test_a_decoder_without_gradient_says_what_to_do():
    with pytest.raises(RuntimeError, match="the decoder has no gradient: call backward first"):
        SAE(SAEConfig(4, 8)).project_decoder_gradient()


# ---- OrtSAE


def orthogonality(rows, step=0, **more):
    "OrtSAE's own loss of decoder rows, with a coefficient of 1."
    settings = dict(k=1, ortho_coef=1.0, ortho_every=1) | more
    ortsae = SAE(SAEConfig(rows.shape[1], len(rows), "ortsae", **settings)).architecture
    pre = rows.new_zeros(1, len(rows))
    batch = MaskedBatch(pre, pre, DenseSet(1), SimpleNamespace(W_dec=rows))
    return ortsae.own_loss(pre, batch, step)


def test_similar_rows_by_hand():
    angles = torch.tensor([0.0, torch.pi / 3, torch.pi / 2])
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    assert orthogonality(rows).item() == pytest.approx((0.25 + 0.75 + 0.75) / 3)
    assert orthogonality(3 * rows).item() == pytest.approx(1.75 / 3)  # of the directions alone
    assert orthogonality(torch.eye(4)).item() == 0
    assert orthogonality(-torch.eye(2).repeat(2, 1)).item() == pytest.approx(1)


def test_the_gradient_of_similar_rows_is_numeric():
    rows = torch.randn(7, 3, generator=gen()).double().requires_grad_()
    assert torch.autograd.gradcheck(orthogonality, (rows,))
    assert torch.autograd.gradcheck(lambda r: orthogonality(r, step=3, chunk=4), (rows,))


def test_rows_are_compared_within_the_chunks_of_a_step():
    rows = normalize(torch.randn(64, 8, generator=gen()), dim=1)
    whole = orthogonality(rows)
    parts = [orthogonality(rows, step, chunk=16) for step in range(4)]
    assert len({part.item() for part in parts}) == 4 and max(parts) < whole
    assert orthogonality(rows, 2, chunk=16) == parts[2]  # the same step draws the same chunks
    nearest = nearest_rows(rows, 16, gen(5))
    assert sorted({*torch.bincount(nearest, minlength=64).tolist()})[0] == 0
    assert (nearest != torch.arange(64)).all()


def test_similar_rows_count_in_each_fifth_step():
    rows = torch.randn(6, 3, generator=gen())
    found = [orthogonality(rows, step, ortho_every=5).item() for step in range(11)]
    assert [step for step, value in enumerate(found) if value] == [0, 5, 10]
    assert found[5] == orthogonality(rows).item()
    with pytest.raises(ValueError, match="ortho_every must be a number of steps of at least 1"):
        SAEConfig(6, 12, "ortsae", k=2, ortho_every=0)


def test_ortsae_adds_its_penalty_to_the_loss_of_batchtopk():
    x = torch.randn(32, 6, generator=gen())
    plain = SAE(SAEConfig(6, 12, "batchtopk", k=2))
    ortsae = SAE(SAEConfig(6, 12, "ortsae", k=2, ortho_coef=0.5))
    more = ortsae.loss(x)
    assert more.auxiliary.item() == pytest.approx(0.5 * orthogonality(plain.W_dec.data).item())
    assert (more.total - more.auxiliary).item() == pytest.approx(plain.loss(x).total.item())
    for bad in (1, 11):  # 12 rows in chunks of 11 leave one alone
        with pytest.raises(ValueError, match="without another"):
            SAEConfig(6, 12, "ortsae", k=2, chunk=bad)


def test_training_ortsae_makes_the_decoder_rows_less_similar():
    def similarity(method):
        rows = get_run(small(method, steps=200)).sae.W_dec.detach()
        return (rows @ rows.T).fill_diagonal_(-1).amax(1).square().mean()

    assert similarity("ortsae") < 0.8 * similarity("batchtopk")


# ---- gated


def gated_sae(seed=0, **more):
    "A gated SAE in double precision whose parameters are all in use."
    sae = SAE(SAEConfig(3, 5, "gated", seed=seed, **dict(l1=0.3) | more)).double()
    draws = gen(seed)
    for name in ("b_enc", "b_dec", "r_mag", "b_mag"):
        tensor = getattr(sae, name)
        tensor.data = 0.3 * torch.randn(tensor.shape, generator=draws).double()
    return sae


def test_gate_and_magnitude_by_hand():
    sae = SAE(SAEConfig(3, 3, "gated", l1=0.5))
    sae.W_enc.data, sae.W_dec.data = torch.eye(3), torch.eye(3)
    sae.b_enc.data = torch.tensor([-1.0, -1.0, 2.0])
    sae.r_mag.data = torch.tensor([1.0, 2.0, 1.0]).log()
    sae.b_mag.data = torch.tensor([0.0, 0.0, 3.0])
    x = torch.tensor([[2.0, 1.0, -1.0]])
    # gates (1, 0, 1), values (2, 2, 2): the second is closed
    assert sae.encode(x).tolist() == [[2, 0, 2]]
    loss = sae.loss(x)
    assert loss.reconstruction.item() == 0 + 1 + 9  # x_hat (2, 0, 2)
    assert loss.penalty.item() == 0.5 * (1 + 1)
    assert loss.auxiliary.item() == 1 + 1 + 4  # from the gates (1, 0, 1)


def test_the_gradients_of_a_gated_sae_are_those_of_its_equation():
    x = torch.randn(8, 3, generator=gen(4)).double()
    sae = gated_sae()
    sae.loss(x, sparsity=0.7).total.backward()
    W_enc, W_dec, b_enc, b_dec, r, b_mag = (
        getattr(sae, n).detach().clone().requires_grad_()
        for n in ("W_enc", "W_dec", "b_enc", "b_dec", "r_mag", "b_mag")
    )
    u = (x - b_dec) @ W_enc
    gate = u + b_enc
    z = (gate > 0).double() * torch.relu(r.exp() * u + b_mag)
    frozen = W_dec.detach()
    error = (x - b_dec - z @ W_dec).square().sum(1).mean()
    by_gate = (x - b_dec.detach() - gate.relu() @ frozen).square().sum(1).mean()
    l1 = (gate.relu() * frozen.norm(dim=1)).sum(1).mean()
    (error + 0.7 * 0.3 * l1 + by_gate).backward()
    for name, ours in dict(W_enc=W_enc, W_dec=W_dec, b_enc=b_enc, r_mag=r, b_mag=b_mag).items():
        assert torch.allclose(getattr(sae, name).grad, ours.grad, atol=1e-10), name
    assert torch.allclose(sae.b_dec.grad, b_dec.grad, atol=1e-10)


def test_a_mask_hides_values_and_not_gates():
    x, hidden = torch.randn(8, 3, generator=gen(4)).double(), torch.zeros(5).double()
    free, masked = gated_sae().loss(x), gated_sae().loss(x, hidden)
    assert masked.h.count_nonzero() == 0 and free.h.count_nonzero() > 0
    assert masked.penalty == free.penalty and masked.auxiliary == free.auxiliary


def test_a_gated_sae_is_saved_with_the_names_of_saelens(tmp_path):
    sae = gated_sae().float()
    x = torch.randn(20, 3, generator=gen(1))
    folder = sae.save(tmp_path / "gated")
    names = {"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"}
    assert {*load_file(folder / "sae_weights.safetensors")} == names
    assert torch.equal(SAE.load(folder).encode(x), sae.encode(x))
    equal = from_pretrained(folder)
    assert equal.config.architecture == "jumprelu"
    assert torch.allclose(equal.encode(x), sae.encode(x), atol=1e-6)
    for format in ("saelens", "dictionary-learning", "gemma-scope"):
        read = from_pretrained(export_sae(sae, tmp_path / format, format))
        assert torch.allclose(read(x), sae(x), atol=1e-5), format


def test_a_gated_sae_in_other_units():
    sae, x = gated_sae().float(), torch.randn(20, 3, generator=gen(1))
    before = sae(x)
    scaled = copy.deepcopy(sae).fold_input_scale(0.5)
    assert torch.allclose(scaled(2 * x), 2 * before, atol=1e-5)
    assert torch.equal(scaled.r_mag, sae.r_mag)
    longer = copy.deepcopy(sae)
    longer.W_dec.data *= torch.linspace(0.5, 2, 5)[:, None]
    expected = longer(x)
    assert torch.allclose(longer.fold_decoder_norm()(x), expected, atol=1e-5)


def test_a_gated_sae_reaches_its_l0():
    run = get_run(recipe("gated", WorldConfig(), 64, 200, l0=6, steps=600, batch_size=256))
    assert run.l0 == pytest.approx(6, rel=0.05)
