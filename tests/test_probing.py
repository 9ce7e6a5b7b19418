"""Sparse probing: tasks, pooling, selection and probes by hand; the evaluation, its cache, its
messages."""

import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.linear_model import LogisticRegression

from atm_sae.evals import probing as pr
from atm_sae.data.lm import read_site, residual_stream, tiny_lm
from atm_sae.evals.probing import (
    GROUPS,
    ProbingData,
    ProbingTask,
    build_probing,
    evaluate_probing,
    fit_probe,
    get_probing,
    mean_pool,
    probe_accuracy,
    probe_activations,
    probing_tasks,
    score_probing,
    token_rows,
    top_features,
    unique_texts,
)

T = torch.tensor


class Toy:
    "z = relu(x W_enc)."

    def __init__(self, W_enc, W_dec):
        self.W_enc, self.W_dec = W_enc, W_dec

    def encode(self, x):
        return (x @ self.W_enc).relu()


DOCS = {
    name: [f"{name} {i} {'word ' * (i % 7)}" for i in range(30)]
    for name in ("alpha", "beta", "gamma")
}
GREEK = {"greek": ("alpha", "beta", "gamma")}


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def tasks():
    return probing_tasks(DOCS, GREEK)


@pytest.fixture(scope="module")
def data(lm, tasks):
    return build_probing(lm, 1, tasks, context=24)


def hand_made(x, labels):
    "ProbingData of texts with one token each, and one task over them: first half train."
    texts, half = [str(i) for i in range(len(x))], len(x) // 2
    task = ProbingTask(
        "hand",
        "made",
        tuple(texts[:half]),
        tuple(labels[:half]),
        tuple(texts[half:]),
        tuple(labels[half:]),
    )
    return ProbingData(
        [task], x, torch.ones(len(x), dtype=torch.long), {t: i for i, t in enumerate(texts)}
    )


def test_thirty_five_tasks_from_python_itself():
    tasks = probing_tasks()
    assert len(tasks) == 35 == len({t.name for t in tasks}) and {t.group for t in tasks} == set(
        GROUPS
    )
    for t in tasks:
        assert sum(t.train_labels) * 2 == len(t.train_labels) == len(t.train_texts) and sum(
            t.test_labels
        ) * 2 == len(t.test_labels)
    assert not {x for t in tasks for x in t.train_texts} & {x for t in tasks for x in t.test_texts}


def test_negatives_come_in_equal_parts(tasks):
    alpha = tasks[0]
    negatives = [t for t, label in zip(alpha.train_texts, alpha.train_labels) if not label]
    assert (
        abs(
            sum(t.startswith("beta") for t in negatives)
            - sum(t.startswith("gamma") for t in negatives)
        )
        <= 1
    )
    assert all(
        t.startswith("alpha") == label for t, label in zip(alpha.train_texts, alpha.train_labels)
    )


def test_balance_by_hand():
    """Three positives need three negatives: b, c, b; with one negative class of one text, one
    positive is left."""
    texts, labels = pr.against(
        "a", ("a", "b", "c"), dict(a=["a1", "a2", "a3"], b=["b1", "b2", "b3"], c=["c1", "c2"])
    )
    assert texts == ("a1", "a2", "a3", "b1", "c1", "b2") and labels == (True,) * 3 + (False,) * 3
    assert pr.against("a", ("a", "b"), dict(a=["a1", "a2"], b=["b1"])) == (
        ("a1", "b1"),
        (True, False),
    )


def test_two_classes_are_one_question():
    assert [t.name for t in probing_tasks(DOCS, {"pair": ("alpha", "beta")})] == ["alpha"]


def test_tasks_are_seeded(tasks):
    assert probing_tasks(DOCS, GREEK) == tasks != probing_tasks(DOCS, GREEK, seed=1)


def test_repeated_texts_count_once():
    assert unique_texts({"a": ["x", "y", "y"], "b": ["x", "z"]}) == {"a": ["y"], "b": ["z"]}


def test_group_with_too_few_texts():
    with pytest.raises(
        ValueError, match="group 'greek': 'beta' has 3 different texts and 20 are needed"
    ):
        probing_tasks(DOCS | {"beta": ["a", "b", "c"]}, GREEK)
    with pytest.raises(ValueError, match="'delta' has 0 different texts"):
        probing_tasks(DOCS, {"greek": ("alpha", "delta")})
    with pytest.raises(ValueError, match="share of 0.99 of 20 texts leaves none to train on"):
        probing_tasks(DOCS, GREEK, n_texts=20, test_share=0.99)


