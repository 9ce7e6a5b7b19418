"""Every branch of both absorption scores, end to end, on words whose latents are written by hand.

520 words: letter + ending, unit vectors; the last 4 of 20 endings are test words. The training
words are alike under every exchange of letters or endings, so the fitted probe of a letter is p =
(e_letter - mean of the other letters) * s, with s^2 (1 + 1/25) = 1, s = 0.98058: a word has A = s,
and a unit decoder row with the part r along the letter has c = r s. All ratios q / A are as if p
were the letter itself.
"""

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from atm_sae.evals.absorption import (
    AbsorptionConfig,
    absorption_fraction,
    evaluate_absorption,
    full_absorption,
)
from atm_sae.evals.first_letter import LETTERS, FirstLetterTask, fit_letter_probes
from atm_sae.evals.probes import f1_score

N, TRAIN, S = 20, 16, (25 / 26) ** 0.5  # words of a letter, those for training, A of every word
LETTER, ENDING = torch.arange(26).repeat_interleave(N), torch.arange(N).repeat(26)
X = torch.cat([torch.eye(26)[LETTER], torch.eye(N)[ENDING]], 1)
C = 2  # the letter of the single cases; all others are honest


def first_letter_task(x=X):
    test, letters = ENDING >= TRAIN, [LETTERS[i] for i in LETTER]
    words = pd.DataFrame(
        {
            "text": [f"{k}{int(e)}" for k, e in zip(letters, ENDING)],
            "letter": letters,
            "test": test.numpy(),
        }
    )
    W, b = fit_letter_probes(x[~test], LETTER[~test])
    hit = x[test] @ W.T + b > 0
    return FirstLetterTask(
        words, x, W, b, torch.tensor([f1_score(hit[:, i], LETTER[test] == i) for i in range(26)])
    )


@pytest.fixture(scope="module")
def task():
    return first_letter_task()


class Table:
    "A dictionary given by its latents at each word of x: Z (520, d_sae)."

    def __init__(self, Z, W_dec, x=X):
        self.Z, self.W_dec, self.x, self.seen = Z, W_dec, x, []

    def encode(self, x):
        self.seen.append(len(x))
        return self.Z[torch.cdist(x, self.x).argmin(1)]


def dictionary(cases, mains=1, row=1.0, x=X):
    """One latent a letter; all words are honest but `cases` {(letter, ending): (keep, absorbers)}.

    There the main latents have the values `keep` (one number each), and each absorber (share, r)
    reconstructs `share` of the letter by a row with the part r along it. Letter C has `mains`
    latents that take turns with the endings; the part of its rows along the letter is `row`."""
    Z, W_dec = torch.eye(26)[LETTER], torch.eye(46)[:26]
    W_dec[C, C], W_dec[C, 26] = row, (1 - row**2) ** 0.5
    mine = [C, *range(26, 25 + mains)]
    Z = torch.cat([Z, torch.zeros(520, mains - 1)], 1)
    W_dec = torch.cat([W_dec, W_dec[[C] * (mains - 1)]])
    for i, j in enumerate(mine):
        Z[LETTER == C, j] = (ENDING[LETTER == C] % mains == i).float()
    for (letter, ending), (keep, absorbers) in cases.items():
        word = letter * N + ending
        Z[word, mine if letter == C else [letter]] = torch.tensor(keep).float()
        for share, r in absorbers:
            Z, W_dec = (
                torch.cat([Z, torch.zeros(520, 1)], 1),
                torch.cat([W_dec, torch.zeros(1, 46)]),
            )
            Z[word, -1], W_dec[-1, letter], W_dec[-1, 26 + ending] = share / r, r, (1 - r**2) ** 0.5
    return Table(Z, W_dec, x)


def scores(result, letter=C):
    "The letter's row, and of its words full and fraction."
    words = result.words[result.words.letter == LETTERS[letter]]
    return (
        result.letters[result.letters.first_letter == LETTERS[letter]].iloc[0],
        words.full.tolist(),
        words.fraction.tolist(),
    )


# one altered word of four ---------------------------------------------------

