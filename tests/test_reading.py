"Whether a model reads the word at a layer: the exchange of words, the table, the choice."

import contextlib
import math
import statistics
import threading
import warnings
from dataclasses import replace

import pandas as pd
import pytest
import torch

from atm_sae.data.lm import (
    load_lm,
    next_token_logits,
    prefix_cache,
    residual_stream,
    splice,
    tiny_lm,
)
from atm_sae.data.letters import answer_tokens
from atm_sae.evals.first_letter import (
    LETTERS,
    TaskSpec,
    build_task,
    letter_indices,
    load_task,
    save_task,
    task_from_activations,
    word_prompts,
)
from atm_sae.evals.reading import choose_layer, probe_scores, swap_table, word_activations
from atm_sae.evals import absorption, swap
from atm_sae.evals.absorption import AbsorptionConfig, WordNotRead, evaluate_absorption
from atm_sae.evals.swap import (
    from_block,
    SwapResult,
    block_inputs,
    captured,
    letter_logits,
    swap_words,
    swapped_logits,
)


@pytest.fixture(scope="module")
def nano():
    return load_lm("nano-gemma2")


@pytest.fixture(scope="module")
def prompts(nano):
    words, tokens, at = word_prompts(nano, TaskSpec(max_words=600))
    return words, tokens, int(at[0]), letter_indices(words.letter)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "resid_post"])
def test_a_pass_from_a_block_is_the_whole_pass(lm, layer, site):
    "Blocks that are skipped and a prefix that is run once change nothing."
    _, tokens, at = word_prompts(lm, TaskSpec(n_icl=2, max_words=40))
    tokens, start = tokens[:6].long(), int(at[0])
    stream = torch.randn(6, lm.d_model, generator=torch.Generator().manual_seed(0))
    with splice(lm, layer, lambda x: x.index_put((torch.arange(6), at[:6]), stream), site):
        expected = next_token_logits(lm, tokens)[:, answer_tokens(lm.tokenizer)]
    past = prefix_cache(lm, tokens[:, :start])
    inputs = block_inputs(lm, tokens[:, start:], prefix_cache(lm, tokens[:, :start]), layer)
    found = swapped_logits(lm, tokens[:, start:], past, layer, inputs, stream, site)
    assert torch.allclose(found, expected, atol=1e-5)
    plain = next_token_logits(lm, tokens)[:, answer_tokens(lm.tokenizer)]
    assert not torch.allclose(found, plain, atol=1e-3)
    after = letter_logits(lm, tokens[:, start:], prefix_cache(lm, tokens[:, :start]))
    assert torch.allclose(after, plain, atol=1e-5)  # the blocks are whole again