def test_rows_are_cut_and_begin_with_bos(lm):
    rows = token_rows(lm.tokenizer, ["one two three four five", "x"], context=4)
    assert [len(rows[0]), rows[0][0], rows[1][0]] == [
        4,
        lm.tokenizer.bos_token_id,
        lm.tokenizer.bos_token_id,
    ]


def test_activations_do_not_depend_on_the_batch(lm, tasks, data):
    alone = build_probing(lm, 1, tasks, context=24, batch_size=1)
    assert torch.equal(alone.lengths, data.lengths) and torch.allclose(alone.x, data.x, atol=1e-5)
    i = 7
    text, start = list(data.texts)[i], int(data.lengths[:i].sum())
    single = residual_stream(lm, T(token_rows(lm.tokenizer, [text], 24)), 1)[0, 1:]
    assert torch.allclose(data.x[start : start + int(data.lengths[i])], single, atol=1e-5)


def test_activations_of_another_site(lm, tasks, data):
    other = build_probing(lm, 1, tasks, context=24, site="attn_out")
    row = T(token_rows(lm.tokenizer, [next(iter(data.texts))], 24))
    assert torch.allclose(
        other.x[: other.lengths[0]], read_site(lm, row, 1, "attn_out")[0, 1:], atol=1e-5
    )
    assert other.name.endswith("layer 1 (attn_out)") and data.name.endswith("layer 1")


def test_an_sae_of_another_site_is_refused(lm, tasks):
    class Trained:
        metadata = dict(hook_name="blocks.1.hook_mlp_out")

    with pytest.raises(ValueError, match="trained on blocks.1.hook_mlp_out, and blocks.1.hook_res"):
        evaluate_probing(Trained(), lm, 1, tasks)


def test_text_without_an_ordinary_token(lm):
    task = ProbingTask("a", "g", ("", "x"), (True, False), ("y", "z"), (True, False))
    with pytest.raises(ValueError, match="no ordinary token of the text '': leave it out"):
        build_probing(lm, 1, [task])


def test_no_tasks(lm):
    with pytest.raises(ValueError, match="no texts to read"):
        build_probing(lm, 2, [])


def test_batches_of_a_wide_sae_are_small(data):
    "2 ** 24 latents at a time: 64 tokens of an SAE of 2 ** 18 latents."

    class Wide(Toy):
        seen = []

        def encode(self, x):
            self.seen.append(len(x))
            return x[:, :1]

    sae = Wide(None, torch.empty(2**18, 1).expand(2**18, 32))
    probe_activations(sae, data)
    assert set(sae.seen[:-1]) == {64} and sum(sae.seen) == len(data.x)


def test_half_precision_is_pooled_in_single():
    x = torch.full((300, 1), 1.0, dtype=torch.bfloat16)  # 256 + 1 = 256 in bfloat16
    assert (
        mean_pool(x, T([300])).tolist() == [[1.0]] and mean_pool(x, T([300])).dtype == torch.float32
    )


def test_mean_pool():
    x, lengths = T([[1.0], [3], [10], [20], [60]]), T([2, 1, 2])
    for size in (1, 2, 3, 100):
        assert mean_pool(x, lengths, batch_size=size).tolist() == [[2], [10], [40]]
    assert mean_pool(x, lengths, lambda v: v * 2).tolist() == [[4], [20], [80]]


def test_selection_by_hand():
    x, y = T([[1.0, 0, 5], [3, 0, 5], [2, 3, 1]]), T([True, True, False])
    assert top_features(x, y, 2).tolist() == [2, 1] and len(top_features(x, y, 9)) == 3


def test_of_equal_features_the_first_is_taken():
    "Differences 1, 2, 0, 2, 1, and a thousand dead latents behind them."
    x = torch.zeros(2, 1005)
    x[0, :5] = T([1.0, 2, 0, 2, 1])
    x[1, 3] = 4  # 2 - 4: the sign does not count
    assert top_features(x, T([True, False]), 6).tolist() == [1, 3, 0, 4, 2, 5]