# what the main latent keeps, the absorbers (share of A, part of the row along the letter), full,
# fraction
CASES = {
    "honest": (1, [], 0, 0),  # M = A
    "lost": (0, [], 0, 0),  # M = T = 0
    "absorbed": (0, [(1, 0.7)], 1, 1),  # q / A = 1
    "just enough": (0, [(0.41, 0.7)], 1, 1),  # q / A = 0.41
    "just too little": (0, [(0.39, 0.7)], 0, 0),  # q / A = 0.39
    "more than was lost": (0, [(2, 0.7)], 1, 1),  # q / A = 2
    "shared by two": (0, [(0.3, 0.7), (0.3, 0.7)], 0, 1),  # none of 0.4, T / A = 0.6
    "shared, one suffices": (0, [(0.5, 0.7), (0.3, 0.7)], 1, 1),  # largest 0.5
    "partial": (0.3, [(0.5, 0.7)], 0, 0.625),  # U = min(.5, .7): .5 / .8
    "partial, capped": (0.6, [(0.41, 0.7)], 0, 0.4),  # U = min(.41, .4): .4 / 1
    "partial, too little": (0.6, [(0.39, 0.7)], 0, 0),  # T / A = 0.39
    "partial, two": (0.5, [(0.3, 0.7), (0.15, 0.7)], 0, 0.45 / 0.95),  # T = .45 < .5
    "partial, four": (0.5, [(0.15, 0.7)] * 4, 0, 0.45 / 0.95),  # three of them: T = .45, not .6
    "partial, four of too little": (0.5, [(0.12, 0.7)] * 4, 0, 0),  # T = .36, not .48
    "three largest": (
        0.2,
        [(0.1, 0.7), (0.3, 0.7), (0.1, 0.7), (0.2, 0.7)],
        0,
        0.75,
    ),  # T = .6: .6 / .8
    "weak main latent": (0.05, [(0.41, 0.7)], 0, 0.41 / 0.46),  # U = min(.41, .95)
    "weak main latent, too little": (0.05, [(0.39, 0.7)], 0, 0),  # T / A = 0.39
    "strong main latent": (1.2, [(1, 0.7)], 0, 0),  # M > A
    "both in full": (1, [(1, 0.7)], 0, 0),  # U = min(1, 0)
    "row across the probe": (0, [(1, 0.02)], 0, 0),  # c = 0.0196 < 0.025
    "row nearly across": (0, [(1, 0.05)], 1, 0),  # 0.025 <= c = 0.049 < 0.1
    "row nearly across, main latent fires": (0.5, [(1, 0.05)], 0, 0),  # T = 0
    "row a little along": (0, [(1, 0.2)], 1, 1),  # c = 0.196
    "largest q nearly across": (
        0,
        [(0.6, 0.05), (0.41, 0.7)],
        1,
        1,
    ),  # full by the first, T = .41 of the second
    "largest q across": (0, [(0.6, 0.02), (0.5, 0.7)], 0, 1),  # the largest has c < 0.025; T = .5
    "two against": (
        0.5,
        [(0.45, 0.7), (-0.3, -0.7), (-0.2, 0.7)],
        0,
        0.45 / 0.95,
    ),  # z > 0 > c, and z < 0 < c: T = .45
}


@pytest.fixture(scope="module")
def all_cases(task):
    return evaluate_absorption(
        dictionary({(i, TRAIN + i % 4): case[:2] for i, case in enumerate(CASES.values())}), task
    )


@pytest.mark.parametrize("letter, name", list(enumerate(CASES)))
def test_case(all_cases, letter, name):
    (keep, absorbers, full, fraction), at = CASES[name], letter % 4
    row, fulls, fractions = scores(all_cases, letter)
    assert fulls == [full == 1 and i == at for i in range(4)] and fractions == pytest.approx(
        [fraction * (i == at) for i in range(4)], abs=1e-4
    )
    assert (
        row.num_full_absorption,
        row.num_probe_true_positives,
        row.num_split_features,
        list(row.main_latents),
    ) == (full, 4, 1, [letter])
    assert row.full_absorption_rate == full / 4 and row.mean_absorption_fraction == pytest.approx(
        fraction / 4, abs=1e-4
    )
    word = all_cases.words[all_cases.words.letter == LETTERS[letter]].iloc[at]
    T = sum(sorted((share for share, r in absorbers if r > 0.11 and share > 0), reverse=True)[:3])
    assert [word.A, word.M, word["T"]] == pytest.approx(
        [S, S * keep, S * T], abs=1e-4
    ) and word.silent == (keep == 0)


