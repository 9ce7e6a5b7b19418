"""SAEBench's own functions beside ours, on the same activations, latents, split and seeds.

They run where ATM_SAE_SAEBENCH_SOURCE names a checkout of SAEBench 0.6.0 (commit 8042bb3). Its
packages sae_lens and transformer_lens are replaced by empty ones: they only load models."""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from atm_sae.core import generator
from atm_sae.evals.absorption import evaluate_absorption
from atm_sae.evals.first_letter import LETTERS, FirstLetterTask, task_from_activations
from atm_sae.evals.released import LETTER_SCHEDULE, released_task

SOURCE = os.environ.get("ATM_SAE_SAEBENCH_SOURCE", "")
pytestmark = pytest.mark.skipif(
    not SOURCE, reason="ATM_SAE_SAEBENCH_SOURCE names no checkout of SAEBench 0.6.0"
)


def load_reference() -> SimpleNamespace:
    "Modules of SAEBench's absorption evaluation."
    for name, entry in dict(sae_lens="SAE", transformer_lens="HookedTransformer").items():
        module: Any = ModuleType(name)
        setattr(module, entry, object)
        sys.modules.setdefault(name, module)
    if SOURCE not in sys.path:
        sys.path.insert(0, SOURCE)
    names = ("probing", "k_sparse_probing", "feature_absorption", "feature_absorption_calculator")
    folder = "sae_bench.evals.absorption"
    return SimpleNamespace(**{name: importlib.import_module(f"{folder}.{name}") for name in names})


class Shown:
    "An SAE as SAEBench sees it."

    def __init__(self, sae):
        self.encode, self.W_dec, self.W_enc = sae.encode, sae.W_dec.detach(), sae.W_enc.detach()
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.cfg = SimpleNamespace(d_sae=len(self.W_dec))


class Replay:
    "A language model whose activations at the words are known."

    tokenizer = cfg = SimpleNamespace()

    def __init__(self, task: FirstLetterTask):
        self.x = {f"w{i}": x for i, x in enumerate(task.x)}

    def to_tokens(self, prompt):
        return [[0]]

    def run_with_cache(self, prompts, names_filter):
        return None, {names_filter[0]: torch.stack([self.x[prompt] for prompt in prompts])[:, None]}


def reference_probe(ref, task: FirstLetterTask, batch_size: int = 64):
    "The letters' probes; SAEBench's program gives the batch size of its language model, 64."
    frames, arrays = [], []
    for part in (~task.test, task.test):
        frames.append(pd.DataFrame(dict(answer_class=task.letter[part].numpy())))
        arrays.append(task.x[part].numpy())
    torch.manual_seed(generator(task.seed, "saebench", "letters").initial_seed())
    probe, _ = ref.probing.train_linear_probe_for_task(
        *frames, torch.device("cpu"), *arrays, batch_size=batch_size
    )
    return probe


def reference_splits(ref, probe, sae, task: FirstLetterTask):
    "Table of the letters with their split latents, and the scores of the words."
    rows = {
        k: part.nonzero()[:, 0].tolist() for k, part in (("fit", ~task.test), ("test", task.test))
    }
    labels = {k: [(f"w{i}", int(task.letter[i])) for i in v] for k, v in rows.items()}
    torch.manual_seed(generator(task.seed, "saebench", "ranking").initial_seed())
    sparse = ref.k_sparse_probing
    probes = sparse.train_k_sparse_probes(
        sae, labels["fit"], task.x[rows["fit"]], range(1, 11), precalc_sae_acts=True
    )
    scores = sparse.eval_probe_and_sae_k_sparse_raw_scores(
        sae, probe, probes, labels["test"], task.x[rows["test"]]
    )
    about = sparse.sae_k_sparse_metadata(sae, probe, probes, "sae", 0)
    table = sparse.build_metrics_df(scores, about, 10)
    sparse.add_feature_splits_to_metrics_df(table, 10, 0.03)
    return table, scores


