"""Absorption scores: properties that hold for any dictionary, and a literal re-implementation, word
by word, that they must agree with."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import Phase, assume, given, settings, strategies as st

from atm_sae.evals.absorption import (
    AbsorptionConfig,
    absorbed_projection,
    absorption_fraction,
    evaluate_absorption,
    full_absorption,
)
from atm_sae.evals.first_letter import LETTERS, task_from_activations
from atm_sae.sae.sae import SAE, SAEConfig

CONFIG = AbsorptionConfig(min_letters=1, l1_share=0.2)  # a stronger penalty is quicker to fit
quick = settings(
    max_examples=8, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate]
)  # whole evaluations: seeds do not shrink
many = settings(max_examples=40, deadline=None, derandomize=True)  # formulas


# the definitions, literally --------------------------------------------------


def oracle_full(z, c, main, A):
    for j in main:
        if abs(z[j]) >= 1e-8:
            return 0
    best = max(range(len(z)), key=lambda j: z[j] * c[j])
    if c[best] < 0.025 or A < 0:
        return 0
    return 1 if A > 0 and z[best] * c[best] / A >= 0.4 else 0


def oracle_projections(z, c, main):
    M, others = 0.0, []
    for j in range(len(z)):
        if j in main:
            M += z[j] * c[j]
        elif c[j] >= 0.1 and z[j] * c[j] > 0:
            others.append(z[j] * c[j])
    return M, sum(sorted(others)[-3:])


def oracle_fraction(z, c, main, A):
    M, T = oracle_projections(z, c, main)
    if A <= 0 or M >= A or T / A < 0.4:
        return 0.0
    if M <= 0:
        return 1.0
    U = min(T, A - M)
    return min(max(U / (U + M), 0.0), 1.0)


@dataclass
class Word:
    z: list
    c: list
    main: list
    A: float


def grid(low, high, unit, shift=0.0):
    return st.integers(low, high).map(lambda k: k * unit + shift)  # shifted: no ties by design


ONE_Z = st.one_of(
    st.just(0.0), grid(0, 40, 0.25), st.floats(0, 10), st.sampled_from([1e-9, 1e-6, -0.5])
)
ONE_C = st.one_of(
    grid(-6, 20, 0.05, 0.0013), st.floats(-1, 1), st.sampled_from([0.024, 0.026, 0.099, 0.101])
)


@st.composite
def one_word(draw, least=-4):
    """Latents with many zeros, cosines of both signs and near both thresholds, one to three
    main latents; A at random, or near what they bring."""
    z = draw(st.lists(ONE_Z, min_size=2, max_size=9))
    c = draw(st.lists(ONE_C, min_size=len(z), max_size=len(z)))
    main = draw(
        st.lists(st.integers(0, len(z) - 1), min_size=1, max_size=min(3, len(z)), unique=True)
    )
    M, T = oracle_projections(z, c, main)
    near = M + draw(st.integers(-5, 25)) / 10 * T + 0.0137
    return Word(
        z,
        c,
        main,
        near if near > 0.02 and draw(st.booleans()) else draw(grid(least, 8, 0.5, 0.0137)),
    )


present = one_word(least=1)  # A > 0


def library(w):
    "full, fraction, T of the library, in double precision."
    z, c, A = (torch.tensor(v, dtype=torch.float64) for v in ([w.z], w.c, [w.A]))
    return (
        bool(full_absorption(z, c, w.main, A)),
        float(absorption_fraction(z, c, w.main, A)),
        float(absorbed_projection(z * c, c, w.main)),
    )


def on_the_edge(w):
    """Whether a share lies so near 0.4, M so near A, or two largest q so near each other, that
    rounding decides."""
    q, (M, T) = sorted(z * c for z, c in zip(w.z, w.c)), oracle_projections(w.z, w.c, w.main)
    return (
        w.A > 0
        and min(abs(q[-1] / w.A - 0.4), abs(T / w.A - 0.4), abs(M - w.A), abs(M) or 1) < 1e-9
        or q[-1] - q[-2] < 1e-9 < q[-1]
    )


@settings(many, max_examples=200)
@given(one_word())
def test_formulas_agree_with_the_literal_ones(w):
    assume(not on_the_edge(w))
    full, fraction, T = library(w)
    assert full == oracle_full(w.z, w.c, w.main, w.A) and fraction == pytest.approx(
        oracle_fraction(w.z, w.c, w.main, w.A), abs=1e-9
    )
    assert T == pytest.approx(oracle_projections(w.z, w.c, w.main)[1], abs=1e-12)


def test_the_words_reach_every_branch():
    """Words like those above take each way through the formulas: otherwise the comparison would
    say little."""
    seen = Counter()

    @settings(many, max_examples=200)
    @given(one_word())
    def look(w):
        M, T = oracle_projections(w.z, w.c, w.main)
        f = oracle_fraction(w.z, w.c, w.main, w.A)
        seen[("full", oracle_full(w.z, w.c, w.main, w.A))] += 1
        zero = "A <= 0" if w.A <= 0 else "M >= A" if M >= w.A else "T" if T / w.A < 0.4 else None
        seen[zero or ("M <= 0" if M <= 0 else "U = T" if T < w.A - M else "U = A - M")] += 1
        if 0 < f < 1:
            seen["between"] += 1

    look()
    assert set(seen) == {
        ("full", 0),
        ("full", 1),
        "A <= 0",
        "M >= A",
        "T",
        "M <= 0",
        "U = T",
        "U = A - M",
        "between",
    }, seen
    assert min(seen.values()) >= 3, seen


# the formulas ----------------------------------------------------------------


@many
@given(present, st.integers(0, 8), st.floats(0.01, 5))
def test_a_stronger_absorber_lowers_nothing(w, j, more):
    others = [i for i in range(len(w.z)) if i not in w.main and w.c[i] >= 0.1]
    assume(others)
    full, fraction, T = library(w)
    j = others[j % len(others)]
    w.z[j] = max(w.z[j], 0) + more
    new = library(w)
    assert new[0] >= full and new[1] >= fraction - 1e-9 and new[2] >= T - 1e-12


@many
@given(present, st.floats(0.01, 5))
def test_a_stronger_main_latent_raises_nothing(w, more):
    assume(w.c[w.main[0]] > 0 and w.z[w.main[0]] >= 0)
    full, fraction, T = library(w)
    w.z[w.main[0]] += more
    new = library(w)
    assert new[0] <= full and not new[0] and new[1] <= fraction + 1e-9 and new[2] == T


@many
@given(present, st.floats(0.01, 100))
def test_the_unit_of_activations_does_not_matter(w, unit):
    w.z = [z if abs(z) > 1e-5 else 0.0 for z in w.z]  # but for 1e-8, below which a latent is silent
    bigger = Word([unit * z for z in w.z], w.c, w.main, unit * w.A)
    assume(not on_the_edge(w) and not on_the_edge(bigger))
    old, new = library(w), library(bigger)
    assert new[0] == old[0] and new[1] == pytest.approx(old[1], abs=1e-9)


@many
@given(present)
def test_full_by_a_row_along_the_probe_is_a_fraction_of_one(w):
    assume(not on_the_edge(w))
    full, fraction, _ = library(w)
    top = int(np.argmax(np.array(w.z) * w.c))
    assert 0 <= fraction <= 1 and (not full or w.c[top] < 0.1 or fraction > 1 - 1e-6)


# whole evaluations -----------------------------------------------------------


class Toy:
    "z = relu(x W_enc + b)."

    def __init__(self, W_enc, W_dec, b, number=None):
        self.W_enc, self.W_dec, self.b, self.number = W_enc, W_dec, b, number

    def encode(self, x):
        return (x @ self.W_enc + self.b).relu()

    def to(self, dtype):
        return Toy(self.W_enc.to(dtype), self.W_dec.to(dtype), self.b.to(dtype))

    def order(self, order):
        return Toy(self.W_enc[:, order], self.W_dec[order], self.b[order], order)

    def rescale(self, s):
        return Toy(self.W_enc / s, self.W_dec * s[:, None], self.b / s, self.number)

    def add(self, read, write, b):
        return Toy(
            torch.cat([self.W_enc, read.T], 1),
            torch.cat([self.W_dec, write]),
            torch.cat([self.b, torch.full((len(read),), b)]),
            self.number,
        )


def planted(seed, n_letters=4, n_words=15, noise=0.1):
    """Words that are letter + own direction, in a random basis; one in seven has little of its
    letter. A latent a letter, and one a word; those of two words in three take a share, up to
    all, of the letter from the letter's latent. The first letter's latent is split in two.
    Everything is a little noisy, and there are four random latents."""
    g, n = torch.Generator().manual_seed(seed), n_letters * n_words
    letter, index, d = (
        torch.arange(n_letters).repeat_interleave(n_words),
        torch.arange(n),
        n + n_letters,
    )
    taken = (1.3 * torch.rand(n, generator=g)).clamp(max=1) * (index % 3 > 0)
    basis = torch.linalg.qr(torch.randn(d, d, generator=g))[0]
    letters, own, L = (
        torch.eye(d)[:n_letters],
        torch.eye(d)[n_letters:],
        torch.eye(n_letters)[letter],
    )
    read = torch.cat([letters[:1], letters, own])  # what each latent reads
    read[1 : 1 + n_letters, n_letters:] -= taken * L.T
    read[0, n_letters:] = read[1, n_letters:]
    read[index[:n_words] % 2, n_letters + index[:n_words]] = -1  # the halves of the first letter
    write = torch.cat([letters[:1], letters, taken[:, None] * L @ letters + own])
    read, write = (
        torch.cat([m, torch.randn(4, d, generator=g) / d**0.5]) @ basis for m in (read, write)
    )
    write = write + noise / d**0.5 * torch.randn(write.shape, generator=g)
    strength = torch.where(torch.rand(n, 1, generator=g) < 1 / 7, 0.1, 1.0)
    x = 4 * (strength * L @ letters + own) @ basis + noise * torch.randn(n, d, generator=g)
    words = pd.DataFrame(
        {
            "text": [f"{LETTERS[k]}{i}" for i, k in enumerate(letter)],
            "letter": [LETTERS[k] for k in letter],
        }
    )
    return task_from_activations(x, words, seed), Toy(read.T, write, torch.full((len(read),), -0.3))


seeds = st.integers(0, 10**6)
NUMBERS = [
    "mean_absorption_fraction",
    "full_absorption_rate",
    "num_full_absorption",
    "num_probe_true_positives",
    "num_split_features",
    "k_sparse_f1",
    "probe_f1",
]


def evaluate(sae, task, **options):
    return evaluate_absorption(sae, task, CONFIG, **options)


def assert_same(a, b, where=None):
    "Equal results up to rounding; latent j of a is where[j] of b."
    where = list(range(1000)) if where is None else where
    assert a.letters.first_letter.equals(b.letters.first_letter)
    assert np.allclose(
        a.letters[NUMBERS].astype(float), b.letters[NUMBERS].astype(float), atol=1e-4
    )
    assert [[where[j] for j in m] for m in a.letters.main_latents] == list(
        map(list, b.letters.main_latents)
    )
    for column in ("text", "letter", "silent", "full", "detected"):
        assert a.words[column].equals(b.words[column])
    assert np.allclose(
        a.words[["A", "M", "T", "fraction"]], b.words[["A", "M", "T", "fraction"]], atol=1e-4
    )
    brings = a.words["T"] > 0  # otherwise many latents may share the first place
    assert [where[j] for j in a.words.absorber[brings]] == b.words.absorber[brings].tolist()


@quick
@given(seeds)
def test_every_word_agrees_with_the_literal_formulas(seed):
    task, sae = planted(seed)
    result, p = evaluate(sae, task), dict(zip(LETTERS, task.directions.double()))
    Z, unit = (
        sae.encode(task.x).double() * sae.W_dec.norm(dim=1),
        torch.nn.functional.normalize(sae.W_dec.double(), dim=1),
    )
    found = (
        task.test
        & (task.x @ task.W.T + task.b > 0)[torch.arange(len(task.x)), task.letter]
        & (task.f1 > CONFIG.min_f1)[task.letter]
    )
    assert set(result.words.text) == set(task.words.text[found.numpy()])
    row, main, rates = (
        {w: i for i, w in enumerate(task.words.text)},
        dict(zip(result.letters.first_letter, result.letters.main_latents)),
        {},
    )
    for w in result.words.itertuples():
        z, c, A = (
            Z[row[w.text]].tolist(),
            (unit @ p[w.letter]).tolist(),
            float(task.x[row[w.text]].double() @ p[w.letter]),
        )
        assert task.words.test[row[w.text]] and task.words.letter[row[w.text]] == w.letter
        M, T = oracle_projections(z, c, main[w.letter])
        assert [w.A, w.M, w.T] == pytest.approx([A, M, T], abs=1e-4) and w.silent == all(
            abs(z[j]) < 1e-8 for j in main[w.letter]
        )
        assert w.full == oracle_full(z, c, main[w.letter], A) and w.fraction == pytest.approx(
            oracle_fraction(z, c, main[w.letter], A), abs=1e-3
        )
        rates.setdefault(w.letter, []).append((w.full, w.fraction))
    for k in result.letters.itertuples():
        full, fraction = zip(*rates[k.first_letter])
        assert k.num_full_absorption == sum(full) and k.num_probe_true_positives == len(full)
        assert [k.full_absorption_rate, k.mean_absorption_fraction] == pytest.approx(
            [sum(full) / len(full), sum(fraction) / len(full)]
        )
    assert result.full == pytest.approx(result.letters.full_absorption_rate.mean())
    assert result.fraction == pytest.approx(result.letters.mean_absorption_fraction.mean())


def test_the_planted_words_absorb():
    """Both scores and the number of main latents vary, so that the comparisons have something
    to compare."""
    words, letters = (
        pd.concat(t)
        for t in zip(
            *((r.words, r.letters) for r in (evaluate(*planted(s)[::-1]) for s in range(8)))
        )
    )
    assert words.full.any() and not words.full.all() and words.fraction.between(0.01, 0.99).any()
    assert (
        set(letters.num_split_features) >= {1, 2}
        and letters.probe_f1.between(0.6, 0.99).any()
        and len(letters) < 8 * 4
    )


@quick
@given(
    seeds,
    st.sampled_from(["standard", "topk", "batchtopk", "jumprelu"]),
    st.integers(2, 60),
    st.integers(1, 1000),
)
def test_scores_of_any_sae_lie_between_0_and_1(seed, architecture, d_sae, size):
    task = planted(seed)[0]
    sae = SAE(SAEConfig(task.d_in, d_sae, architecture, k=min(4, d_sae), l1=1.0, seed=seed))
    result = evaluate(sae, task)
    for rate in (
        result.letters.full_absorption_rate,
        result.letters.mean_absorption_fraction,
        result.letters.k_sparse_f1,
        result.words.fraction,
    ):
        assert rate.between(0, 1).all()
    assert (
        0 <= result.full <= 1
        and 0 <= result.fraction <= 1
        and result.letters.num_split_features.between(1, 10).all()
    )
    main = result.letters.main_latents
    assert (
        [len(set(m)) for m in main]
        == [len(m) for m in main]
        == result.letters.num_split_features.tolist()
    )
    assert (
        result.letters.num_full_absorption <= result.letters.num_probe_true_positives
    ).all() and (result.words.silent | ~result.words.full).all()
    assert_same(evaluate(sae, task, batch_size=size), result)


CHANGES = {
    "order of the latents": lambda sae, g: sae.order(torch.randperm(len(sae.W_dec), generator=g)),
    "norms of the decoder rows": lambda sae, g: sae.rescale(
        2 ** (8 * torch.rand(len(sae.W_dec), generator=g) - 4)
    ),
    "latents that never fire": lambda sae, g: sae.add(
        torch.zeros(5, sae.W_dec.shape[1]), torch.randn(5, sae.W_dec.shape[1], generator=g), -1.0
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@quick
@given(seed=seeds)
def test_what_does_not_matter(change, seed):
    task, sae = planted(seed)
    sae.number = torch.arange(len(sae.W_dec))
    changed = CHANGES[change](sae, torch.Generator().manual_seed(seed))
    assert_same(evaluate(changed, task), evaluate(sae, task), changed.number.tolist())


@settings(quick, max_examples=5)
@given(seeds)
def test_same_inputs_same_bytes(seed):
    def once():
        return [
            t.to_csv().encode()
            for r in [evaluate(*planted(seed)[::-1])]
            for t in (r.letters, r.words, r.seeds)
        ]

    assert once() == once()


# half precision --------------------------------------------------------------


def test_bfloat16_changes_little():
    """bfloat16 rounds by at most 2^-9 = 0.2%; inputs, weights, latents and norms add up to less
    than 1% of A = 4. T / A has a density of 2/3 / 1.3 = 0.5 words between 0 and 1. So `full` may
    flip where T / A lies within 0.01 of 0.4, or the main latent's pre-activation within 0.04 of
    zero: in 0.5 * 0.02 + 0.5 * 0.02 = 2% of the words at most. `fraction` jumps by less than 1 in
    the first 1% of them, and moves by less than 1% elsewhere: 2% in the mean."""
    words = []
    for seed in range(8):
        task, sae = planted(seed, n_letters=8, n_words=20, noise=0.02)
        exact, rounded = evaluate(sae, task), evaluate(sae.to(torch.bfloat16), task)
        assert exact.letters[["first_letter", "main_latents"]].equals(
            rounded.letters[["first_letter", "main_latents"]]
        )
        words.append(
            exact.words.assign(full_16=rounded.words.full, fraction_16=rounded.words.fraction)
        )
    words = pd.concat(words)
    assert len(words) > 150 and words.full.any() and words.fraction.between(0.4, 0.99).mean() > 0.2
    assert (words.full != words.full_16).mean() <= 0.02 and (
        words.fraction - words.fraction_16
    ).abs().mean() <= 0.02
    assert (words.fraction != words.fraction_16).any()  # the rounding was real