def test_scores_are_means_over_letters(all_cases):
    full, fraction = [c[2] / 4 for c in CASES.values()], [c[3] / 4 for c in CASES.values()]
    assert all_cases.full == pytest.approx(np.mean(full)) and all_cases.full_std == pytest.approx(
        np.std(full, ddof=1)
    )
    assert [all_cases.fraction, all_cases.fraction_std] == pytest.approx(
        [np.mean(fraction), np.std(fraction, ddof=1)], abs=1e-5
    )
    assert (all_cases.n_split, all_cases.n_split_std) == (1, 0)


def test_absorber_and_detection_are_named(all_cases):
    words = all_cases.words.set_index("text")
    order = {name: i for i, name in enumerate(CASES)}

    def first(name):
        return 26 + sum(
            len(c[1]) for c in list(CASES.values())[: order[name]]
        )  # its first extra latent

    def at(name):
        return words.loc[f"{LETTERS[order[name]]}{TRAIN + order[name] % 4}"]

    for name, nth in [
        ("absorbed", 0),
        ("partial, capped", 0),
        ("shared, one suffices", 0),
        ("three largest", 1),
        ("largest q across", 0),
    ]:
        assert at(name).absorber == first(name) + nth
    assert at("honest").detected and not at("absorbed").detected  # z = 1 as in training, and z = 0


# split latents --------------------------------------------------------------


@pytest.mark.parametrize("mains", [2, 3])
@pytest.mark.parametrize(
    "keep, full, fraction",
    [
        ([0, 0, 0], 1, 1),  # all silent: the absorber has .45 of A
        ([0.5, 0, 0], 0, 0.45 / 0.95),  # one of them fires
        ([0.3, 0.2, 0], 0, 0.45 / 0.95),  # M is their sum
        ([0.7, 0.4, 0], 0, 0),
    ],
)  # M = 1.1
def test_split_latents(task, mains, keep, full, fraction):
    row, fulls, fractions = scores(
        evaluate_absorption(dictionary({(C, 19): (keep[:mains], [(0.45, 0.7)])}, mains), task)
    )
    assert row.num_split_features == mains and set(row.main_latents) == {C, *range(26, 25 + mains)}
    assert fulls == [0, 0, 0, full] and fractions == pytest.approx([0, 0, 0, fraction], abs=1e-4)


def test_mean_number_of_split_latents(task):
    result = evaluate_absorption(dictionary({}, mains=3), task)
    assert result.n_split == pytest.approx((25 + 3) / 26) and result.full == result.fraction == 0


# main latents that point the wrong way, or never fire ------------------------


def test_main_latent_against_the_probe(task):
    words = {
        16: (1.2, [(0.5, 0.7)]),  # M = -.6: fraction 1, but it fires
        17: (0.8, [(0.39, 0.7)]),  # T / A = 0.39
        18: (0, [(0.5, 0.7)]),  # silent
        19: (1, []),
    }  # T = 0
    row, fulls, fractions = scores(
        evaluate_absorption(dictionary({(C, e): w for e, w in words.items()}, row=-0.5), task)
    )
    assert list(row.main_latents) == [C] and fulls == [0, 0, 1, 0] and fractions == [1, 0, 1, 0]


@pytest.mark.parametrize(
    "absorbers, score", [([], 0), ([(1, 0.7)], 1)]
)  # nothing fires at all; each word has a latent of its own
def test_letter_whose_latent_never_fires(task, absorbers, score):
    result = evaluate_absorption(dictionary({(C, e): (0, absorbers) for e in range(N)}), task)
    row, fulls, fractions = scores(result)
    assert (
        fulls == [score] * 4
        and fractions == [score] * 4
        and row.num_split_features == 1
        and row.k_sparse_f1 == 0
    )
    assert result.full == result.fraction == pytest.approx(score / 26)


def test_dictionary_that_never_fires(task):
    result = evaluate_absorption(Table(torch.zeros(520, 26), torch.eye(46)[:26]), task)
    assert result.full == result.fraction == 0 and result.n_split == 1 and len(result.letters) == 26


