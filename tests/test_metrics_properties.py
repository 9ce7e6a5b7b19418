"""Reconstruction and spliced metrics against the literal definitions, token by token, and what they
must not depend on."""

from math import isnan, log, sqrt

import pytest
import torch
from hypothesis import given, settings, strategies as st

from atm_sae.data.lm import splice, tiny_lm
from atm_sae.evals.metrics import activation_frequency, reconstruction_metrics, spliced_metrics

T = torch.tensor
quick = settings(max_examples=25, deadline=None, derandomize=True)


class Toy:
    "z = relu(x W_enc + b_enc), x_hat = z W_dec + b_dec."

    def __init__(self, W_enc, W_dec, b_enc=0.0, b_dec=0.0):
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = (
            W_enc,
            W_dec,
            torch.as_tensor(b_enc),
            torch.zeros(W_dec.shape[1]) + torch.as_tensor(b_dec),
        )

    def encode(self, x):
        return (x @ self.W_enc + self.b_enc).relu()

    def decode(self, z):
        return z @ self.W_dec + self.b_dec

    def order(self, i):
        return Toy(self.W_enc[:, i], self.W_dec[i], self.b_enc[i], self.b_dec)

    def rescale(self, s):
        return Toy(self.W_enc / s, self.W_dec * s[:, None], self.b_enc / s, self.b_dec)


def random_sae(seed, d=6, n=40, mean=2.0, scale=1.0):
    "A dictionary with a few dead latents and n tokens whose coordinates have unequal means."
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(4 * d, d, generator=g)
    x = torch.randn(n, d, generator=g) + mean * torch.randn(d, generator=g)
    sae = Toy(
        W.T / d,
        0.3 * W + 0.1 * torch.randn(4 * d, d, generator=g),
        torch.where(torch.rand(4 * d, generator=g) < 0.2, -99.0, -0.1),
        x.mean(0) / 2,
    )
    return Toy(sae.W_enc / scale, sae.W_dec * scale, sae.b_enc, sae.b_dec * scale), x * scale


# by hand ---------------------------------------------------------------------

KEEP = Toy(torch.eye(2), torch.eye(2))  # keeps positive coordinates, drops negative ones


