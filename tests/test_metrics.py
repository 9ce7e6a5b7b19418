"Reconstruction, spliced, planted and stability metrics against values worked out by hand."

import math

import pytest
import torch

from atm_sae.core import generator
from atm_sae.data.lm import hook_layer, next_token_losses, splice, tiny_lm
from atm_sae.evals import metrics
from atm_sae.evals.metrics import (
    activation_frequency,
    best_detectors,
    detection_counts,
    dictionary_agreement,
    importance_movement,
    late_movement,
    match_latents,
    planted_metrics,
    planted_table,
    reconstruction_metrics,
    miss_rates,
    ordinary_rows,
    outlier_limit,
    spliced_metrics,
    spliced_reference,
    spliced_scores,
)
from atm_sae.data.planted import PlantedWorld, WorldConfig
from atm_sae.sae.sae import SAE, SAEConfig

T = torch.tensor


class Toy:
    "z = relu(x W_enc + b_enc), x_hat = z W_dec + b_dec."

    def __init__(self, W_enc, W_dec, b_enc=0.0, b_dec=0.0):
        self.W_enc, self.W_dec, self.b_enc = W_enc, W_dec, b_enc
        self.b_dec = torch.zeros(W_dec.shape[1]) + torch.as_tensor(b_dec)

    def encode(self, x):
        return (x @ self.W_enc + self.b_enc).relu()

    def decode(self, z):
        return z @ self.W_dec + self.b_dec


# reconstruction -------------------------------------------------------------

HALVES = Toy(
    T([[0.5, 0, 0], [0, 1, 0]]), T([[1.0, 0], [0, 1], [1, 0]])
)  # halves x_0, keeps x_1, third latent dead


def test_reconstruction_by_hand():
    m = reconstruction_metrics(HALVES, T([[2.0, 0], [0, 4]]))
    assert (
        m["mse"] == 0.5
        and m["cosine"] == 1
        and m["l0"] == 1
        and m["l1"] == 2.5
        and m["n_tokens"] == 2
    )
    assert (
        m["fvu"] == pytest.approx(0.1)
        and m["explained_variance"] == pytest.approx(0.9)
        and m["dead_share"] == pytest.approx(1 / 3)
    )
    assert m["shrinkage"] == pytest.approx(17 / 18) and m["mse_saebench"] == 0.5 / 2048


def test_cosine_by_hand():
    x = T([[3.0, 4], [1, 0]])  # x_hat = (1.5, 4), (0.5, 0)
    assert reconstruction_metrics(HALVES, x)["cosine"] == pytest.approx(
        ((4.5 + 16) / (5 * math.hypot(1.5, 4)) + 1) / 2
    )


def test_explained_variance_squares_the_mean_vector():
    constant = Toy(torch.zeros(2, 1), torch.ones(1, 2), b_dec=[0.0, 3])
    m = reconstruction_metrics(constant, T([[0.0, 2], [0, 4]]))
    assert m["explained_variance"] == pytest.approx(0) and m["fvu"] == pytest.approx(1)


def test_a_large_mean_costs_no_digits():
    x = 1e4 + torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    zero = Toy(torch.zeros(3, 1), torch.ones(1, 3), b_dec=x.double().mean(0).float())
    assert reconstruction_metrics(zero, x)["fvu"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_batches_do_not_matter(size):
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(1))
    a, b = reconstruction_metrics(HALVES, x), reconstruction_metrics(HALVES, x, batch_size=size)
    assert a == pytest.approx(b, rel=1e-12)


def test_negative_latents_count_as_active():
    class Signed(Toy):
        def encode(self, x):
            return x @ self.W_enc

    m = reconstruction_metrics(Signed(torch.eye(2), torch.eye(2)), T([[-1.0, 2], [3, 0]]))
    assert m["l0"] == 1.5 and m["l1"] == 3 and m["mse"] == 0


def test_frequency():
    assert activation_frequency(
        HALVES, T([[2.0, 0], [0, 4], [1, 1], [-1, 2]]), batch_size=3
    ).tolist() == [0.5, 0.75, 0]


