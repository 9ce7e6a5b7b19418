"""First-letter absorption: both scores branch by branch, probes, split latents, the whole
evaluation on planted words, caches, messages."""

import copy
import re
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from transformers import BatchEncoding

from atm_sae.evals import absorption as ab
from atm_sae.evals import first_letter as fl
from atm_sae.evals.absorption import (
    AbsorptionConfig,
    absorbed_projection,
    absorption_fraction,
    best_single_latent_f1,
    dominant_absorber,
    encode_words,
    evaluate_absorption,
    full_absorption,
    integrated_effects,
    letter_gap,
    main_latents,
    rank_latents,
)
from atm_sae.evals.first_letter import (
    LETTERS,
    TaskSpec,
    build_task,
    find_words,
    first_letter_prompts,
    fit_letter_probes,
    get_task,
    get_tasks,
    stratified_split,
    task_from_activations,
)
from atm_sae.data.lm import LM, hook_point, tiny_lm
from atm_sae.core import generator
from atm_sae.data.letters import word_vocabulary

T = torch.tensor


class Toy:
    "z = relu(x W_enc + b)."

    def __init__(self, W_enc, W_dec, b=0.0):
        self.W_enc, self.W_dec, self.b, self.b_dec = W_enc, W_dec, b, torch.zeros(W_dec.shape[1])
        self.d_sae, self.d_in = W_dec.shape

    def encode(self, x):
        return (x @ self.W_enc + self.b).relu()

    def decode(self, z):
        return z @ self.W_dec + self.b_dec


N_ENDINGS = 20


def alphabet():
    "26 x 20 words: letter + ending, exact sums of unit vectors."
    letter, ending = (
        torch.arange(26).repeat_interleave(N_ENDINGS),
        torch.arange(N_ENDINGS).repeat(26),
    )
    x = torch.cat([torch.eye(26)[letter], torch.eye(N_ENDINGS)[ending]], 1)
    return (
        x,
        pd.DataFrame(
            {
                "text": [f"{LETTERS[k]}{e}" for k, e in zip(letter, ending)],
                "letter": [LETTERS[k] for k in letter],
            }
        ),
        ending,
    )


def alphabet_sae(absorbed, keep=0.0):
    """Words with the first `absorbed` endings get a latent of their own; the letter's latent
    keeps the part `keep` there."""
    x, _, ending = alphabet()
    pairs = x[ending < absorbed]
    plain = torch.eye(26 + N_ENDINGS)
    plain[:26, 26 : 26 + absorbed] = keep - 1
    plain[26 : 26 + absorbed, :26] = -1
    decode = pairs.clone()
    decode[:, :26] *= 1 - keep
    return Toy(
        torch.cat([plain, pairs]).T,
        torch.cat([torch.eye(26 + N_ENDINGS), decode]),
        torch.cat([torch.zeros(26 + N_ENDINGS), -torch.ones(len(pairs))]),
    )


@pytest.fixture(scope="module")
def task():
    x, words, _ = alphabet()
    return task_from_activations(x, words, model="alphabet", layer=0)


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def lm_task(lm):
    return build_task(lm, 1, n_icl=1, max_words=150)


# one word -------------------------------------------------------------------


@pytest.mark.parametrize(
    "z, c, main, A, full",
    [
        ([0, 8], [1, 0.5], [0], 10, True),  # silent, q = 4 of 10
        ([0, 7.9], [1, 0.5], [0], 10, False),  # q = 3.95: not enough
        ([1e-6, 8], [1, 0.5], [0], 10, False),  # the main latent fires
        ([1e-9, 8], [1, 0.5], [0], 10, True),  # below 1e-8 counts as silent
        ([0, 8], [1, 0.5], [0], -10, False),  # A < 0
        ([0, 8], [1, -0.5], [0], 10, False),  # q < 0
        ([0, 1000], [1, 0.024], [0], 10, False),  # cosine too small
        ([0, 1000], [1, 0.026], [0], 10, True),
        ([0, 0, 8], [1, 1, 0.5], [0, 1], 10, True),  # two main latents, both silent
        ([0, 1, 8], [1, 1, 0.5], [0, 1], 10, False),  # one of them fires
        ([0, 0], [1, 0.5], [0], 10, False),  # nothing fires at all
    ],
)
def test_full_absorption(z, c, main, A, full):
    assert full_absorption(
        T([z], dtype=torch.float), T(c, dtype=torch.float), main, T([float(A)])
    ).tolist() == [full]