def test_a_wide_probe_is_fitted_by_blocks_of_columns():
    g = torch.Generator().manual_seed(4)
    x, y = torch.randn(12, 9001, generator=g) / 50, torch.arange(12) % 2 == 0
    x[:, 8500] += y.float()
    w, b = fit_probe(x, y)
    ref = LogisticRegression(C=1.0, tol=1e-10, max_iter=10000).fit(x.double().numpy(), y.numpy())
    assert (
        w.shape == (9001,)
        and np.allclose(w, ref.coef_[0], atol=1e-5)
        and int(w.abs().argmax()) == 8500
    )
    assert torch.allclose(pr._logits(x, w, b), x.double() @ w + b, atol=1e-12)


def test_equal_texts_do_not_disturb_a_wide_probe():
    "Rank 2 in 9 dimensions: the directions without any variance are dropped."
    x = T([[1.0] * 9, [1.0] * 9, [-1.0] * 9, [0.0] * 8 + [1]])
    y = T([True, True, False, False])
    w, b = fit_probe(x, y)
    ref = LogisticRegression(C=1.0, tol=1e-12, max_iter=10000).fit(x.numpy(), y.numpy())
    assert np.allclose(w, ref.coef_[0], atol=1e-4) and np.isclose(b, ref.intercept_[0], atol=1e-4)


def test_wide_probe_is_the_same_probe():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(20, 50, generator=g), torch.arange(20) % 2 == 0
    w, b = fit_probe(x, y)
    ref = LogisticRegression(C=1.0, tol=1e-10, max_iter=10000).fit(x.numpy(), y.numpy())
    assert np.allclose(w, ref.coef_[0], atol=1e-4) and np.allclose(b, ref.intercept_, atol=1e-4)


def test_nothing_is_chosen_on_test_texts():
    g = torch.Generator().manual_seed(2)
    y = torch.arange(400) % 2 == 0
    x = torch.randn(400, 50, generator=g)
    x[200:, 7] += 20 * y[200:]  # tells everything, but only on test texts
    assert probe_accuracy(x[:200], y[:200], x[200:], y[200:], k=1) < 0.75


def test_one_latent_that_knows():
    g = torch.Generator().manual_seed(3)
    labels = [bool(i % 2) for i in range(80)]
    x = torch.randn(80, 6, generator=g)
    x[:, 2] = T(labels).float() * 4
    result = score_probing(Toy(torch.eye(6), torch.eye(6)), hand_made(x, labels))
    assert (
        result.summary["sae_top_1_test_accuracy"] == 1 == result.summary["llm_top_1_test_accuracy"]
    )
    blind = torch.eye(6)
    blind[2] = 0
    assert (
        score_probing(Toy(blind, torch.eye(6)), hand_made(x, labels)).summary["sae_test_accuracy"]
        < 0.8
    )


def test_outliers_are_left_out_of_latents_and_channels():
    "Loud tokens, whose entries say the contrary, are in every text; one text holds nothing else."
    labels = [bool(i % 2) for i in range(40)]
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
    x[:, 2] = T(labels).float() * 4
    plain = hand_made(x, labels)
    loud = 1e4 * torch.ones(40, 6)
    loud[:, 2] *= 1 - T(labels).float()
    both = torch.stack([loud, x, x], 1).flatten(0, 1)  # three tokens a text
    spoilt = replace(plain, x=both, lengths=torch.full((40,), 3))
    sae = Toy(torch.eye(6), torch.eye(6))
    result, clean = score_probing(sae, spoilt), score_probing(sae, plain)
    assert result.n_outliers == 40 and clean.n_outliers == 0
    assert result.summary == pytest.approx(clean.summary)
    assert torch.allclose(probe_activations(sae, spoilt), probe_activations(sae, plain))
    sae.max_norm = 1e6
    assert score_probing(sae, spoilt).n_outliers == 0
    last = replace(plain, x=torch.cat([x[:-1], loud[-1:]]))
    assert not probe_activations(Toy(torch.eye(6), torch.eye(6)), last)[-1].any()