# which words and letters count ----------------------------------------------


@pytest.mark.parametrize("A", [-0.5, 0.0])
@pytest.mark.parametrize("z", [[0.0, 1.0], [0.3, 1.0], [0.0, 0.0], [-1.0, 1.0]])
def test_negative_projection_counts_for_nothing(A, z):
    z, c, A = torch.tensor([z]), torch.tensor([1.0, 0.7]), torch.tensor([A])
    assert full_absorption(z, c, [0], A).tolist() == [False] and absorption_fraction(
        z, c, [0], A
    ).tolist() == [0]


@pytest.mark.parametrize(
    "part, bias, n",
    [
        (-0.5, 0, 3),
        (0, 0, 3),  # the probe does not find the word
        (-0.5, 3, 4),
        (0, 3, 4),
    ],
)  # a large bias finds it all the same: it counts, as not absorbed
def test_word_without_its_letter(task, part, bias, n):
    x = X.clone()
    x[C * N + 16, C] = part
    odd = replace(task, x=x, b=task.b + bias * (torch.arange(26) == C) * task.W.norm(dim=1))
    result = evaluate_absorption(
        dictionary({(C, 16): (0, [(1, 0.7)]), (C, 17): (0, [(1, 0.7)])}, x=x), odd
    )
    row, fulls, fractions = scores(result)
    assert (
        row.num_probe_true_positives == n
        and row.num_full_absorption == 1
        and row.mean_absorption_fraction == pytest.approx(1 / n)
    )
    assert fulls == [False, True, False, False][-n:] and fractions == pytest.approx(
        [0, 1, 0, 0][-n:]
    )


def blank(letters):
    "The words, but the test words of these letters lack their letter."
    x = X.clone()
    for i in letters:
        x[(LETTER == i) & (ENDING >= TRAIN), i] = 0
    return x


def test_letters_that_the_probe_cannot_find_do_not_count():
    x = blank([C, 5])
    result = evaluate_absorption(
        dictionary({(0, 16): (0, [(1, 0.7)]), (C, 17): (0, [(1, 0.7)])}, x=x), first_letter_task(x)
    )
    assert list(result.letters.first_letter) == [k for k in LETTERS if k not in "CF"] and set(
        result.words.letter
    ) == set(result.letters.first_letter)
    assert result.full == result.fraction == pytest.approx(1 / 4 / 24)


def test_too_few_letters_are_named():
    x = blank(range(7))
    with pytest.raises(ValueError) as e:
        evaluate_absorption(dictionary({}, x=x), first_letter_task(x))
    said = str(e.value)
    assert (
        "only 19 letters" in said
        and "20 are needed" in said
        and all(f"{k} 0.00" in said for k in "ABCDEFG")
        and "H 1.00" not in said
    )
    assert (
        len(
            evaluate_absorption(
                dictionary({}, x=x), first_letter_task(x), AbsorptionConfig(min_letters=19)
            ).letters
        )
        == 19
    )


def test_letter_without_true_positives_makes_no_nan():
    x = blank([C])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluate_absorption(
            dictionary({(0, 16): (0, [(1, 0.7)])}, x=x),
            first_letter_task(x),
            AbsorptionConfig(min_f1=-1.0),
        )
    assert not result.letters.isna().any(axis=None) and result.full == pytest.approx(
        1 / 4 / len(result.letters)
    )


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_rows_encoded_at_a_time(task, size):
    sae = dictionary({(C, 17): (0.3, [(0.5, 0.7)]), (C, 18): (0, [(1, 0.7)])}, mains=2)
    whole = evaluate_absorption(sae, task)
    sae.seen.clear()
    parts = evaluate_absorption(sae, task, batch_size=size)
    assert max(sae.seen) == min(size, 520) and sum(sae.seen) == 520
    assert (
        parts.letters.equals(whole.letters)
        and parts.words.equals(whole.words)
        and parts.config == whole.config
    )


@pytest.mark.parametrize("word", [5, C * N + 17])  # a training word, a test word
def test_latents_that_are_not_numbers_are_no_absence_of_absorption(task, word):
    sae = dictionary({})
    sae.Z[word, C] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        evaluate_absorption(sae, task)