@pytest.mark.parametrize(
    "z, c, main, A, fraction",
    [
        ([10, 8], [1, 0.5], [0], 10, 0),  # M = A: nothing missing
        ([12, 8], [1, 0.5], [0], 10, 0),  # M > A
        ([6, 7.8], [1, 0.5], [0], 10, 0),  # T / A = 0.39
        ([0, 8], [1, 0.5], [0], 10, 1),  # silent
        ([4, 8], [-0.5, 0.5], [0], 10, 1),  # M = -2
        ([6, 8], [1, 0.5], [0], 10, 0.4),  # U = 4: 4 / (4 + 6)
        ([4, 8], [1, 0.5], [0], 10, 0.5),  # U = min(4, 6)
        ([6, 8, 8], [1, 0.5, 0.5], [0], 10, 0.4),  # second absorber, U = min(8, 4)
        (
            [5, 3, 3, 3, 3],
            [1, 0.5, 0.5, 0.5, 0.5],
            [0],
            10,
            4.5 / 9.5,
        ),  # only three absorbers: T = 4.5
        ([3, 3, 8], [1, 1, 0.5], [0, 1], 10, 0.4),  # two main latents
        ([0, 1000], [1, 0.09], [0], 10, 0),  # cosine below 0.1
        ([6, 8, 9], [1, 0.5, -0.5], [0], 10, 0.4),  # a negative q does not count
        ([6, 8], [1, 0.5], [0], -10, 0),  # A < 0
        ([-1, 8], [1, 0.5], [0], 10, 1),  # signed latents: M < 0
    ],
)
def test_absorption_fraction(z, c, main, A, fraction):
    got = absorption_fraction(
        T([z], dtype=torch.float), T(c, dtype=torch.float), main, T([float(A)])
    )
    assert got.item() == pytest.approx(fraction)


def test_thresholds_come_from_the_config():
    z, c, A = T([[0.0, 3]]), T([1.0, 0.5]), T([10.0])
    assert not full_absorption(z, c, [0], A) and full_absorption(
        z, c, [0], A, AbsorptionConfig(share=0.1)
    )
    q = T([[0.0, 3, 2, 1]])
    assert absorbed_projection(q, T([1.0, 1, 1, 1]), [0], AbsorptionConfig(absorbers=2)).item() == 5
    assert absorbed_projection(q[:, :1], T([1.0]), [0]).item() == 0  # no other latent at all


# probes ---------------------------------------------------------------------


def test_letter_probes_do_not_depend_on_the_unit():
    x, words, _ = alphabet()
    letter = T([LETTERS.index(k) for k in words.letter])
    W, b = fit_letter_probes(x, letter)
    W2, b2 = fit_letter_probes(1000 * x, letter)
    assert torch.allclose(W, 1000 * W2, atol=1e-4) and torch.allclose(b, b2, atol=1e-4)


def test_letters_without_words_get_no_probe():
    W, b = fit_letter_probes(torch.eye(4), T([0, 0, 1, 1]))
    assert W[2:].abs().sum() == 0 and (b[2:] == -1).all() and W[0].abs().sum() > 0


def test_ranking_finds_the_letter_and_ignores_negative_weights():
    y = T([True] * 10 + [False] * 30)
    letter, other = y.float() * 3, (~y).float() * 3
    noise = torch.rand(40, generator=torch.Generator().manual_seed(0))
    z = sparse.csr_matrix(torch.stack([noise, other, letter], 1).numpy())
    (ranked,) = rank_latents(z, y[:, None].numpy())
    assert ranked[0] == 2 and 1 not in ranked
    assert len(rank_latents(sparse.csr_matrix((40, 3)), y[:, None].numpy())[0]) == 0


def test_main_latents_stop_at_the_first_failure():
    y = T([1, 1, 1, 1, 0, 0, 0, 0]).bool()
    a, b, junk = (
        T([5.0, 5, 0, 0, 0, 0, 0, 0]),
        T([0.0, 0, 5, 5, 0, 0, 0, 0]),
        T([1.0, 0, 1, 0, 1, 0, 1, 0]),
    )

    def run(*cols):
        return main_latents(
            torch.stack(cols, 1)[None], y[None], torch.stack(cols, 1)[None], y[None]
        )

    k, f1, hit = run(a, b, junk)
    assert (k, f1) == (2, 1) and torch.equal(hit[0], y)
    assert run(a, junk, b)[0] == 1  # b would help, but junk before it does not
    assert run(junk)[0] == 1  # k = 1 always passes
    assert run(a)[1].item() == pytest.approx(2 / 3)
    both = [
        torch.stack([a, b], 1),
        torch.stack([junk, 0 * junk], 1),
    ]  # letters side by side; zeros where there is no more
    assert main_latents(torch.stack(both), y.expand(2, 8), torch.stack(both), y.expand(2, 8))[
        0
    ].tolist() == [2, 1]