@pytest.mark.parametrize(
    "x, text",
    [
        (torch.zeros(5, 3), "width 3, the SAE reads width 2"),
        (torch.zeros(0, 2), "empty"),
        (torch.zeros(2), "expected shape"),
        (T([[1.0, torch.nan]]), "1 NaN"),
    ],
)
def test_bad_activations(x, text):
    with pytest.raises(ValueError, match=text):
        reconstruction_metrics(HALVES, x)


@pytest.mark.parametrize("measure", [reconstruction_metrics, activation_frequency])
def test_types_of_activations(measure):
    x = T([[2.0, 0], [0, 4], [1, 1]])
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        found, want = measure(HALVES, x.to(dtype)), measure(HALVES, x)
        assert torch.equal(found, want) if torch.is_tensor(want) else found == want
    for wrong, got in ((x.long(), "torch.int64"), (x.numpy(), "ndarray"), ([[2.0, 0]], "list")):
        with pytest.raises(TypeError, match=f"got {got}"):
            measure(HALVES, wrong)


# outliers -------------------------------------------------------------------


class Limited(Toy):
    "A dictionary that knows its limit."

    max_norm = 4.5


def test_outliers_are_left_out_and_counted():
    x = T([[2.0, 0], [0, 4], [1, 1], [3, 1]])
    loud = T([[300.0, 0], [0, -400]])
    both = torch.cat([x[:2], loud, x[2:]])
    clean = reconstruction_metrics(HALVES, x)
    assert clean["n_outliers"] == 0 and clean["n_tokens"] == 4
    assert reconstruction_metrics(HALVES, both) == clean | dict(n_outliers=2)
    assert torch.equal(activation_frequency(HALVES, both), activation_frequency(HALVES, x))


def test_the_limit_of_the_sae_comes_first():
    limited, free = (Limited(HALVES.W_enc, HALVES.W_dec) for _ in range(2))
    free.max_norm = math.inf
    x = T([[2.0, 0], [0, 4], [3, 4], [300, 0]])
    assert outlier_limit(limited, x) == 4.5 and outlier_limit(free, x) == math.inf
    assert reconstruction_metrics(limited, x)["n_outliers"] == 2
    assert reconstruction_metrics(free, x)["n_outliers"] == 0
    assert ordinary_rows(limited, x).tolist() == [True, True, False, False]
    with pytest.raises(ValueError, match="all 2 activations are outliers.*limit of 4.5"):
        reconstruction_metrics(limited, 10 * x[:2])


# spliced --------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def tokens(lm):
    t = torch.randint(3, 1000, (4, 16), generator=torch.Generator().manual_seed(0))
    t[:, 0], t[0, 9:] = lm.tokenizer.bos_token_id, lm.tokenizer.pad_token_id
    return t


def both_signs(d):
    return Toy(
        torch.cat([torch.eye(d), -torch.eye(d)], 1), torch.cat([torch.eye(d), -torch.eye(d)])
    )


def nothing(d):
    return Toy(torch.zeros(d, 1), torch.ones(1, d))


def test_perfect_and_useless_saes(lm, tokens):
    full, none = (
        spliced_metrics(both_signs(32), lm, 1, tokens),
        spliced_metrics(nothing(32), lm, 1, tokens),
    )
    assert full["ce_loss_score"] == pytest.approx(1, abs=1e-4) and full[
        "kl_score"
    ] == pytest.approx(1, abs=1e-4)
    assert none["ce_loss_score"] == pytest.approx(0, abs=1e-9) and none[
        "kl_score"
    ] == pytest.approx(0, abs=1e-9)
    assert full["n_tokens"] == 3 * 14 + 7  # neither the token nor its successor is BOS or PAD