@pytest.mark.parametrize(
    "sae, x, want",
    [
        # |e|^2 = 0, 9: nothing of the negative token is left, its cosine counts 0. E|x|^2
        # = 17, E x = (0, 1): variance 16
        (
            KEEP,
            [[3, 4], [-3, 0]],
            dict(mse=4.5, cosine=0.5, l0=1, l1=3.5, dead_share=0, shrinkage=1),
        ),
        # x_hat = (0, 1), (0, 3): E|x|^2 = (2 + 10) / 2 = 6, E x = (0, 2), variance 2,
        # E|e|^2 = 1; cosines 1/sqrt 2, 3/sqrt 10
        (
            KEEP,
            [[-1, 1], [-1, 3]],
            dict(
                mse=1,
                cosine=(1 / sqrt(2) + 3 / sqrt(10)) / 2,
                l0=1,
                l1=2,
                dead_share=0.5,
                shrinkage=1,
                fvu=1 / (6 - 5),
            ),
        ),
        # doubles everything: e = x, so FVU = E|x|^2 / variance = 5 / (5 - 4), and
        # |x_hat|^2 / x.x_hat = 4 / 2
        (
            Toy(torch.eye(2), 2 * torch.eye(2)),
            [[1, 0], [3, 0]],
            dict(
                mse=5,
                cosine=1,
                shrinkage=2,
                fvu=5 / (5 - 4),
                explained_variance=-4,
                l1=2,
                dead_share=0.5,
            ),
        ),
        # x_hat = -x: e = 2 x, FVU = 4 * 5 / 1
        (
            Toy(torch.eye(2), -torch.eye(2)),
            [[1, 0], [3, 0]],
            dict(mse=20, cosine=-1, shrinkage=-1, fvu=20),
        ),
        # turns the token by a right angle: x.x_hat = 0 in both, shrinkage has no meaning
        (
            Toy(T([[0.0, 1], [1, 0]]), torch.eye(2)),
            [[1, 0], [0, 2]],
            dict(mse=(2 + 8) / 2, cosine=0, l0=1, fvu=5 / (2.5 - 1.25), shrinkage=None),
        ),
        # always answers (1, 1), the mean: |x_hat|^2 = 2, 2 and x.x_hat = 3, 1; cosines
        # 3/sqrt 10, 1/sqrt 2
        (
            Toy(torch.zeros(2, 1), torch.ones(1, 2), b_dec=1.0),
            [[1, 2], [1, 0]],
            dict(
                mse=1,
                cosine=(3 / sqrt(10) + 1 / sqrt(2)) / 2,
                l0=0,
                l1=0,
                dead_share=1,
                shrinkage=1,
                fvu=1,
            ),
        ),
    ],
)
def test_by_hand(sae, x, want):
    m = reconstruction_metrics(sae, T(x, dtype=torch.float))
    for name, value in want.items():
        assert isnan(m[name]) if value is None else m[name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("tokens", [1, 512, 2048])
def test_mse_of_saebench_divides_by_the_tokens_of_its_batch(tokens):
    m = reconstruction_metrics(KEEP, T([[-3.0, 4], [0, 0]]), saebench_tokens=tokens)
    assert m["mse"] == 4.5 and m["mse_saebench"] == 4.5 / tokens and m["n_tokens"] == 2


def test_variance_of_the_reference_is_another_number():
    """Tokens (9, 0), (11, 0) and x_hat = (10, 0): the variance is 101 - 100 = 1 and all of it
    is lost; 101 - 5^2 = 76 would leave 1/76."""
    x = T([[9.0, 0], [11, 0]])
    m = reconstruction_metrics(Toy(torch.zeros(2, 1), torch.ones(1, 2), b_dec=[10.0, 0]), x)
    wrong = 1 - m["mse"] / float(x.square().sum(1).mean() - x.mean() ** 2)
    assert m["explained_variance"] == pytest.approx(0) and wrong == pytest.approx(75 / 76)


# the definitions, literally --------------------------------------------------


def literal(sae, x):
    "Section by section, one token at a time, in Python's numbers."
    Z, X = sae.encode(x).tolist(), x.tolist()
    X_hat, n, d = sae.decode(sae.encode(x)).tolist(), len(X), len(X[0])

    def dot(a, b):
        return sum(i * j for i, j in zip(a, b))

    e2 = [sum((i - j) ** 2 for i, j in zip(a, b)) for a, b in zip(X, X_hat)]
    mean = [sum(row[i] for row in X) / n for i in range(d)]
    variance = sum(dot(a, a) for a in X) / n - dot(mean, mean)
    return dict(
        mse=sum(e2) / n,
        mse_saebench=sum(e2) / n / 2048,
        fvu=sum(e2) / n / variance,
        explained_variance=1 - sum(e2) / n / variance,
        cosine=sum(dot(a, b) / sqrt(dot(a, a) * dot(b, b)) for a, b in zip(X, X_hat)) / n,
        n_tokens=n,
        n_outliers=0,
        l0=sum(v != 0 for z in Z for v in z) / n,
        l1=sum(abs(v) for z in Z for v in z) / n,
        dead_share=sum(all(z[j] == 0 for z in Z) for j in range(len(Z[0]))) / len(Z[0]),
        shrinkage=sum(dot(b, b) for b in X_hat) / sum(dot(a, b) for a, b in zip(X, X_hat)),
    )


seeds = st.integers(0, 10**6)


@quick
@given(seeds, st.integers(2, 40), st.floats(0, 20))
def test_agrees_with_the_literal_definitions(seed, n, mean):
    sae, x = random_sae(seed, n=n, mean=mean)
    m = reconstruction_metrics(sae, x)
    assert m == pytest.approx(literal(sae, x), rel=1e-6) and set(m) == set(literal(sae, x))


@quick
@given(seeds, st.integers(1, 50))
def test_bounds_and_identities(seed, size):
    sae, x = random_sae(seed)
    m, frequency = (
        reconstruction_metrics(sae, x, batch_size=size),
        activation_frequency(sae, x, batch_size=size),
    )
    assert (
        m["explained_variance"] == 1 - m["fvu"]
        and -1 <= m["cosine"] <= 1
        and m["mse"] >= 0
        and 0 <= m["l0"] <= len(sae.W_dec)
    )
    assert (
        float(frequency.sum()) == pytest.approx(m["l0"], rel=1e-5)
        and float((frequency == 0).double().mean()) == m["dead_share"] > 0
    )
    assert m == pytest.approx(reconstruction_metrics(sae, x), rel=1e-6)


@quick
@given(seeds)
def test_order_of_latents_and_tokens_does_not_matter(seed):
    sae, x = random_sae(seed)
    g = torch.Generator().manual_seed(seed)
    latents, tokens = (
        torch.randperm(len(sae.W_dec), generator=g),
        torch.randperm(len(x), generator=g),
    )
    assert reconstruction_metrics(sae.order(latents), x[tokens]) == pytest.approx(
        reconstruction_metrics(sae, x), rel=1e-5
    )
    assert torch.equal(
        activation_frequency(sae.order(latents), x[tokens]), activation_frequency(sae, x)[latents]
    )


@quick
@given(seeds)
def test_norms_of_decoder_rows_matter_to_l1_alone(seed):
    sae, x = random_sae(seed)
    s = 2 ** (6 * torch.rand(len(sae.W_dec), generator=torch.Generator().manual_seed(seed)) - 3)
    m, twin = reconstruction_metrics(sae, x), reconstruction_metrics(sae.rescale(s), x)
    l1, expected = twin.pop("l1"), float((sae.encode(x) / s).sum(1).mean())
    assert (
        l1 == pytest.approx(expected, rel=1e-5)
        and abs(l1 - m.pop("l1")) > 1e-3
        and twin == pytest.approx(m, rel=1e-5)
    )


@quick
@given(seeds, st.floats(0.01, 100))
def test_unit_of_activations(seed, unit):
    small, big = (reconstruction_metrics(*random_sae(seed, scale=u)) for u in (1.0, unit))
    for name in ("mse", "mse_saebench"):
        assert big.pop(name) == pytest.approx(unit**2 * small.pop(name), rel=1e-4)
    assert big == pytest.approx(small, rel=1e-4)


def test_the_random_dictionaries_differ():
    ms = [reconstruction_metrics(*random_sae(seed)) for seed in range(10)]
    assert min(m["fvu"] for m in ms) < 1 < max(m["fvu"] for m in ms)
    assert all(m["cosine"] < 0.99 and 0 < m["dead_share"] < 0.9 and 1 < m["l0"] < 20 for m in ms)


# spliced ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


def rows(lm, seed, n=3, length=12):
    "Random tokens after BOS; the first row ends in padding."
    t = torch.randint(3, 1000, (n, length), generator=torch.Generator().manual_seed(seed))
    t[:, 0], t[0, length - seed % 5 :] = lm.tokenizer.bos_token_id, lm.tokenizer.pad_token_id
    return t


both_signs = Toy(
    torch.cat([torch.eye(32), -torch.eye(32)], 1), torch.cat([torch.eye(32), -torch.eye(32)])
)
nothing = Toy(torch.zeros(32, 1), torch.ones(1, 32))


def some_sae(seed):
    W = torch.randn(48, 32, generator=torch.Generator().manual_seed(seed)) / 32**0.5
    return Toy(W.T, W, torch.zeros(48))


@settings(quick, max_examples=8)
@given(seeds, st.integers(0, 1))
def test_perfect_is_1_and_zero_is_0_at_every_layer(lm, seed, layer):
    full, none = (
        spliced_metrics(both_signs, lm, layer, rows(lm, seed)),
        spliced_metrics(nothing, lm, layer, rows(lm, seed)),
    )
    assert full["ce_loss_score"] == pytest.approx(
        1, abs=1e-5 / abs(full["ce_zero"] - full["ce_orig"])
    )
    assert full["kl_score"] == pytest.approx(1, abs=1e-3)
    assert none["ce_loss_score"] == none["kl_score"] == 0
    assert full["ce_sae"] == pytest.approx(full["ce_orig"], abs=1e-5) and full[
        "kl_sae"
    ] == pytest.approx(0, abs=1e-5)
    assert (
        none["ce_sae"] == pytest.approx(none["ce_zero"])
        and none["kl_sae"] == pytest.approx(none["kl_zero"])
        and none["kl_zero"] > 0
    )


@pytest.mark.parametrize("seed, layer", [(4, 0), (7, 1)])
def test_spliced_agrees_with_the_literal_definitions(lm, seed, layer):
    sae, tokens = some_sae(seed), rows(lm, seed)
    special, ids = {lm.tokenizer.bos_token_id, lm.tokenizer.pad_token_id}, tokens.tolist()
    ordinary = T([[t not in special for t in row] for row in ids])[..., None]

    def losses(change):
        """CE of the next token and the distributions, at each position whose token and
        successor are ordinary."""
        with torch.no_grad(), splice(lm, layer, lambda r: torch.where(ordinary, change(r), r)):
            p = lm.model(input_ids=tokens).logits.double().softmax(-1)
        at = [
            (i, j)
            for i, row in enumerate(ids)
            for j in range(len(row) - 1)
            if row[j] not in special and row[j + 1] not in special
        ]
        return [-log(p[i, j, ids[i][j + 1]]) for i, j in at], [p[i, j] for i, j in at]

    (ce, p), (ce_sae, q), (ce_zero, q0) = (
        losses(lambda r: r),
        losses(lambda r: sae.decode(sae.encode(r))),
        losses(torch.zeros_like),
    )
    mean, kl = (
        lambda v: sum(v) / len(v),
        lambda q: sum(float((a * (a / b).log()).sum()) for a, b in zip(p, q)) / len(p),
    )
    m = spliced_metrics(sae, lm, layer, tokens, batch_size=2)
    assert m["n_tokens"] == len(ce) == 2 * 10 + 10 - seed % 5
    want = dict(
        ce_orig=mean(ce), ce_sae=mean(ce_sae), ce_zero=mean(ce_zero), kl_sae=kl(q), kl_zero=kl(q0)
    )
    assert {k: m[k] for k in want} == pytest.approx(want, rel=1e-3, abs=1e-6)
    assert (
        m["ce_loss_score"] * (m["ce_zero"] - m["ce_orig"])
        == pytest.approx(m["ce_zero"] - m["ce_sae"])
        != 0
    )
    assert m["kl_score"] == pytest.approx(
        (want["kl_zero"] - want["kl_sae"]) / want["kl_zero"], abs=1e-3
    )


@settings(quick, max_examples=8)
@given(seeds, st.integers(1, 4))
def test_spliced_depends_on_the_reconstruction_alone(lm, seed, size):
    sae, tokens, g = some_sae(seed), rows(lm, seed), torch.Generator().manual_seed(seed)
    twin = sae.rescale(2 ** (4 * torch.rand(48, generator=g) - 2)).order(
        torch.randperm(48, generator=g)
    )
    m, same = (
        spliced_metrics(sae, lm, 1, tokens),
        spliced_metrics(twin, lm, 1, tokens.flip(0), batch_size=size),
    )
    del (
        m["ce_loss_score"],
        same["ce_loss_score"],
    )  # a quotient of small differences in an untrained model
    assert same == pytest.approx(m, rel=1e-3, abs=1e-6)