# prompts --------------------------------------------------------------------


def test_prompts():
    words = pd.DataFrame({"text": [" short", " apple", "Zoo", " bee"], "letter": list("SAZB")})
    prompts, ends = first_letter_prompts(words, n_icl=3, seed=0)
    for word, prompt, end in zip(words.text, prompts, ends):
        lines = prompt.split("\n")
        assert (
            prompt[0] == "\n" and len(lines) == 5 and lines[-1] == f"{word} has the first letter:"
        )
        assert prompt[end] == word[-1] and prompt[: end + 1].endswith("\n" + word)
        assert not any(line.startswith(f"{word} has") for line in lines[:-1])
        assert all(line.split()[-1] == line.strip()[0].upper() for line in lines[1:-1])
    assert (
        first_letter_prompts(words, 3, seed=0)[0]
        == prompts
        != first_letter_prompts(words, 3, seed=1)[0]
    )


def shared_lines(prompts):
    "The answered lines of each prompt, as one text."
    return [prompt[: prompt.rindex("\n")] for prompt in prompts]


def test_groups_share_answered_lines_that_hold_none_of_their_words():
    names = [f" {a}{b}{c}" for a in "abcdefgh" for b in "xyz" for c in "pqrs"]
    words = pd.DataFrame({"text": names, "letter": [name[1].upper() for name in names]})
    prompts, ends = first_letter_prompts(words, n_icl=4, seed=0, group=20)
    for word, prompt, end in zip(words.text, prompts, ends):
        assert prompt[: end + 1].endswith("\n" + word) and prompt.count("\n") == 5
    shared = pd.Series(shared_lines(prompts))
    assert sorted(shared.value_counts()) == [16, 20, 20, 20, 20]
    for text, members in words.groupby(shared):
        assert not any(f"\n{word} has" in text for word in members.text)
        assert members.letter.nunique() > 4  # a random sample, not neighbours of the vocabulary
    assert first_letter_prompts(words, 4, 0, 20) == (prompts, ends)
    assert shared_lines(first_letter_prompts(words, 4, 1, 20)[0]) != list(shared)


def test_groups_of_one_word_have_lines_of_their_own():
    "Drawn as before there were groups: the lines of a word are those of its turn."
    names = [f"{a}{b}" for a in "abcdef" for b in "xyz"]
    words = pd.DataFrame({"text": names, "letter": [name[0].upper() for name in names]})
    prompts, _ = first_letter_prompts(words, n_icl=3, seed=5, group=1)
    rng = np.random.default_rng(generator(5, "prompts").initial_seed())
    for i, prompt in enumerate(prompts):
        drawn = [j + (j >= i) for j in rng.choice(len(words) - 1, 3, replace=False)]
        found = [line.split()[0] for line in prompt.split("\n")[1:]]
        assert found == [names[j] for j in [*drawn, i]]


def test_few_words_are_smaller_groups():
    words = pd.DataFrame({"text": [" a", " b", " c", " d"], "letter": list("ABCD")})
    shared = shared_lines(first_letter_prompts(words, n_icl=3)[0])
    assert len(set(shared)) == 4
    shared = shared_lines(first_letter_prompts(words, n_icl=2)[0])
    assert len(set(shared)) == 2
    with pytest.raises(ValueError, match="group is 0: a group holds at least 1 word"):
        first_letter_prompts(words, 2, group=0)


def test_words_need_a_tokenizer_that_knows_where_its_tokens_lie(lm):
    class Slow(type(lm.tokenizer)):
        def __call__(self, *arguments, **more):
            return BatchEncoding(dict(super().__call__(*arguments, **more)))

    slow = copy.copy(lm.tokenizer)
    slow.__class__ = Slow
    with pytest.raises(ValueError, match="Slow does not say where a token lies"):
        find_words(slow, ["\na"], [1], [5])


def test_words_of_the_template_are_read_at_their_own_place(lm):
    words = word_vocabulary(lm.tokenizer)
    prompts, ends = first_letter_prompts(words, 2)
    tokens, at, found = find_words(lm.tokenizer, prompts, ends, words.token_id)
    assert found.all() and (tokens[:, 0] == lm.tokenizer.bos_token_id).all()
    newline = lm.tokenizer("\n")["input_ids"][0]
    rows = torch.arange(len(tokens))
    assert (tokens[rows, at] == T(words.token_id.to_numpy())).all() and (
        tokens[rows, at - 1] == newline
    ).all()
    assert {" has", " the", " first"} <= set(words.text)