def test_scores_of_a_splice_that_changes_no_loss_are_nan(tokens):
    blind = tiny_lm()
    blind.model.lm_head.weight = torch.nn.Parameter(torch.zeros(1024, 32))
    found = spliced_metrics(nothing(32), blind, 1, tokens)
    assert math.isnan(found["ce_loss_score"]) and math.isnan(found["kl_score"])
    for name in ("ce_orig", "ce_sae", "ce_zero"):
        assert found[name] == pytest.approx(math.log(1024))
    assert found["kl_sae"] == found["kl_zero"] == 0


def test_original_loss_is_the_models_own(lm, tokens):
    m = spliced_metrics(both_signs(32), lm, 1, tokens)
    ordinary = tokens > 2
    assert m["ce_orig"] == pytest.approx(
        float(next_token_losses(lm, tokens)[ordinary[:, :-1] & ordinary[:, 1:]].mean()), rel=1e-5
    )


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out", "resid_post"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_reference_gives_the_numbers_of_whole_passes(lm, tokens, layer, site, monkeypatch):
    reference = spliced_reference(lm, layer, tokens, 3, site)
    assert all(batch.inputs.keys() == {layer, 2} for batch in reference.batches)
    monkeypatch.setattr("atm_sae.evals.metrics._can_skip", lambda *args: False)
    whole = spliced_reference(lm, layer, tokens, 3, site)
    assert all(batch.inputs.keys() == {0} for batch in whole.batches)
    limited = nothing(32)
    limited.max_norm = float(whole.batches[0].x.norm(dim=-1).median())
    for sae in (both_signs(32), nothing(32), limited):
        assert spliced_scores(sae, reference) == spliced_scores(sae, whole)


def test_a_reference_runs_the_untouched_model_once(lm, tokens):
    "And the later passes begin at the SAE's block."
    reference, ran = spliced_reference(lm, 1, tokens), []
    first = spliced_scores(both_signs(32), reference)
    hooks = [
        hook_layer(lm, i).self_attn.register_forward_hook(
            lambda *args, i=i: ran.append((i, args[2][0].shape[0]))
        )
        for i in range(3)
    ]
    try:
        again = spliced_scores(both_signs(32), reference)
    finally:
        for hook in hooks:
            hook.remove()
    assert again == first and [i for i, n in ran if n == len(tokens)] == [1, 2]


def test_blocks_are_not_skipped_where_later_ones_need_more(tokens):
    "Models whose late blocks use keys of early ones, such as Gemma-3n."
    lm, early = tiny_lm(), []

    def keep(block, args, output):
        early[:] = [output[0]]

    def add(block, args, output):
        return (output[0] + early[0] if early else output[0], *output[1:])

    hook_layer(lm, 0).self_attn.register_forward_hook(keep)
    hook_layer(lm, 2).self_attn.register_forward_hook(add)
    hook_layer(lm, 2).register_forward_hook(lambda *args: early.clear())
    reference = spliced_reference(lm, 1, tokens)
    assert reference.batches[0].inputs.keys() == {0}


def test_special_positions_keep_their_stream(lm, tokens):
    seen = []

    class Spy(Toy):
        def encode(self, x):
            seen.append(len(x))
            return super().encode(x)

    spliced_metrics(Spy(torch.eye(32), torch.eye(32)), lm, 1, tokens)
    assert sum(seen) == int((tokens > 2).sum())
    with splice(lm, 1, lambda r: torch.zeros_like(r)):
        everything = next_token_losses(lm, tokens)
    ordinary = tokens > 2
    assert float(everything[ordinary[:, :-1] & ordinary[:, 1:]].mean()) != pytest.approx(
        spliced_metrics(nothing(32), lm, 1, tokens)["ce_sae"], rel=1e-6
    )