def test_blocks_that_return_tuples():
    "GPT-Neo's blocks return (stream, weights)."
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    tiny = tiny_lm()
    config = GPTNeoConfig(
        vocab_size=len(tiny.tokenizer),
        hidden_size=32,
        num_layers=3,
        num_heads=2,
        attention_types=[[["global"], 3]],
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    lm = replace(tiny, model=GPTNeoForCausalLM(config).eval().requires_grad_(False), name="neo")
    tokens = torch.randint(3, 900, (4, 9), generator=torch.Generator().manual_seed(1))
    past = prefix_cache(lm, tokens[:, :5])
    with captured(lm, [1]) as streams:
        expected = letter_logits(lm, tokens[:, 5:], prefix_cache(lm, tokens[:, :5]))
    inputs = block_inputs(lm, tokens[:, 5:], prefix_cache(lm, tokens[:, :5]), 1)
    found = swapped_logits(lm, tokens[:, 5:], past, 1, inputs, streams[1][:, 0])
    assert torch.allclose(found, expected, atol=1e-5)


def test_nano_gemma2_reads_the_word_after_its_first_block_only(nano, prompts):
    _, tokens, start, letter = prompts
    first, *later = swap_words(nano, tokens, start, letter, range(nano.n_layers), n_pairs=64)
    assert first.reads_word and first.swapped > 0.9 and first.own < 0.1
    assert first.n > 50 and first.right > 0.9 and first.n_pairs == 64
    for result in later:
        assert not result.reads_word and result.swapped < 0.1 and result.own > 0.9


def test_the_exchange_is_that_of_whole_prompts(nano, prompts):
    "Answers counted by whole prompts, without prefixes, skipped blocks or batches."
    _, tokens, start, letter = prompts
    (result,) = swap_words(nano, tokens, start, letter, [0], n_pairs=24, batch_size=7, seed=3)
    ids = answer_tokens(nano.tokenizer)
    pairs = swap._draw(nano, tokens, start, letter, 24, seed=3)
    assert (pairs.letters[0] != pairs.letters[1]).all()
    own = torch.cat([pairs.prefix, pairs.own], 1)
    there = torch.cat([pairs.prefix, pairs.there], 1)
    first, second = (next_token_logits(nano, rows)[:, ids].argmax(1) for rows in (own, there))
    both = (first == pairs.letters[0]) & (second == pairs.letters[1])
    with captured(nano, [0]) as streams:
        next_token_logits(nano, there)
    word = streams[0][:, start]

    def put(x):
        return torch.cat([x[:, :start], word[:, None], x[:, start + 1 :]], 1)

    with splice(nano, 0, put):
        answer = next_token_logits(nano, own)[:, ids].argmax(1)
    assert result.n == both.sum() and result.n_pairs == len(own)
    assert result.swapped == pytest.approx((answer == pairs.letters[1])[both].float().mean().item())
    assert result.own == pytest.approx((answer == pairs.letters[0])[both].float().mean().item())
    assert result.right == pytest.approx((first == pairs.letters[0]).float().mean().item())


def test_the_exchange_does_not_depend_on_threads(nano, prompts, monkeypatch):
    _, tokens, start, letter = prompts
    batch, used, usual = swap._swap_batch, set(), torch.get_num_threads()

    def noted(*args):
        used.add((threading.get_ident(), torch.get_num_threads()))
        return batch(*args)

    monkeypatch.setattr(swap, "_swap_batch", noted)
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            more = dict(n_pairs=48, batch_size=6)
            found.append(swap_words(nano, tokens, start, letter, [0, 1], **more))
            assert len(used) > 1 or threads == 1
    finally:
        torch.set_num_threads(usual)
    assert found[0] == found[1] and found[0][0].n > 40
    assert {threads for _, threads in used} == {1}


def test_the_answers_tokens_are_found_once(lm, monkeypatch):
    words, tokens, at = word_prompts(lm, TaskSpec(n_icl=2, max_words=60))
    calls = []

    def counted(tokenizer):
        calls.append(tokenizer)
        return answer_tokens(tokenizer)

    monkeypatch.setattr(swap, "answer_tokens", counted)
    letter = letter_indices(words.letter)
    swap_words(lm, tokens, int(at[0]), letter, [0, 1], n_pairs=12, batch_size=4)
    assert len(calls) == 1


def test_no_pair_counts_for_a_model_that_cannot_spell(lm):
    words, tokens, at = word_prompts(lm, TaskSpec(n_icl=2, max_words=60))
    letter = letter_indices(words.letter)
    (result,) = swap_words(lm, tokens, int(at[0]), letter, [1], n_pairs=8)
    assert result.n == 0 and math.isnan(result.swapped) and not result.reads_word


def test_activations_of_several_blocks(nano, prompts):
    words, tokens, start, _ = prompts
    found = word_activations(nano, tokens, start, [0, 2], batch_size=50)
    at = torch.full((len(tokens),), start)
    for layer, x in found.items():
        alone = residual_stream(nano, tokens.long(), layer, batch_size=64, at=at)
        assert torch.allclose(x, alone, atol=2e-3)
    some = {2: found[2][:150]}
    table = probe_scores(some, words[:150])
    task = task_from_activations(some[2], words[:150])
    assert table.probe_f1[0] == pytest.approx(task.f1.mean().item())
    assert table.n_letters[0] == (task.f1 > 0.6).sum()


def test_only_blocks_up_to_the_last_are_run_and_each_prefix_once(nano, prompts, monkeypatch):
    _, tokens, start, _ = prompts
    run = []
    for i, block in enumerate(nano.model.model.layers):
        forward = block.forward

        def counted(x, *args, i=i, forward=forward, **more):
            run.append((i, *x.shape[:2]))
            return forward(x, *args, **more)

        monkeypatch.setattr(block, "forward", counted)
    word_activations(nano, tokens, start, [0, 2], batch_size=50)
    assert {i for i, _, _ in run} == {0, 1, 2}
    prefixes = tokens[:, :start].unique(dim=0)
    assert sum(n for i, n, length in run if i == 0 and length == start) == len(prefixes)
    assert sum(n for i, n, length in run if i == 0 and length == 1) == len(tokens)


def test_probes_do_not_depend_on_threads():
    g = torch.Generator().manual_seed(0)
    letter = torch.arange(26).repeat_interleave(10)
    words = pd.DataFrame(dict(text="word", letter=[LETTERS[i] for i in letter]))
    signal = 3 * torch.nn.functional.one_hot(letter, 26)
    streams = {i: signal + torch.randn(260, 26, generator=g) for i in (5, 1, 3)}
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        table = probe_scores(streams, words)
    finally:
        torch.set_num_threads(usual)
    assert table.layer.tolist() == [5, 1, 3] and table.equals(probe_scores(streams, words))
    assert table.probe_f1.nunique() == 3


def test_the_rule_of_choice():
    "Of ten blocks: 6 and 8 do not read the word, 0 has too few letters; half have run after 4."
    table = pd.DataFrame(
        dict(
            layer=[8, 4, 0, 2, 6],
            swapped=[math.nan, 0.5, 0.9, 0.9, 0.49],
            n_letters=[26, 20, 19, 26, 26],
        )
    )
    assert choose_layer(table, n_layers=10) == 4
    assert choose_layer(table, n_layers=6) == 2  # 3 of 6
    assert choose_layer(table, n_layers=8) == 2  # 3 and 5 of 8 are equally near: the earlier one
    assert choose_layer(table.assign(n_letters=[26, 19, 19, 26, 26]), n_layers=10) == 2
    assert choose_layer(table[table.layer > 4], n_layers=10) is None


def test_intervals_of_the_table():
    results = [
        SwapResult(3, 0.5, 0.25, 100, 0.9, 120),
        SwapResult(4, math.nan, math.nan, 0, 0.0, 9),
    ]
    table = swap_table(results)
    assert table.swapped_low[0] == pytest.approx(0.4038, abs=1e-4)  # Wilson, 50 of 100
    assert table.swapped_high[0] == pytest.approx(0.5962, abs=1e-4)
    assert math.isnan(table.own_low[1]) and table.right_low[1] == pytest.approx(0, abs=1e-9)


def test_the_task_keeps_the_result(nano, tmp_path):
    task = build_task(nano, 2, max_words=400)
    assert task.swap is not None and task.swap.layer == 2 and not task.swap.reads_word
    save_task(task, tmp_path)
    assert load_task(tmp_path).swap == task.swap
    save_task(replace(task, swap=None), tmp_path)
    assert load_task(tmp_path).swap is None


def at_seed(task, seed):
    return replace(task, spec=replace(task.spec, seed=seed))


def silent_task(task):
    "The task with probes that are right on every word, so that every silent word is a candidate."
    present = [(task.letter[rows].unique()) for rows in (task.test, ~task.test)]
    both = [i for i in range(26) if all((part == i).any() for part in present)]
    f1 = torch.zeros(26).index_fill(0, torch.tensor(both), 1.0)
    return replace(task, f1=f1, b=torch.full((26,), 99.0))


class Silent:
    "An SAE whose latents are always zero."

    W_dec = torch.eye(32)

    def encode(self, x):
        return torch.zeros(len(x), 32)


def test_a_layer_that_does_not_read_the_word_is_said(lm, monkeypatch):
    task = silent_task(build_task(lm, 1, n_icl=1, max_words=150))
    few = AbsorptionConfig(min_letters=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", WordNotRead)
        fine = evaluate_absorption(
            Silent(), replace(task, swap=SwapResult(1, 0.9, 0, 20, 1, 20)), few
        )
        evaluate_absorption(Silent(), task, few)  # no pair counts: nothing is known
        evaluate_absorption(Silent(), replace(task, swap=None), few)
    assert fine.config["swap"]["swapped"] == 0.9 and "causal" not in repr(fine)
    unread = replace(task, swap=SwapResult(1, 0.04, 0.9, 25, 1, 30))
    said = r"does not read the word at layer 1 \(after swapping, 4% of answers follow\): absorption"
    with pytest.warns(WordNotRead, match=said):
        result = evaluate_absorption(Silent(), unread, few)
    assert "after swapping, 4% of answers follow" in repr(result)


def test_a_sample_of_the_candidates_stands_for_all(lm, monkeypatch):
    task = silent_task(build_task(lm, 1, n_icl=1, max_words=150))
    asked = []

    def absorbed(sae, lm, task, rows):
        asked.append(rows)
        return torch.tensor([LETTERS[task.letter[i]] < "M" for i in rows])

    monkeypatch.setattr(absorption, "ablation_absorbed", absorbed)

    def rate(limit, seed=0):
        config = AbsorptionConfig(min_letters=1, max_candidates=limit)
        return evaluate_absorption(Silent(), at_seed(task, seed), config, lm=lm)

    whole = rate(1000)
    n = int(whole.words.candidate.sum())
    assert n == len(asked[-1]) == whole.letters.num_ablation_candidates.sum() > 20
    some = rate(10)
    assert len(asked[-1]) == some.letters.num_ablation_asked.sum() == 10
    assert some.config["max_candidates"] == 10
    hits = some.words.groupby("letter").ablated.mean().mean()
    assert some.ablation == pytest.approx(n / 10 * hits)
    assert list(rate(10).words.asked) == list(some.words.asked)  # the same draw
    many = [rate(10, seed).ablation for seed in range(12)]
    error = statistics.stdev(many) / len(many) ** 0.5
    assert abs(statistics.mean(many) - whole.ablation) < 4 * error  # unbiased


def test_each_word_is_asked_after_its_own_lines(lm, monkeypatch):
    task = build_task(lm, 1, n_icl=1, max_words=60, group=1)
    seen = []

    def effects(sae, lm, task, part, points):
        seen.append(task.tokens[part])
        return torch.zeros(len(part), 32)

    monkeypatch.setattr(absorption, "integrated_effects", effects)
    absorption.ablation_absorbed(Silent(), lm, task, [5, 9, 11], batch_size=2)
    assert torch.equal(torch.cat(seen), task.tokens[[5, 9, 11]])
    assert [len(tokens) for tokens in seen] == [2, 1]


def test_a_model_is_run_once_to_see_what_its_blocks_return(lm):
    other, passes = replace(lm), []
    hook = other.model.register_forward_hook(lambda *_: passes.append(1))
    with contextlib.ExitStack() as stack:
        stack.callback(hook.remove)
        for _ in range(3):
            with from_block(other, 1, torch.zeros(1, 1, 32)):
                pass
    assert len(passes) == 1