def test_split_is_stratified_and_seeded():
    letter = T([0] * 50 + [1] * 10 + [2])
    test = stratified_split(letter, seed=3)
    assert [int(test[letter == i].sum()) for i in range(3)] == [10, 2, 0]
    assert torch.equal(test, stratified_split(letter, seed=3)) and not torch.equal(
        test, stratified_split(letter, seed=4)
    )


# the whole evaluation -------------------------------------------------------


@pytest.mark.parametrize("absorbed", [0, 5, 12])
def test_planted_words_are_counted_exactly(task, absorbed):
    _, words, ending = alphabet()
    result = evaluate_absorption(alphabet_sae(absorbed), task)
    truth = [
        float((ending[(words.letter == k).to_numpy() & words_test] < absorbed).float().mean())
        for k in LETTERS
        for words_test in [task.test.numpy()]
    ]
    assert np.allclose(result.letters.full_absorption_rate, truth) and np.allclose(
        result.letters.mean_absorption_fraction, truth
    )
    assert result.full == pytest.approx(np.mean(truth)) and result.full_std == pytest.approx(
        np.std(truth, ddof=1)
    )


def test_partial_absorption_is_seen_by_the_fraction_alone(task):
    result = evaluate_absorption(alphabet_sae(5, keep=0.4), task)
    partly = result.words[result.words.fraction > 0]
    assert result.full == 0 and len(partly) and np.allclose(partly.fraction, 0.6, atol=0.05)


def loud_words(every):
    "The alphabet with every so-manieth word 400 times as loud, and which words these are."
    x, words, _ = alphabet()
    loud = torch.arange(len(x)) % every == 0
    return torch.where(loud[:, None], 400 * x, x), words, loud


def test_outliers_are_left_out_of_probes_and_scores(task):
    x, words, loud = loud_words(37)
    spoilt = task_from_activations(x, words, model="alphabet", layer=0)
    assert (spoilt.f1 > 0.9).all()
    rest = task_from_activations(x[~loud], words[~loud.numpy()].reset_index(drop=True))
    assert torch.nn.functional.cosine_similarity(spoilt.W, rest.W).min() > 0.95
    sae = alphabet_sae(5)
    result = evaluate_absorption(sae, [spoilt, replace(spoilt, spec=TaskSpec(seed=1))])
    clean = evaluate_absorption(sae, spoilt.only(~loud))
    assert result.config["n_outliers"] == 2 * int(loud.sum()) and result.config["n_words"] == 520
    assert clean.config["n_outliers"] == 0 and result.full == clean.full
    assert result.words[result.words.eval_seed == 0].equals(clean.words)
    assert not set(result.words.text) & set(words.text[loud.numpy()])
    best = best_single_latent_f1(sae, spoilt)
    assert best.equals(best_single_latent_f1(sae, spoilt.only(~loud)))


def test_the_limit_of_the_sae_comes_first(task):
    sae = alphabet_sae(5)
    sae.max_norm = 1.0  # every word has the norm 1.41
    with pytest.raises(ValueError, match="all 520 activations are outliers"):
        evaluate_absorption(sae, task)
    sae.max_norm = np.inf
    x, words, _ = loud_words(37)
    spoilt = task_from_activations(x, words)
    assert evaluate_absorption(sae, spoilt).config["n_outliers"] == 0


def test_some_words_of_a_task(lm_task):
    chosen = torch.arange(len(lm_task.words)) % 3 == 1
    part = lm_task.only(chosen)
    assert part.words.text.tolist() == lm_task.words.text[chosen.numpy()].tolist()
    assert torch.equal(part.x, lm_task.x[chosen]) and torch.equal(part.W, lm_task.W)
    assert torch.equal(part.tokens, lm_task.tokens[chosen]) and part.position == lm_task.position
    assert torch.equal(part.letter, lm_task.letter[chosen])
    assert torch.equal(part.hits, lm_task.hits[:, chosen])


def test_activations_of_another_kind():
    x, words, _ = alphabet()
    half = task_from_activations(x.bfloat16(), words)
    assert half.x.dtype == torch.float32 and torch.equal(half.W, task_from_activations(x, words).W)
    for wrong, got in ((x.numpy(), "ndarray"), (x.long(), "torch.int64")):
        with pytest.raises(TypeError, match=f"activations at the words: .*got {got}"):
            task_from_activations(wrong, words)


def test_table_columns_and_means(task):
    result = evaluate_absorption(alphabet_sae(5), task)
    for column in (
        "first_letter",
        "mean_absorption_fraction",
        "full_absorption_rate",
        "num_full_absorption",
        "num_probe_true_positives",
        "num_split_features",
    ):
        assert column in result.letters
    assert (
        result.letters.num_full_absorption / result.letters.num_probe_true_positives
        == result.letters.full_absorption_rate
    ).all()
    assert (
        result.full == result.letters.full_absorption_rate.mean()
        and result.n_split_std == result.letters.num_split_features.std()
    )
    assert result.config["n_words"] == 520 and result.config["l2"] == 1