def test_the_site_of_the_sae_is_spliced(lm, tokens):
    sae = nothing(32)
    sae.metadata = dict(hook_name="blocks.1.hook_mlp_out")
    with splice(lm, 1, lambda x: torch.where((tokens > 2)[..., None], 0, x), "mlp_out"):
        losses = next_token_losses(lm, tokens)
    counts = (tokens > 2)[:, :-1] & (tokens > 2)[:, 1:]
    found = spliced_metrics(sae, lm, 1, tokens, site="mlp_out")
    assert found["ce_sae"] == pytest.approx(float(losses[counts].mean()), rel=1e-5)
    with pytest.raises(ValueError, match="trained on blocks.1.hook_mlp_out, and blocks.1.hook_res"):
        spliced_metrics(sae, lm, 1, tokens)


def test_outliers_keep_their_stream(lm, tokens):
    "A limit between the norms: what exceeds it is neither replaced nor counted."
    ordinary, seen = tokens > 2, []
    with torch.no_grad(), splice(lm, 1, lambda r: seen.append(r) or r):
        lm.model(input_ids=tokens)
    norms = seen[0].norm(dim=-1)
    limited = nothing(32)
    limited.max_norm = float(norms[ordinary].median())
    kept = ordinary & (norms <= limited.max_norm)
    m = spliced_metrics(limited, lm, 1, tokens, batch_size=3)
    counts = kept[:, :-1] & ordinary[:, 1:]
    assert m["n_outliers"] == int((ordinary & ~kept).sum()) > 10
    assert m["n_tokens"] == int(counts.sum())
    with splice(lm, 1, lambda r: torch.where(kept[..., None], 0, r)):
        zeroed = float(next_token_losses(lm, tokens)[counts].mean())
    assert m["ce_sae"] == pytest.approx(zeroed, rel=1e-5) == m["ce_zero"]
    assert m["ce_orig"] == pytest.approx(float(next_token_losses(lm, tokens)[counts].mean()))
    assert spliced_metrics(nothing(32), lm, 1, tokens)["n_outliers"] == 0


def test_kl_by_hand(lm, tokens):
    sae = Toy(torch.eye(32), torch.eye(32))

    def logp():
        return lm.model(input_ids=tokens, use_cache=False).logits[:, :-1].log_softmax(-1)

    ordinary = tokens > 2
    with torch.no_grad():
        p = logp()
        with splice(lm, 1, lambda r: torch.where(ordinary[..., None], r.relu(), r)):
            q = logp()
    kl = (p.exp() * (p - q)).sum(-1)[ordinary[:, :-1] & ordinary[:, 1:]].mean()
    assert spliced_metrics(sae, lm, 1, tokens, batch_size=3)["kl_sae"] == pytest.approx(
        float(kl), rel=1e-4
    )


def test_spliced_messages(lm, tokens):
    with pytest.raises(ValueError, match="the SAE reads width 2, tiny.* has width 32"):
        spliced_metrics(HALVES, lm, 1, tokens)
    with pytest.raises(ValueError, match="no layer 9"):
        spliced_metrics(both_signs(32), lm, 9, tokens)
    with pytest.raises(ValueError, match="no two ordinary tokens"):
        spliced_metrics(both_signs(32), lm, 1, torch.full((2, 5), lm.tokenizer.bos_token_id))


# planted --------------------------------------------------------------------


def test_matching_by_hand():
    latent, mcc = match_latents(T([[0.9, 0.8], [0.1, 0.7], [0, 0.2]]))
    assert latent.tolist() == [0, 1] and mcc == pytest.approx(0.8)
    latent, mcc = match_latents(T([[0.2, 0.9, 0.1]]))  # fewer latents than features
    assert latent.tolist() == [-1, 0, -1] and mcc == pytest.approx(0.9)


def test_counts_and_detectors_by_hand():
    fires, on = T([[0, 1], [1, 0], [0, 1], [0, 0]]).bool(), T([[1], [0], [1], [1]]).bool()
    both, n_latent, n_feature = detection_counts(fires, on)
    assert (
        both.tolist() == [[0], [2]]
        and n_latent.tolist() == [[1], [2]]
        and n_feature.tolist() == [3]
    )
    found = best_detectors(fires, on).iloc[0]
    assert (
        found.best_latent == 1
        and found.precision == 1
        and found.recall == 0.5
        and found.f1 == pytest.approx(2 / 3)
    )


