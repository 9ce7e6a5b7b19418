"""Probing tasks from public data sets: the real `datasets` library on small local copies, and what
is said when something is missing."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from atm_sae.data import text
from atm_sae.evals import probing_sets as ps
from atm_sae.data.lm import tiny_lm
from atm_sae.evals.probing import evaluate_probing
from atm_sae.evals.probing_sets import SAEBENCH_SETS, dataset_tasks

SETS = {s.name: s for s in SAEBENCH_SETS}
NEWS, BIOS, CODE, SPEECHES = SETS["news"], SETS["bios 2"], SETS["code"], SETS["speeches"]
SIZE = dict(n_train=16, n_test=8)


def write(path, rows):
    "Rows as JSON lines or Parquet, by the ending of the path."
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def write_bios(folder):
    for split, numbers in dict(train=range(24), test=range(24, 36)).items():
        write(
            folder / f"{split}.jsonl",
            [
                dict(
                    hard_text=f"{('He', 'She')[i % 2]} works in job {p} since {1900 + i}.",
                    profession=p,
                    gender=i % 2,
                )
                for i in numbers
                for p in range(28)
            ],
        )


def write_reviews(folder):
    for split, numbers in dict(train=range(24), test=range(24, 36)).items():
        write(
            folder / f"{split}.jsonl",
            [
                dict(
                    text=f"{('Bad', 'Good')[i % 2]} thing of kind {c}, bought {i} times",
                    category=c,
                    rating=(1.0, 5.0)[i % 2],
                )
                for i in numbers
                for c in range(8)
            ],
        )


def write_code(folder):
    endings = (".c", ".h", ".cpp", ".py", ".html", ".java", ".php", ".js")
    rows = [
        dict(
            content=f"{'(c) licence ':x<150}text {i} {e} " + "y" * 500,
            path=f"src/{i}{e}",
            license="mit",
        )
        for i in range(16)
        for e in endings
    ]
    rows += [dict(content=f"too short {i}", path=f"{i}.py", license="mit") for i in range(16)]
    write(folder / "data" / "train-00000-of-00002.parquet", rows[:70])
    write(folder / "data" / "train-00001-of-00002.parquet", rows[70:])


def write_news(folder):
    for split, numbers in dict(train=range(24), test=range(24, 36)).items():
        write(
            folder / f"{split}.parquet",
            [
                dict(text=f"{word} {i}", label=label)
                for i in numbers
                for label, word in enumerate(["war", "goal", "profit", "chip"])
            ],
        )


def write_speeches(folder):
    configs = ""
    for pair in SPEECHES.classes.values():
        a, b = pair.split("-")
        write(
            folder / pair / "train-00000-of-00001.parquet",
            [
                dict(translation={a: f"{pair} speech {i} in {a}", b: f"{pair} speech {i} in {b}"})
                for i in range(16)
            ],
        )
        configs += (
            f"- config_name: {pair}\n  data_files:\n  - split: train\n    path: {pair}/train-*\n"
        )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "A folder with a small copy of each of the five data sets, in the layout of the Hub."
    root = tmp_path_factory.mktemp("source")
    for s, make in (
        (BIOS, write_bios),
        (SETS["reviews"], write_reviews),
        (CODE, write_code),
        (NEWS, write_news),
        (SPEECHES, write_speeches),
    ):
        make(root / s.dataset)
    return root


@pytest.fixture(scope="module")
def tasks(source):
    return dataset_tasks(**SIZE, source=source)


def one(tasks, name):
    return next(t for t in tasks if t.name == name)


def test_the_published_suite():
    assert [s.dataset for s in SAEBENCH_SETS] == ["LabHC/bias_in_bios"] * 3 + [
        "canrager/amazon_reviews_mcauley_1and5"
    ] * 2 + ["codeparrot/github-code", "fancyzhx/ag_news", "Helsinki-NLP/europarl"]
    codes = [sorted(s.classes.values()) for s in SAEBENCH_SETS[:4]]
    assert codes == [[0, 1, 2, 6, 9], [11, 13, 14, 18, 19], [20, 21, 22, 25, 26], [1, 2, 3, 5, 6]]


def test_thirty_five_balanced_tasks(tasks):
    assert len(tasks) == 35 and Counter(t.group for t in tasks) == {
        "bios 1": 5,
        "bios 2": 5,
        "bios 3": 5,
        "reviews": 5,
        "sentiment": 1,
        "code": 5,
        "news": 4,
        "speeches": 5,
    }
    for t in tasks:
        assert len(set(t.train_texts)) == len(t.train_texts) == 16 and sum(t.train_labels) == 8
        assert len(set(t.test_texts)) == len(t.test_texts) == 8 and sum(t.test_labels) == 4


def test_no_text_is_in_train_and_test(tasks):
    assert not {x for t in tasks for x in t.train_texts} & {x for t in tasks for x in t.test_texts}


def test_positives_are_the_class_and_negatives_the_others_in_equal_parts(tasks):
    "nurse is 13; 8 positives, and 2 negatives of each of 11, 14, 18, 19."
    nurse = one(tasks, "nurse")

    def job(text):
        return int(text.split("job ")[1].split()[0])

    assert [job(t) == 13 for t in nurse.train_texts] == list(nurse.train_labels)
    assert Counter(job(t) for t in nurse.train_texts) == {13: 8, 11: 2, 14: 2, 18: 2, 19: 2}


def test_classes_are_balanced_by_gender_and_rating(tasks):
    for name, word in (("nurse", "She"), ("toys", "Good")):
        task = one(tasks, name)
        positives = [t for t, label in zip(task.train_texts, task.train_labels) if label]
        assert sum(t.startswith(word) for t in positives) == 4 == len(positives) / 2
    women = [t.startswith("She") for t in one(tasks, "nurse").train_texts[8:]]
    assert 0 < sum(women) < 8  # the negatives are not all of one gender


def test_sentiment_is_one_task(tasks):
    task = one(tasks, "5 stars")
    assert all(
        t.startswith("Good") == label for t, label in zip(task.train_texts, task.train_labels)
    )


def test_programs_lose_their_first_lines_and_short_ones_are_left_out(tasks):
    task = one(tasks, "C")
    assert all(t.startswith("text ") and len(t) > 500 for t in task.train_texts)

    def ending(t):
        return t.split()[2]

    assert {ending(t) for t, label in zip(task.train_texts, task.train_labels) if label} <= {
        ".c",
        ".h",
    }
    assert {ending(t) for t in task.train_texts} <= {
        ".c",
        ".h",
        ".py",
        ".html",
        ".java",
        ".php",
    }  # neither C++ nor JavaScript


def test_each_language_from_its_own_pair(tasks):
    german = one(tasks, "de")
    assert all(
        t.startswith("de-en") and t.endswith("de")
        for t, label in zip(german.train_texts, german.train_labels)
        if label
    )
    assert {t.split()[-1] for t in german.train_texts} == {"en", "fr", "de", "es", "nl"}


def test_texts_depend_on_the_seed_alone(source, tasks):
    sets = (NEWS, CODE)
    first = dataset_tasks(sets, **SIZE, source=source)
    assert (
        first
        == dataset_tasks(sets, **SIZE, source=source)
        == [t for name in ("news", "code") for t in tasks if t.group == name]
    )
    assert first != dataset_tasks(sets, **SIZE, seed=1, source=source)


def test_long_texts_are_cut(tmp_path):
    for split in ("train", "test"):
        write(
            tmp_path / NEWS.dataset / f"{split}.jsonl",
            [dict(text=f"{split} {i} " + "long " * 9000, label=i % 4) for i in range(8)],
        )
    assert {len(t) for t in dataset_tasks((NEWS,), 4, 2, source=tmp_path)[0].train_texts} <= {
        4095,
        4096,
    }  # a space at the end is stripped


def test_repeated_texts_count_once_and_stay_on_one_side(tmp_path):
    def rows(prefix):
        return [dict(text=f"{prefix} {i}", label=i % 4) for i in range(16)]

    write(tmp_path / NEWS.dataset / "train.jsonl", rows("shared") + rows("shared"))
    write(tmp_path / NEWS.dataset / "test.jsonl", rows("shared") + rows("own"))
    task = dataset_tasks((NEWS,), 8, 8, source=tmp_path)[0]
    assert len(set(task.train_texts)) == 8 and all(t.startswith("shared") for t in task.train_texts)
    assert not set(task.train_texts) & set(task.test_texts)
    with pytest.raises(
        ValueError,
        match=(
            r"ag_news, train: class 'world' has 4 different texts and 5 are needed; "
            r"ask for fewer"
        ),
    ):
        dataset_tasks((NEWS,), 10, 8, source=tmp_path)


def test_a_text_of_two_classes_belongs_to_one(tmp_path):
    """Each class has 4 texts of its own, and all share one: 17 different texts for 16 places,
    so nobody is short."""
    for split in ("train", "test"):
        write(
            tmp_path / NEWS.dataset / f"{split}.jsonl",
            [
                dict(
                    text=f"{split} {i // 4} of {i % 4}" if i < 16 else f"{split} shared",
                    label=i % 4,
                )
                for i in range(20)
            ],
        )
    for seed in range(5):
        for task in dataset_tasks((NEWS,), 8, 8, seed=seed, source=tmp_path):
            assert len(set(task.train_texts)) == 8 == len(set(task.test_texts))
    with pytest.raises(ValueError, match="has 4 different texts and 5 are needed"):
        dataset_tasks((NEWS,), 10, 8, source=tmp_path)


def test_reading_stops_when_there_is_enough(monkeypatch):
    "An endless data set: the 10,000 rows that are stirred are read, and a few more."
    read = Counter()

    def endless(name, split, *_):
        while True:
            read[split] += 1
            yield dict(text=f"{split} {read[split]}", label=read[split] % 4)

    monkeypatch.setattr(ps, "dataset_rows", endless)
    dataset_tasks((NEWS,), n_train=24, n_test=8)
    assert 10_000 < read["train"] < 10_200 and 10_000 < read["test"] < 10_200


def test_what_is_missing_is_named(source, tmp_path):
    def ask(s, n=16, where=source):
        return dataset_tasks((s,), n, 8, source=where)

    with pytest.raises(
        ValueError,
        match=(
            r"LabHC/bias_in_bios, train: class 'nurse' with gender 0 has 12 "
            r"different texts and 100 are needed"
        ),
    ):
        ask(replace(BIOS, classes=dict(nurse=13, poet=20)), 400)
    with pytest.raises(ValueError, match=r"ag_news has no column 'topic'; it has: label, text"):
        ask(replace(NEWS, label="topic"))
    with pytest.raises(
        ValueError, match=r"ag_news cannot be read: .*'dev'|ag_news cannot be read: Bad split: dev"
    ):
        ask(replace(NEWS, test="dev"))
    with pytest.raises(
        ValueError, match=r"europarl cannot be read: BuilderConfig 'xx-yy' not found"
    ):
        ask(replace(SPEECHES, classes=dict(xx="xx-yy")))
    with pytest.raises(
        FileNotFoundError,
        match=(
            r"no folder .*ag_news: put a copy there \(hf download --repo-type "
            r"dataset fancyzhx/ag_news"
        ),
    ):
        ask(NEWS, where=tmp_path)
    with pytest.raises(
        ValueError, match="bios 2: n_train and n_test must be at least 4 .* not 3 and 8"
    ):
        ask(BIOS, 3)


def test_an_entry_that_is_no_text_is_named():
    assert ps._text(NEWS, dict(text=None), "world") == ""
    assert ps._text(SPEECHES, dict(translation=dict(en="A speech.")), "fr") == ""
    with pytest.raises(
        ValueError, match=r"ag_news: an entry of the column 'text' is 3.5 \(float\)"
    ):
        ps._text(NEWS, dict(text=3.5), "world")


def test_without_the_library(monkeypatch, source):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'atm-sae\[data\]'"):
        dataset_tasks((NEWS,), source=source)


def test_without_a_network():
    "In a process of its own: whether the Hub may be asked is decided when its library is imported."
    code = (
        "import sys, atm_sae.evals.probing_sets as p\nassert 'datasets' not in sys.modules\n"
        "for s in (p.SAEBENCH_SETS[6], p.SAEBENCH_SETS[5]):\n"
        "    try: p.dataset_tasks((s,))\n"
        "    except ConnectionError as e: print(e)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(ps.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, line in zip(
        ("fancyzhx/ag_news", "codeparrot/github-code"), done.stdout.splitlines(), strict=True
    ):
        assert (
            line.startswith(f"{name}: the Hub cannot be reached")
            and "HF_HUB_OFFLINE=0" in line
            and "source=" in line
        )


def test_other_errors_are_named_not_hidden():
    assert (
        str(text._dataset_error("some/set", ValueError("gated\nmore")))
        == "some/set cannot be read: gated"
    )
    try:
        try:
            raise TimeoutError("slow")
        except TimeoutError:
            raise RuntimeError("wrapped") from ConnectionError("refused")
    except RuntimeError as e:
        assert isinstance(text._dataset_error("some/set", e), ConnectionError)


def test_they_are_scored_like_any_other_tasks(source, tmp_path, monkeypatch):
    "Group by group: each has its own folder in the cache."
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path))

    class Identity:
        W_dec = torch.eye(32)

        def encode(self, x):
            return x

    tasks = dataset_tasks((NEWS, SETS["sentiment"]), **SIZE, source=source)
    result = evaluate_probing(Identity(), tiny_lm(), 1, tasks)
    assert len(result.tasks) == 5 and len(list(tmp_path.glob("probing/*/probing.json"))) == 2
    score = result.tasks.sae_top_1_test_accuracy
    assert result.summary["sae_top_1_test_accuracy"] == pytest.approx(
        (score[:4].mean() + score[4]) / 2
    )
    assert (
        result.summary["sae_test_accuracy"] == result.summary["llm_test_accuracy"]
    )  # the latents are the channels