def test_evaluation_seeds_are_scored_apart_and_averaged(task):
    x, words, _ = alphabet()
    sae, tasks = alphabet_sae(5), [task_from_activations(x, words, seed) for seed in range(3)]
    three = evaluate_absorption(sae, tasks)
    apart = [evaluate_absorption(sae, task) for task in tasks]
    full = [r.full for r in apart]
    assert three.seeds.index.tolist() == three.config["seeds"] == [0, 1, 2]
    assert three.seeds.full.tolist() == full and len(set(full)) > 1
    assert three.full == pytest.approx(np.mean(full))
    assert three.noise.full == pytest.approx(np.std(full, ddof=1))
    assert len(three.letters) == 78 and np.isnan(apart[0].noise.full)
    assert apart[1].letters.eval_seed.unique() == [1]
    assert np.isnan(three.ablation) and "ablation" not in three.seeds


def test_tasks_that_cannot_be_scored_together(task):
    sae = alphabet_sae(5)
    with pytest.raises(ValueError, match="no task to score on"):
        evaluate_absorption(sae, [])
    with pytest.raises(
        ValueError, match=r"seeds are \[0, 0\], but each must have a seed of its own"
    ):
        evaluate_absorption(sae, [task, task])
    with pytest.raises(ValueError, match="different places.*score them apart"):
        evaluate_absorption(sae, [task, replace(task, spec=TaskSpec(layer=1, seed=1))])


def test_tasks_of_several_seeds_have_other_prompts(lm, tmp_path, monkeypatch):
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path))
    first, second = get_tasks("nano-gemma2", 0, [0, 1], n_icl=1, max_words=40)
    assert (first.seed, second.seed) == (0, 1) and not second.words.equals(first.words)
    assert (second.spec.n_icl, second.spec.max_words) == (1, 40)
    assert torch.equal(second.x, get_task("nano-gemma2", 0, seed=1, n_icl=1, max_words=40).x)


def test_decoder_norms_are_folded(task):
    sae = alphabet_sae(5)
    twin = Toy(sae.W_enc / 4, sae.W_dec * 4, sae.b / 4)
    assert evaluate_absorption(twin, task).letters.equals(evaluate_absorption(sae, task).letters)


def test_encoding_in_batches(task):
    z, unit = encode_words(alphabet_sae(5), task.x)
    z2, _ = encode_words(alphabet_sae(5), task.x, batch_size=7)
    assert (z != z2).nnz == 0 and torch.allclose(unit.norm(dim=1), torch.ones(len(unit)))


def test_a_latent_that_never_fires_is_main_only_if_nothing_better_is_there(task):
    silent = Toy(torch.zeros(46, 46), torch.eye(46))
    result = evaluate_absorption(silent, task)
    assert (
        result.full == result.fraction == 0
        and (result.letters.main_latents.str[0] == np.arange(26)).all()
    )


def test_best_single_latent(task):
    table = best_single_latent_f1(alphabet_sae(0), task)
    assert (
        (table.f1 == 1).all()
        and (table.latent == np.arange(26)).all()
        and list(table.letter) == list(LETTERS)
    )


# messages -------------------------------------------------------------------


def test_width_of_another_model(task):
    with pytest.raises(
        ValueError, match="the SAE reads activations of width 3, the task has width 46"
    ):
        evaluate_absorption(Toy(torch.eye(3), torch.eye(3)), task)


def test_too_few_letters(task):
    poor = replace(task, f1=torch.where(torch.arange(26) < 19, 1.0, 0.25))
    with pytest.raises(ValueError) as e:
        evaluate_absorption(alphabet_sae(0), poor)
    assert (
        "only 19 letters" in str(e.value)
        and "T 0.25" in str(e.value)
        and "Z 0.25" in str(e.value)
        and "S 0.25" not in str(e.value)
    )
    enough = replace(task, f1=torch.where(torch.arange(26) < 20, 1.0, 0.25))
    assert len(evaluate_absorption(alphabet_sae(0), enough).letters) == 20


def test_nan_activations():
    x, words, _ = alphabet()
    x[3, 1] = torch.nan
    with pytest.raises(ValueError, match="activations at the words: 1 NaN"):
        task_from_activations(x, words)


def test_tokenizer_without_words(lm):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    digits = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({str(i): i for i in range(10)}, unk_token="0"))
    )
    with pytest.raises(ValueError, match="a tokenizer without word tokens"):
        build_task(LM(lm.model, digits, "digits", "digits", "0"), 1)