def test_silence_by_hand():
    on, parent, child = (
        T([0, 0, 1, 1, 1, 0]).bool(),
        T([1, 1, 1, 1, 1, 0]).bool(),
        T([1, 1, 1, 0, 0, 0]).bool(),
    )
    assert miss_rates(on, parent, child) == (pytest.approx(2 / 3), 0)
    assert math.isnan(miss_rates(on, parent, torch.zeros(6, dtype=torch.bool))[0])


@pytest.fixture(scope="module")
def world():
    return PlantedWorld(WorldConfig(d_in=48, n_parents=6, children_per_parent=3, n_free=20))


def honest(world):
    return Toy(torch.linalg.pinv(world.directions), world.directions.clone(), b_enc=-1e-3)


def absorbing(world, child):
    sae = honest(world)
    sae.W_enc = sae.W_enc.clone()
    sae.W_enc[:, 0] -= 10 * sae.W_enc[:, child]
    sae.W_dec[child] += sae.W_dec[0]
    return sae


def test_honest_dictionary(world):
    m = planted_metrics(honest(world), world, n=3000)
    assert m["absorption"] == m["miss_rate"] == m["dead_share"] == 0
    for k in ("f1", "f1_parents", "precision", "recall", "mcc"):
        assert m[k] == pytest.approx(1, abs=1e-5)
    assert m["excess_cosine"] == pytest.approx(0, abs=1e-5) and m["fvu"] < 1e-5
    assert set(m) == {
        "absorption",
        "miss_rate",
        "excess_cosine",
        "precision",
        "recall",
        "f1",
        "f1_parents",
        "mcc",
        "dead_share",
        "l0",
        "fvu",
        "n_outliers",
    }


def test_planted_metrics_leave_out_what_the_sae_calls_an_outlier(world):
    "The loudest tenth of the samples is beyond the limit; parents are on in the others."
    x, a = world.sample(3000, generator(0, "planted-metrics"))
    limited = honest(world)
    limited.max_norm = float(x.norm(dim=1).quantile(0.9))
    ordinary = x.norm(dim=1) <= limited.max_norm
    m = planted_metrics(limited, world, n=3000)
    assert m["n_outliers"] == int((~ordinary).sum()) == 300
    assert m["l0"] == pytest.approx(float((a[ordinary] > 0).sum(1).float().mean()), rel=1e-6)
    limited.W_enc[:, 0] = 0  # the first parent's latent is zero
    table = planted_table(limited, world, n=3000)
    assert table.absorption[0] == table.miss_rate[0] == 1


def test_absorption_is_counted_exactly(world):
    child = int(world.children(0)[1])
    table = planted_table(absorbing(world, child), world, n=3000, seed=5)
    _, a = world.sample(3000, generator(5, "planted-metrics"))
    some = (a[:, 0] > 0) & (a[:, world.children(0)] > 0).any(1)
    assert (
        table.absorption[0] == pytest.approx(float((a[some, child] > 0).float().mean()))
        and table.miss_rate[0] == 0
    )
    assert (table.absorption[1:6] == 0).all() and table.absorption[6:].isna().all()
    c = float(world.directions[0] @ world.directions[child])
    assert table.excess_cosine[child] == pytest.approx((1 + c) / math.sqrt(2 + 2 * c) - c, abs=1e-5)
    m = planted_metrics(absorbing(world, child), world, n=3000, seed=5)
    assert m["absorption"] == pytest.approx(table.absorption[0] / 6)


def test_order_of_latents_does_not_matter(world):
    sae, order = (
        honest(world),
        torch.randperm(world.n_features, generator=torch.Generator().manual_seed(0)),
    )
    shuffled = Toy(sae.W_enc[:, order], sae.W_dec[order], b_enc=-1e-3)
    assert planted_table(shuffled, world, n=1000).latent.tolist() == order.argsort().tolist()


