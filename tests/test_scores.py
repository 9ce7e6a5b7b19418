"Absorption scores are computed once and read from the cache."

from dataclasses import replace

import pandas as pd
import pytest
from atm_sae.data.lm import tiny_lm
from atm_sae.evals import released, scores
from atm_sae.evals.absorption import (
    AbsorptionConfig,
    WordNotRead,
    evaluate_absorption,
    find_protocol,
    list_tasks,
    word_latents,
)
from atm_sae.evals.first_letter import build_task
from atm_sae.evals.released import LETTER_SCHEDULE, RANKING_SCHEDULE, Released
from atm_sae.evals.scores import get_absorption, scores_artefact
from atm_sae.evals.swap import SwapResult
from atm_sae.sae.sae import SAE, SAEConfig


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def task(lm):
    return build_task(lm, 1, n_icl=1, max_words=150)


FEW = AbsorptionConfig(min_letters=1, min_f1=0.1, max_candidates=2)
pytestmark = pytest.mark.usefixtures("cache")


def make_sae(task, moved=0.0):
    sae = SAE(SAEConfig(task.x.shape[1], 64, architecture="topk", k=8)).requires_grad_(False)
    sae.b_enc += moved
    return sae


def same(a, b):
    pd.testing.assert_frame_equal(a.letters, b.letters)
    pd.testing.assert_frame_equal(a.words, b.words)
    return (a.config, a.sae) == (b.config, b.sae)


def test_scored_once_and_read_bit_for_bit(lm, task, monkeypatch):
    sae, config = make_sae(task), FEW
    fresh = evaluate_absorption(sae, task, config, lm)
    assert same(get_absorption(sae, task, config, lm), fresh)
    monkeypatch.setattr(scores, "evaluate_absorption", None)  # it must not be called again
    assert same(get_absorption(sae, [word_latents(sae, task)], config, lm), fresh)
    twin = make_sae(task)  # another object with the same content
    assert same(get_absorption(twin, replace(task), config, lm), fresh)


def changed_tasks(task):
    yield replace(task, x=task.x + 1e-3)
    yield replace(task, W=task.W * 1.01)
    yield replace(task, words=task.words.assign(test=~task.words.test))
    yield replace(task, spec=replace(task.spec, seed=1))


def test_everything_that_a_score_depends_on_names_it(lm, task):
    exact, config = find_protocol("exact"), AbsorptionConfig()

    def key(sae=None, tasks=(task,), config=config, lm=None, protocol=exact):
        return scores_artefact(sae or make_sae(task), tasks, config, lm, protocol).key

    limited, other_k = make_sae(task), make_sae(task)
    limited.metadata["max_norm"] = 3.0
    other_k.config = replace(other_k.config, k=4)
    slower = Released(letters=replace(Released().letters, epochs=3))
    keys = [
        key(),
        key(sae=make_sae(task, moved=1e-3)),
        key(sae=limited),
        key(sae=other_k),
        key(config=AbsorptionConfig(max_k=2)),
        key(lm=lm),
        key(protocol=find_protocol("saebench")),
        key(protocol=slower),
        key(tasks=(task, replace(task, spec=replace(task.spec, seed=1)))),
        *(key(tasks=(other,)) for other in changed_tasks(task)),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: b"{}", lambda data: b""])
def test_a_damaged_file_says_what_to_do(task, cache, damage):
    sae = make_sae(task)
    get_absorption(sae, task, FEW)
    (path,) = cache.glob("scores/*/scores.json.gz")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"truncated or changed .*delete the folder .*run again"):
        get_absorption(sae, task, FEW)


def test_an_encoder_that_is_no_sae_is_scored_anew(task, cache):
    class Twice:
        def __init__(self, sae):
            self.sae, self.W_dec = sae, sae.W_dec

        def encode(self, x):
            return 2 * self.sae.encode(x)

    sae = make_sae(task)
    assert same(get_absorption(Twice(sae), task, FEW), evaluate_absorption(Twice(sae), task, FEW))
    assert not (cache / "scores").exists()


def test_a_score_from_the_cache_warns_as_a_fresh_one(task):
    unread = replace(task, swap=SwapResult(1, 0.04, 0.9, 25, 1, 30))
    for _ in range(2):
        with pytest.warns(WordNotRead):
            get_absorption(make_sae(task), unread, FEW)


def test_no_task_gives_the_error_of_the_evaluator(task):
    with pytest.raises(ValueError, match="there is no task to score on"):
        get_absorption(make_sae(task), [])


def test_probes_of_saebench_are_fitted_only_for_a_score_that_is_missing(task, monkeypatch):
    fits, train = [], released.train_probes
    monkeypatch.setattr(
        released, "train_probes", lambda *given: (fits.append(given[2]), train(*given))[1]
    )
    short = Released(*(replace(s, epochs=1) for s in (LETTER_SCHEDULE, RANKING_SCHEDULE)))
    few = AbsorptionConfig(min_letters=1, min_f1=-1.0)
    first = replace(task, f1=task.f1)  # has no memo yet
    for moved in (0.0, 0.1):
        get_absorption(make_sae(task, moved), first, few, protocol=short)
    assert fits == [short.letters, short.ranking, short.ranking]  # the letters' probes once
    fits.clear()
    get_absorption(make_sae(task), replace(task), few, protocol=short)  # a new task, no memo
    assert not fits


def test_one_task_or_several_and_their_latents_are_listed_alike(task):
    latents = word_latents(make_sae(task), task)
    for given in (task, latents, [task, latents], (latents,)):
        listed, tasks = list_tasks(given)
        expected = list(given) if isinstance(given, (list, tuple)) else [given]
        assert all(a is b for a, b in zip(listed, expected, strict=True))
        assert all(each is task for each in tasks) and len(tasks) == len(listed)
    assert list_tasks([]) == ([], [])