def test_model_without_that_layer(lm):
    with pytest.raises(ValueError, match="no layer 7"):
        build_task(lm, 7, n_icl=1, max_words=20)


# the cache ------------------------------------------------------------------


def test_task_cache(lm, tmp_path, monkeypatch):
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path))
    made = get_task(lm, 1, seed=2, n_icl=1, max_words=60)
    monkeypatch.setattr(fl, "build_task", lambda *a, **k: pytest.fail("built again"))
    again = get_task(lm, 1, seed=2, n_icl=1, max_words=60)
    assert (
        torch.equal(made.x, again.x)
        and made.words.equals(again.words)
        and torch.equal(made.W, again.W)
        and again.position == -6
    )
    (file,) = tmp_path.glob("tasks/*/task.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        ValueError,
        match="task.safetensors is truncated or changed.*delete the folder and run again",
    ):
        get_task(lm, 1, seed=2, n_icl=1, max_words=60)
    file.unlink()
    with pytest.raises(ValueError, match="task.safetensors is missing"):
        get_task(lm, 1, seed=2, n_icl=1, max_words=60)


def test_same_seed_same_task(lm, lm_task):
    again = build_task(lm, 1, n_icl=1, max_words=150)
    assert (
        torch.equal(again.x, lm_task.x)
        and torch.equal(again.W, lm_task.W)
        and torch.equal(again.test, lm_task.test)
    )
    other = build_task(lm, 1, seed=1, n_icl=1, max_words=150)
    assert not other.words.equals(lm_task.words)


@pytest.mark.parametrize("group", [1, 7, 32])
def test_activations_are_those_at_the_word(lm, group):
    from atm_sae.data.lm import residual_stream

    task = build_task(lm, 1, n_icl=1, max_words=60, group=group)
    whole = residual_stream(lm, task.tokens.long(), 1)
    assert torch.allclose(whole[torch.arange(60), task.at], task.x, rtol=1e-4, atol=1e-5)
    prefixes = task.tokens[:, : int(task.at[0])].unique(dim=0)
    assert len(prefixes) <= -(-60 // group) and (group > 1 or len(prefixes) > 30)


def test_only_words_with_a_leading_space(lm):
    task = build_task(lm, 1, n_icl=1, max_words=60, spaced=True)
    assert len(task.words) == 60 and task.words.text.str.startswith(" ").all() and task.spec.spaced
    every = build_task(lm, 1, n_icl=1, max_words=60)
    assert not every.words.text.str.startswith(" ").all() and not every.spec.spaced
    result = evaluate_absorption(halves_of(32), task, AbsorptionConfig(min_f1=0, min_letters=1))
    assert (result.config["spaced"], result.config["group"]) == (True, 32)


def test_the_task_keeps_its_spec(lm, tmp_path):
    task = build_task(lm, 1, 3, n_icl=2, max_words=60, site="mlp_out", group=7)
    spec = TaskSpec(1, 3, 2, 60, "mlp_out", False, 7)
    assert task.spec == spec and (task.layer, task.site, task.seed) == (1, "mlp_out", 3)
    assert task.choices == dict(n_icl=2, max_words=60, spaced=False, group=7)
    assert task.lm_dtype == "float32"
    fl.save_task(task, tmp_path)
    again = fl.load_task(tmp_path)
    assert (again.spec, again.lm_dtype, again.l2) == (spec, "float32", 1.0)
    with pytest.raises(TypeError, match="max_word"):
        build_task(lm, 1, max_word=60)


def test_no_prompts_no_lines(task):
    assert task.tokens is None and task.choices["n_icl"] is task.choices["group"] is None


def test_a_model_by_its_name_is_loaded_in_the_fastest_dtype(tmp_path, monkeypatch):
    asked = []

    def load(name, dtype):
        asked.append((name, dtype))
        return tiny_lm()

    monkeypatch.setattr(fl, "load_lm", load)
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path))
    get_task("tiny", 1, n_icl=1, max_words=60)
    assert asked == [("tiny", "auto")]


def test_which_words_and_groups_are_part_of_the_name(lm):
    ways = (dict(), dict(spaced=True), dict(group=1), dict(max_words=60))
    assert len({fl.task_artefact(lm, TaskSpec(1, **way)).key for way in ways}) == 4


# effects --------------------------------------------------------------------


def test_letter_gap():
    logits = torch.zeros(1, 26)
    logits[0, 2], logits[0, 3] = 5.0, 2.5
    assert letter_gap(logits, T([2])).item() == pytest.approx(5 - 2.5 / 25)


def test_dominant_absorber():
    effects = T([[3.0, 2, 0], [2.5, 2, 0], [0, 1, 3]])
    assert dominant_absorber(effects, T([0.5, 0.5, 0.01])).tolist() == [True, False, False]