def test_summary_is_the_mean_over_groups(data):
    two = [
        ProbingTask(t.name, g, t.train_texts, t.train_labels, t.test_texts, t.test_labels)
        for t, g in zip(data.tasks, ("a", "a", "b"))
    ]
    result = score_probing(
        Toy(torch.eye(32), torch.eye(32)), ProbingData(two, data.x, data.lengths, data.texts)
    )
    score = result.tasks.sae_top_2_test_accuracy
    assert result.summary["sae_top_2_test_accuracy"] == pytest.approx(
        ((score[0] + score[1]) / 2 + score[2]) / 2
    )
    assert result.tasks.group.tolist() == ["a", "a", "b"]
    for prefix in ("sae", "llm"):
        assert {
            f"{prefix}_test_accuracy",
            *(f"{prefix}_top_{k}_test_accuracy" for k in (1, 2, 5)),
        } <= set(result.summary)


def test_a_group_is_scored_as_if_it_were_alone(data):
    "Groups b, a, b: texts of one group only are pooled, and nothing changes."
    mixed = [
        ProbingTask(t.name, g, t.train_texts, t.train_labels, t.test_texts, t.test_labels)
        for t, g in zip(data.tasks, ("b", "a", "b"))
    ]
    both = score_probing(
        Toy(torch.eye(32), torch.eye(32)), ProbingData(mixed, data.x, data.lengths, data.texts)
    ).tasks
    single = score_probing(Toy(torch.eye(32), torch.eye(32)), data).tasks
    assert both.task.tolist() == [mixed[0].name, mixed[2].name, mixed[1].name]
    scores = [c for c in single if c.endswith("accuracy")]
    assert (
        both.set_index("task")[scores]
        .sort_index()
        .equals(single.set_index("task")[scores].sort_index())
    )


def test_decoder_norms_are_folded(data):
    rows = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    rows = rows / rows.norm(dim=1, keepdim=True)
    assert torch.allclose(
        probe_activations(Toy(rows.T, rows), data),
        probe_activations(Toy(rows.T / 2, rows * 2), data),
        atol=1e-6,
    )


def test_width_of_another_model(data):
    with pytest.raises(ValueError, match="width 8, the probing data have width 32"):
        score_probing(Toy(torch.eye(8), torch.eye(8)), data)