def reference_scores(ref, probe, sae, task: FirstLetterTask, folder: Path) -> pd.DataFrame:
    "Full score and fraction of each letter that SAEBench counts, as its program averages them."
    shown = Shown(sae)
    table, scores = reference_splits(ref, probe, shown, task)
    scores.to_parquet(folder / "layer_0_sae_raw_results.parquet")
    found = ref.feature_absorption.get_stats_and_likely_false_negative_tokens(
        table, "sae", 0, folder
    )
    calculator = ref.feature_absorption_calculator.FeatureAbsorptionCalculator(
        Replay(task), [], word_token_pos=-1
    )
    calculator._build_prompts = lambda words: [SimpleNamespace(word=w, base=w) for w in words]
    words = ref.feature_absorption.calculate_projection_and_cos_sims(
        calculator, shown, probe, 0, found
    )
    words = words.groupby("letter").agg(
        full=("is_full_absorption", "sum"),
        fraction=("absorption_fraction", "sum"),
        n=("num_probe_true_positives", "mean"),
        n_split=("split_feats", lambda column: len(column.iloc[0])),
    )
    words["full"], words["fraction"] = words.full / words.n, words.fraction / words.n
    counts = table.set_index("letter").f1_probe > 0.6
    return words[counts.reindex(words.index)]


class Sparse:
    "A random dictionary of which the eight largest latents of a word are active."

    def __init__(self, d_in, d_sae, g):
        self.W_dec = F.normalize(torch.randn(d_sae, d_in, generator=g), dim=1)
        self.W_enc = self.W_dec.T.contiguous()

    def encode(self, x):
        z = (x @ self.W_enc).relu()
        return torch.where(z >= z.topk(8).values[..., -1:], z, 0.0)


@pytest.fixture(scope="module")
def task():
    "Words with a direction for their letter and as much noise."
    g = torch.Generator().manual_seed(0)
    letter = torch.arange(26).repeat_interleave(60)
    x = 8 * F.one_hot(letter, 26).float() @ F.normalize(torch.randn(26, 48, generator=g), dim=1)
    x = x + torch.randn(len(letter), 48, generator=g)
    names = [LETTERS[i] for i in letter]
    words = pd.DataFrame(dict(text=[f"{n}{i}" for i, n in enumerate(names)], letter=names))
    return task_from_activations(x, words, model="words")


@pytest.fixture(scope="module")
def ref():
    return load_reference()


@pytest.fixture(scope="module")
def probe(ref, task):
    return reference_probe(ref, task)


def test_letters_have_the_same_probes(task, probe):
    ours = released_task(task)
    assert torch.allclose(ours.W, probe.weights, atol=1e-3)
    assert torch.allclose(ours.b, probe.biases, atol=1e-3)


def test_schedules_are_those_of_the_program(ref):
    "The letters' batches are those of the language model, which its program passes on."
    import inspect

    common = importlib.import_module("sae_bench.evals.absorption.common")
    given = inspect.signature(common.train_and_save_probes).parameters
    passed = (given["batch_size"].default, given["num_epochs"].default, given["lr"].default)
    assert passed == (LETTER_SCHEDULE.batch_size, LETTER_SCHEDULE.epochs, LETTER_SCHEDULE.lr)
    own = inspect.signature(ref.probing.train_linear_probe_for_task).parameters
    assert own["weight_decay"].default == LETTER_SCHEDULE.weight_decay


@pytest.mark.parametrize("seed", [0, 1])
def test_scores_are_the_same(ref, task, probe, seed, tmp_path):
    sae = Sparse(48, 300, torch.Generator().manual_seed(seed))
    ours = evaluate_absorption(sae, task, protocol="saebench")
    theirs = reference_scores(ref, probe, sae, task, tmp_path)
    assert len(theirs) == ours.n_letters > 20
    assert ours.full == pytest.approx(theirs.full.mean(), abs=0.002)
    assert ours.fraction == pytest.approx(theirs.fraction.mean(), abs=0.002)
    assert np.array_equal(ours.letters.num_split_features, theirs.n_split)
    assert ours.full > 0.01 and ours.fraction > 0.01