def path(sae, lm_task, rows, alphas):
    "Points of the stream between the SAE's latents at zero and as they are."
    x = lm_task.x[rows]
    return torch.stack([x - (1 - a) * sae.encode(x) @ sae.W_dec for a in alphas], 1)


def halves_of(d_in):
    "A toy that covers half of a stream."
    half = torch.eye(d_in)[: d_in // 2]
    return Toy(torch.cat([half, -half]).T, torch.cat([half, -half]))


@pytest.fixture(scope="module")
def halves():
    return halves_of(32)


def test_gaps_are_those_of_whole_prompts(lm, lm_task, halves):
    from atm_sae.data.lm import next_token_logits, splice

    rows, at = torch.arange(3), lm_task.at[:3]
    stream = path(halves, lm_task, rows, (0.0, 0.3))
    ids = T([lm.tokenizer(f" {k}")["input_ids"][0] for k in LETTERS])
    for j in range(2):

        def put(resid, j=j):
            return resid.index_put((torch.arange(3), at), stream[:, j])

        with splice(lm, 1, put):
            logits = next_token_logits(lm, lm_task.tokens[rows].long())
        assert torch.allclose(
            ab.word_gaps(lm, lm_task, rows, stream)[:, j],
            letter_gap(logits[:, ids], lm_task.letter[rows]),
            atol=1e-5,
        )


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out"])
def test_the_protocol_at_another_site(lm, halves, site):
    "The word's own activations change no gap; zeros there give the gap of a spliced model."
    from atm_sae.data.lm import next_token_logits, read_site, splice

    task = build_task(lm, 1, n_icl=1, max_words=60, site=site)
    rows, at, prompts = torch.arange(3), task.at[:3], task.tokens[:3].long()
    assert torch.allclose(read_site(lm, prompts, 1, site)[rows, at], task.x[rows], atol=1e-5)
    ids = T([lm.tokenizer(f" {k}")["input_ids"][0] for k in LETTERS])
    gaps = ab.word_gaps(lm, task, rows, torch.stack([task.x[rows], 0 * task.x[rows]], 1))
    plain = next_token_logits(lm, prompts)
    with splice(lm, 1, lambda x: x.index_put((rows, at), 0 * task.x[rows]), site):
        zeros = next_token_logits(lm, prompts)
    for j, logits in enumerate((plain, zeros)):
        assert torch.allclose(gaps[:, j], letter_gap(logits[:, ids], task.letter[rows]), atol=1e-5)
    assert not torch.allclose(gaps[:, 0], gaps[:, 1], atol=1e-3)
    halves.metadata = hook_point(lm.name, 1)
    with pytest.raises(ValueError, match=f"hook_resid_post.*the task reads .*hook_{site}"):
        evaluate_absorption(halves, task)
    del halves.metadata
    assert len(ab.integrated_effects(halves, lm, task, rows)) == 3


def test_effects_add_up(lm, lm_task, halves):
    rows = torch.arange(5)
    m0, m1 = ab.word_gaps(lm, lm_task, rows, path(halves, lm_task, rows, (0.0, 1.0))).detach().T
    effects = integrated_effects(halves, lm, lm_task, rows)
    assert effects.shape == (5, 32) and torch.allclose(effects.sum(1), m1 - m0, atol=1e-4)
    assert (
        effects[lm_task.x[rows] @ halves.W_enc <= 0] == 0
    ).all()  # what does not fire has no effect


def test_ablation_absorbed(lm, lm_task, task, halves, monkeypatch):
    rows = [3, 0, 7]
    p = lm_task.directions[lm_task.letter[rows]]
    c = p @ halves.W_dec.T

    def effects(sae, lm, task, part, points):
        return torch.stack(
            [(4.0 - i) * (torch.arange(32) == c[i].argmax()) for i in range(len(part))]
        )

    monkeypatch.setattr(ab, "integrated_effects", effects)
    assert (
        ab.ablation_absorbed(halves, lm, lm_task, rows).tolist() == [True] * 3
    )  # led by 4, 3, 2, along the probe
    monkeypatch.setattr(ab, "integrated_effects", lambda *a: 0.5 * effects(*a))
    assert ab.ablation_absorbed(halves, lm, lm_task, rows).tolist() == [True, True, True]
    monkeypatch.setattr(ab, "integrated_effects", lambda *a: 0.3 * effects(*a))
    assert ab.ablation_absorbed(halves, lm, lm_task, rows).tolist() == [
        True,
        False,
        False,
    ]  # 1.2, 0.9, 0.6: the margin is 1
    assert len(ab.ablation_absorbed(halves, lm, lm_task, [])) == 0
    memory_mapped = np.array(rows)
    memory_mapped.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ab.ablation_absorbed(halves, lm, lm_task, memory_mapped)) == 3
    with pytest.raises(ValueError, match="without prompts"):
        ab.ablation_absorbed(halves, lm, task, rows)
    with pytest.raises(ValueError, match="built with tiny.*, not with other"):
        ab.ablation_absorbed(halves, replace(lm, name="other"), lm_task, rows)