def test_cache(lm, tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path))
    first = evaluate_probing(Toy(torch.eye(32), torch.eye(32)), lm, 1, tasks)
    monkeypatch.setattr(pr, "build_probing", lambda *a, **k: pytest.fail("built again"))
    assert evaluate_probing(Toy(torch.eye(32), torch.eye(32)), lm, 1, tasks).tasks.equals(
        first.tasks
    )
    (file,) = tmp_path.glob("probing/*/probing.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="probing.safetensors is truncated or changed"):
        get_probing(lm, 1, tasks)


class NotCached:
    "An artefact that is built at each call."

    def ensure(self, build, save):
        folder = Path(tempfile.mkdtemp())
        save(build(), folder)
        return folder


def test_the_number_of_threads_changes_no_byte(lm, tasks, data, monkeypatch):
    used, read, before = set(), pr.read_site, torch.get_num_threads()

    def note(*args):
        used.add((threading.get_ident(), torch.get_num_threads()))
        return read(*args)

    monkeypatch.setattr(pr, "read_site", note)
    monkeypatch.setattr(pr, "probing_artefact", lambda *args: NotCached())
    torch.set_num_threads(3)
    try:
        found = get_probing(lm, 1, tasks, 32)
    finally:
        torch.set_num_threads(before)
    one = build_probing(lm, 1, tasks, 32)
    assert len(used) > 1 and {n for _, n in used} == {1}
    assert torch.equal(found.x, one.x) and torch.equal(found.lengths, one.lengths)


def test_a_model_given_by_name_has_the_fastest_dtype(lm, tasks, monkeypatch):
    asked = []
    monkeypatch.setattr(pr, "load_lm", lambda *args: asked.append(args) or lm)
    monkeypatch.setattr(pr, "probing_artefact", lambda *args: NotCached())
    get_probing("tiny", 1, tasks[:1])
    assert [args[:2] for args in asked] == [("tiny", "auto")]


def test_channels_are_probed_once_for_equal_outliers(lm, tasks, monkeypatch):
    data, probed = build_probing(lm, 1, tasks, 32), []
    monkeypatch.setattr(
        pr,
        "_accuracies",
        lambda prefix, *args, f=pr._accuracies: probed.append(prefix) or f(prefix, *args),
    )
    sae, limited = Toy(torch.eye(32), torch.eye(32)), Toy(torch.eye(32), torch.eye(32))
    limited.max_norm = float(data.x.norm(dim=1).median())
    first, groups = score_probing(sae, data).tasks, len({task.group for task in tasks})
    assert score_probing(sae, data).tasks.equals(first) and probed.count("llm") == groups
    again = score_probing(limited, data).tasks
    assert probed.count("llm") == 2 * groups
    assert again.equals(score_probing(limited, replace(data)).tasks)


# ---- properties


class Tiny(torch.nn.Module):
    "relu(x W_enc + b_enc)."

    def __init__(self, W_enc, b_enc, W_dec):
        super().__init__()
        self.W_enc, self.b_enc, self.W_dec = map(torch.nn.Parameter, (W_enc, b_enc, W_dec))

    def encode(self, x):
        return (x @ self.W_enc + self.b_enc).relu()


def world(seed, d_sae=9):
    "An SAE and a task of 16 training and 8 test texts of one to five tokens, all random."
    g = torch.Generator().manual_seed(seed)
    sae = Tiny(
        torch.randn(6, d_sae, generator=g),
        torch.randn(d_sae, generator=g),
        torch.randn(d_sae, 6, generator=g),
    )
    data = hand_made(torch.zeros(24, 6), [bool(i % 2) for i in range(24)])
    task = data.tasks[0]
    texts, labels = task.train_texts + task.test_texts, task.train_labels + task.test_labels
    data.tasks = [ProbingTask("random", "made", texts[:16], labels[:16], texts[16:], labels[16:])]
    data.lengths = torch.randint(1, 6, (24,), generator=g)
    data.x = torch.randn(int(data.lengths.sum()), 6, generator=g)
    return sae, data


seeds = given(st.integers(0, 10_000))
quick = settings(max_examples=25, deadline=None, derandomize=True)


@seeds
@quick
def test_accuracies_are_shares_and_repeat(seed):
    sae, data = world(seed)
    summary = score_probing(sae, data).summary
    assert len(summary) == 8 and all(0 <= v <= 1 and (v * 8).is_integer() for v in summary.values())
    assert score_probing(*world(seed)).summary == summary


@seeds
@quick
def test_order_of_latents_does_not_matter(seed):
    sae, data = world(seed)
    z = probe_activations(sae, data)[:16]
    y = T(data.tasks[0].train_labels)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    other = Tiny(sae.W_enc.data[:, order], sae.b_enc.data[order], sae.W_dec.data[order])
    assert order[top_features(z[:, order], y, 5)].tolist() == top_features(z, y, 5).tolist()
    assert score_probing(other, data).summary == pytest.approx(score_probing(sae, data).summary)


@given(
    st.integers(0, 10_000),
    st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]), min_size=9, max_size=9),
)
@quick
def test_scale_of_decoder_rows_does_not_matter(seed, scales):
    "Row i times s, its latent by s: the same dictionary (powers of two, so that it is exact)."
    sae, data = world(seed)
    s = T(scales)
    other = Tiny(sae.W_enc.data / s, sae.b_enc.data / s, sae.W_dec.data * s[:, None])
    assert torch.allclose(probe_activations(other, data), probe_activations(sae, data), rtol=1e-6)
    assert score_probing(other, data).summary == pytest.approx(score_probing(sae, data).summary)


@given(st.integers(0, 10_000), st.integers(1, 80))
@quick
def test_batch_size_of_pooling_does_not_matter(seed, size):
    sae, data = world(seed)
    with torch.no_grad():
        assert torch.allclose(
            mean_pool(data.x, data.lengths, sae.encode, size),
            mean_pool(data.x, data.lengths, sae.encode),
            atol=1e-6,
        )


def test_batch_size_of_the_model_does_not_matter_for_the_score(lm, tasks, data):
    sae = Tiny(
        *(
            torch.randn(*s, generator=torch.Generator().manual_seed(5))
            for s in ((32, 40), (40,), (40, 32))
        )
    )
    other = build_probing(lm, 1, tasks, context=24, batch_size=5)
    assert score_probing(sae, other).summary == pytest.approx(score_probing(sae, data).summary)
