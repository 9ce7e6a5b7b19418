"Sparse probing: tasks, pooling, selection and probes by hand; the evaluation, its cache, its messages."
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from atm_sae import probing as pr
from atm_sae.lm import residual_stream, tiny_lm
from atm_sae.probing import (
    GROUPS, ProbingData, ProbingTask, build_probing, evaluate_probing, fit_probe, get_probing, mean_pool, probe_accuracy, probe_activations,
    probing_tasks, score_probing, token_rows, top_features, unique_texts)

T = torch.tensor


class Toy:
    "z = relu(x W_enc)."
    def __init__(self, W_enc, W_dec): self.W_enc, self.W_dec = W_enc, W_dec
    def encode(self, x): return (x @ self.W_enc).relu()


DOCS = {name: [f'{name} {i} {"word " * (i % 7)}' for i in range(30)] for name in ('alpha', 'beta', 'gamma')}
GREEK = {'greek': ('alpha', 'beta', 'gamma')}

@pytest.fixture(scope='module')
def lm(): return tiny_lm()

@pytest.fixture(scope='module')
def tasks(): return probing_tasks(DOCS, GREEK)

@pytest.fixture(scope='module')
def data(lm, tasks): return build_probing(lm, 1, tasks, context=24)

def hand_made(x, labels):
    "ProbingData of texts with one token each, and one task over them: first half train."
    texts, half = [str(i) for i in range(len(x))], len(x) // 2
    task = ProbingTask('hand', 'made', tuple(texts[:half]), tuple(labels[:half]), tuple(texts[half:]), tuple(labels[half:]))
    return ProbingData([task], x, torch.ones(len(x), dtype=torch.long), {t: i for i, t in enumerate(texts)})


def test_thirty_five_tasks_from_python_itself():
    tasks = probing_tasks()
    assert len(tasks) == 35 == len({t.name for t in tasks}) and {t.group for t in tasks} == set(GROUPS)
    for t in tasks:
        assert sum(t.train_labels) * 2 == len(t.train_labels) == len(t.train_texts) and sum(t.test_labels) * 2 == len(t.test_labels)
    assert not {x for t in tasks for x in t.train_texts} & {x for t in tasks for x in t.test_texts}


def test_negatives_come_in_equal_parts(tasks):
    alpha = tasks[0]
    negatives = [t for t, label in zip(alpha.train_texts, alpha.train_labels) if not label]
    assert abs(sum(t.startswith('beta') for t in negatives) - sum(t.startswith('gamma') for t in negatives)) <= 1
    assert all(t.startswith('alpha') == label for t, label in zip(alpha.train_texts, alpha.train_labels))


def test_tasks_are_seeded(tasks):
    assert probing_tasks(DOCS, GREEK) == tasks != probing_tasks(DOCS, GREEK, seed=1)


def test_repeated_texts_count_once():
    assert unique_texts({'a': ['x', 'y', 'y'], 'b': ['x', 'z']}) == {'a': ['y'], 'b': ['z']}


def test_group_with_too_few_texts():
    with pytest.raises(ValueError, match="group 'greek': 'beta' has 3 different texts and 20 are needed"): probing_tasks(DOCS | {'beta': ['a', 'b', 'c']}, GREEK)
    with pytest.raises(ValueError, match="'delta' has 0 different texts"): probing_tasks(DOCS, {'greek': ('alpha', 'delta')})


def test_rows_are_cut_and_begin_with_bos(lm):
    rows = token_rows(lm.tokenizer, ['one two three four five', 'x'], context=4)
    assert [len(rows[0]), rows[0][0], rows[1][0]] == [4, lm.tokenizer.bos_token_id, lm.tokenizer.bos_token_id]


def test_activations_do_not_depend_on_the_batch(lm, tasks, data):
    alone = build_probing(lm, 1, tasks, context=24, batch_size=1)
    assert torch.equal(alone.lengths, data.lengths) and torch.allclose(alone.x, data.x, atol=1e-5)
    i = 7
    text, start = list(data.texts)[i], int(data.lengths[:i].sum())
    single = residual_stream(lm, T(token_rows(lm.tokenizer, [text], 24)), 1)[0, 1:]
    assert torch.allclose(data.x[start:start + int(data.lengths[i])], single, atol=1e-5)