def test_third_score_counts_candidates_only(lm, lm_task, monkeypatch):
    easy = replace(lm_task, f1=torch.ones(26), b=torch.full((26,), 99.0))  # every probe is right
    silent = Toy(torch.zeros(32, 32), torch.eye(32))
    asked = []

    def absorbed(sae, lm, task, rows):
        asked.extend(rows.tolist())
        return torch.arange(len(rows)) % 2 == 0

    monkeypatch.setattr(ab, "ablation_absorbed", absorbed)
    present = [
        i
        for i in range(26)
        if (lm_task.letter[lm_task.test] == i).any() and (lm_task.letter[~lm_task.test] == i).any()
    ]
    easy.f1[[i for i in range(26) if i not in present]] = 0.0
    result = evaluate_absorption(silent, easy, AbsorptionConfig(min_letters=1), lm=lm)
    candidate = result.words.silent & ~result.words.detected
    assert (
        len(asked) == candidate.sum()
        and result.words.ablated.sum() == (candidate.sum() + 1) // 2
        and not result.words.ablated[~candidate].any()
    )
    assert result.ablation == pytest.approx(result.words.groupby("letter").ablated.mean().mean())


def test_a_model_that_looks_ahead_is_refused(lm, halves, lm_task):
    from transformers import BertConfig, BertLMHeadModel

    bert = BertLMHeadModel(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
        )
    ).eval()
    both_ways = LM(bert, lm.tokenizer, lm_task.model, "", "0")
    with pytest.raises(ValueError, match="is not causal: a later token changes"):
        ab.ablation_absorbed(halves, both_ways, lm_task, [0])
    with pytest.raises(ValueError, match="is not causal"):
        build_task(both_ways, 1)


def test_an_sae_of_another_hook_is_refused(lm_task):
    sae = Toy(torch.eye(32), torch.eye(32))
    sae.metadata = dict(model_name=lm_task.model, hook_name="blocks.0.hook_resid_post", more=1)
    with pytest.raises(
        ValueError,
        match=r"trained on .*blocks.0.hook_resid_post.*the task reads .*blocks.1.hook_resid_post",
    ):
        evaluate_absorption(sae, lm_task)
    sae.metadata["hook_name"] = "blocks.1.hook_resid_post"
    with pytest.raises(ValueError, match="letters have a probe"):
        evaluate_absorption(sae, lm_task)  # it fits; the random model cannot spell


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(max_k=0), "max_k = 0, but it must be at least 1"),
        (dict(share=0.0), r"share = 0.0, but it must lie in \(0, 1\]"),
        (dict(l1_share=2.0), "l1_share = 2.0"),
    ],
)
def test_impossible_settings(settings, text):
    with pytest.raises(ValueError, match=text):
        AbsorptionConfig(**settings)


def test_too_few_words_and_equal_activations(lm):
    with pytest.raises(
        ValueError,
        match=(
            "5 words, but a prompt needs 10 others besides its own: raise max_words or lower n_icl"
        ),
    ):
        build_task(lm, 1, max_words=5)
    with pytest.raises(ValueError, match="all alike: no probe can read anything"):
        fit_letter_probes(torch.ones(30, 4), torch.arange(30) % 26)


def test_a_result_prints_its_scores(task):
    result = evaluate_absorption(alphabet_sae(5), task)
    letters = result.letters.first_letter.nunique()
    assert re.fullmatch(
        rf"AbsorptionResult\(.*; {letters} letters, 1 evaluation seeds\)", repr(result)
    )


def test_all_words_unless_fewer_are_wanted(lm):
    everything = fl._vocabulary(lm, TaskSpec())
    assert everything.equals(word_vocabulary(lm.tokenizer))
    assert len(fl._vocabulary(lm, TaskSpec(max_words=7))) == 7


def test_a_tokenizer_without_word_tokens_has_no_task(lm, monkeypatch):
    def few(tokenizer, prompts, ends, ids):
        return tuple(part[:3] for part in find_words(tokenizer, prompts, ends, ids))

    monkeypatch.setattr(fl, "find_words", few)
    with pytest.raises(ValueError, match="only 3 of 150 words keep their token"):
        build_task(lm, 1, n_icl=1, max_words=150)