def test_missing_latents_are_silent(world):
    sae = honest(world)
    part = Toy(sae.W_enc[:, 1:], sae.W_dec[1:], b_enc=-1e-3)  # parent 0 has no latent
    row = planted_table(part, world, n=2000).iloc[0]
    assert row.latent == -1 and row.absorption == row.miss_rate == 1 and row.cosine == 0


def test_detectors_of_many_features():
    "More features than are counted at a time; by brute force."
    gen = torch.Generator().manual_seed(0)
    active, on = (torch.rand(40, n, generator=gen) < 0.2 for n in (5, 2100))
    table = best_detectors(active, on)
    both = (active[:20, :, None] & on[:20, None]).sum(0)
    sums = active[:20].sum(0)[:, None] + on[:20].sum(0)
    best = (2 * both / sums.clamp(min=1)).argmax(0)
    assert table.best_latent.tolist() == best.tolist()
    detected, on = active[20:, best], on[20:]
    both, sums = (detected & on).sum(0), detected.sum(0) + on.sum(0)
    assert table.f1.to_numpy() == pytest.approx((2 * both / sums.clamp(min=1)).numpy())


def test_many_features_are_sampled_a_few_samples_at_a_time(world, monkeypatch):
    whole = planted_metrics(honest(world), world, n=3000)
    sizes, sample = [], type(world).sample

    def counted(self, n, gen):
        sizes.append(n)
        return sample(self, n, gen)

    monkeypatch.setattr(metrics, "_MOST", 1000 * world.n_features)
    monkeypatch.setattr(type(world), "sample", counted)
    parts = planted_metrics(honest(world), world, n=2500)
    assert sizes == [1000, 1000, 500]
    assert parts["f1"] == pytest.approx(whole["f1"], abs=0.01) and parts["n_outliers"] == 0


def test_planted_is_seeded_and_checks_the_width(world):
    sae = absorbing(world, 7)
    assert (
        planted_metrics(sae, world, n=500, seed=1)
        == planted_metrics(sae, world, n=500, seed=1)
        != planted_metrics(sae, world, n=500, seed=2)
    )
    with pytest.raises(ValueError, match="the SAE reads width 2, the world has width 48"):
        planted_metrics(HALVES, world)


# stability ------------------------------------------------------------------


def test_agreement_by_hand():
    plane, twins = Toy(torch.eye(2), torch.eye(2)), Toy(torch.eye(2), T([[1.0, 0], [1, 0]]))
    assert dictionary_agreement(plane, twins) == dict(mean_best_cosine=0.75, mcc=0.5, n_a=2, n_b=2)
    assert (
        dictionary_agreement(plane, twins, alive=(T([True, False]), T([True, True])))[
            "mean_best_cosine"
        ]
        == 1
    )


def test_agreement_ignores_norms_and_order():
    D = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    got = dictionary_agreement(Toy(D.T, D), Toy(D.T, 3 * D.flip(0)))
    assert got["mean_best_cosine"] == pytest.approx(1, abs=1e-5) and got["mcc"] == pytest.approx(
        1, abs=1e-5
    )


def test_agreement_messages():
    with pytest.raises(ValueError, match="widths 2 and 3"):
        dictionary_agreement(HALVES, Toy(torch.eye(3), torch.eye(3)))
    with pytest.raises(ValueError, match="no latents that are alive"):
        dictionary_agreement(HALVES, HALVES, alive=([False] * 3, [True] * 3))


def test_movement_by_hand():
    assert (
        late_movement([9] * 18 + [3, 5]) == 0.25
        and late_movement([2.0] * 30) == 0
        and late_movement([0, 0, 0]) == 0
    )
    assert importance_movement([1, 3], [2, 3]) == 0.25
    with pytest.raises(ValueError, match="at least two"):
        late_movement([1])


def test_activations_without_variance_are_named():
    sae = SAE(SAEConfig(4, 8))
    with pytest.raises(ValueError, match="the 9 activations are all alike"):
        reconstruction_metrics(sae, torch.ones(9, 4))