def test_mean_pool():
    x, lengths = T([[1.], [3], [10], [20], [60]]), T([2, 1, 2])
    for size in (1, 2, 3, 100): assert mean_pool(x, lengths, batch_size=size).tolist() == [[2], [10], [40]]
    assert mean_pool(x, lengths, lambda v: v * 2).tolist() == [[4], [20], [80]]


def test_selection_by_hand():
    x, y = T([[1., 0, 5], [3, 0, 5], [2, 3, 1]]), T([True, True, False])
    assert top_features(x, y, 2).tolist() == [2, 1] and len(top_features(x, y, 9)) == 3


def test_wide_probe_is_the_same_probe():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(20, 50, generator=g), torch.arange(20) % 2 == 0
    w, b = fit_probe(x, y)
    ref = LogisticRegression(C=1., tol=1e-10, max_iter=10000).fit(x.numpy(), y.numpy())
    assert np.allclose(w, ref.coef_[0], atol=1e-4) and np.allclose(b, ref.intercept_, atol=1e-4)


def test_nothing_is_chosen_on_test_texts():
    g = torch.Generator().manual_seed(2)
    y = torch.arange(400) % 2 == 0
    x = torch.randn(400, 50, generator=g)
    x[200:, 7] += 20 * y[200:]                      # tells everything, but only on test texts
    assert probe_accuracy(x[:200], y[:200], x[200:], y[200:], k=1) < .75


def test_one_latent_that_knows():
    g = torch.Generator().manual_seed(3)
    labels = [bool(i % 2) for i in range(80)]
    x = torch.randn(80, 6, generator=g)
    x[:, 2] = T(labels).float() * 4
    result = score_probing(Toy(torch.eye(6), torch.eye(6)), hand_made(x, labels))
    assert result.summary['sae_top_1_test_accuracy'] == 1 == result.summary['llm_top_1_test_accuracy']
    blind = torch.eye(6)
    blind[2] = 0
    assert score_probing(Toy(blind, torch.eye(6)), hand_made(x, labels)).summary['sae_test_accuracy'] < .8


def test_summary_is_the_mean_over_groups(data):
    two = [ProbingTask(t.name, g, t.train_texts, t.train_labels, t.test_texts, t.test_labels) for t, g in zip(data.tasks, ('a', 'a', 'b'))]
    result = score_probing(Toy(torch.eye(32), torch.eye(32)), ProbingData(two, data.x, data.lengths, data.texts))
    score = result.tasks.sae_top_2_test_accuracy
    assert result.summary['sae_top_2_test_accuracy'] == pytest.approx(((score[0] + score[1]) / 2 + score[2]) / 2)
    for prefix in ('sae', 'llm'):
        assert {f'{prefix}_test_accuracy', *(f'{prefix}_top_{k}_test_accuracy' for k in (1, 2, 5))} <= set(result.summary)


def test_decoder_norms_are_folded(data):
    rows = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    rows = rows / rows.norm(dim=1, keepdim=True)
    assert torch.allclose(probe_activations(Toy(rows.T, rows), data), probe_activations(Toy(rows.T / 2, rows * 2), data), atol=1e-6)


def test_width_of_another_model(data):
    with pytest.raises(ValueError, match='width 8, the probing data have width 32'): score_probing(Toy(torch.eye(8), torch.eye(8)), data)


def test_cache(lm, tasks, tmp_path, monkeypatch):
    monkeypatch.setenv('ATM_SAE_CACHE', str(tmp_path))
    first = evaluate_probing(Toy(torch.eye(32), torch.eye(32)), lm, 1, tasks)
    monkeypatch.setattr(pr, 'build_probing', lambda *a, **k: pytest.fail('built again'))
    assert evaluate_probing(Toy(torch.eye(32), torch.eye(32)), lm, 1, tasks).tasks.equals(first.tasks)
    file, = tmp_path.glob('probing/*/probing.safetensors')
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match='probing.safetensors is truncated or changed'): get_probing(lm, 1, tasks)
