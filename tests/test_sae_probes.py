"The benchmark sae-probes: its files, its division of texts, its probes, and its scores."

import json
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from atm_sae.data.lm import read_site, tiny_lm
from atm_sae.evals import sae_probes
from atm_sae.evals.probing import ProbingTask, build_probing, get_probing, token_rows, top_features
from atm_sae.evals.sae_probes import (
    auc,
    divide_benchmark,
    evaluate_sae_probes,
    fit_penalised,
    mean_activation_units,
    probe_metrics,
    sae_probes_tasks,
    score_sae_probes,
)
from atm_sae.sae.sae import SAE, SAEConfig

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "sae_probes.json").read_text())
SCORES = ("test_auc", "test_accuracy", "test_f1", "val_auc")


def write(folder, n=300, targets=("no", "yes"), zst=False):
    "A small copy: two binary tasks, and a data set of another type."
    tables = {"1_cats": n, "2_dogs": n, "3_years": n}
    kinds = ["Binary Classification", "Binary Classification", "Regression"]
    names = [f"cleaned_data/{name}.csv" for name in tables]
    master = pd.DataFrame({"Data type": kinds, "Dataset save name": names})
    (folder / "cleaned_data").mkdir(parents=True)
    end, how = (".zst", "zstd") if zst else ("", None)
    master.to_csv(folder / f"probing_datasets_MASTER.csv{end}", compression=how)
    for name in tables:
        texts = [f"{name} {'cat' if i % 2 else 'dog'} {i}" for i in range(n)]
        table = pd.DataFrame(dict(prompt=texts, target=[targets[i % 2] for i in range(n)]))
        path = folder / "cleaned_data" / f"{name}.csv{end}"
        table.to_csv(path, index=False, compression=how)
    return folder


def made(seed, n=300, d=8):
    "Latents of different sizes; the first four are more often active on positives."
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2 == 0
    active = rng.exponential(1, (n, d)), rng.random((n, d))
    often = active[1] < 0.3 + 0.3 * y[:, None] * (np.arange(d) < 4)
    return (active[0] * often * [1, 5, 0.2, 1, 9, 1, 1, 1]).astype(np.float32), y


# ---- files


def test_a_folder_a_wheel_and_packed_tables_are_the_same_tasks(tmp_path):
    plain = sae_probes_tasks(write(tmp_path / "plain"))
    assert [t.name for t in plain] == ["1_cats", "2_dogs"]
    assert sae_probes_tasks(tmp_path / "plain", ["2_dogs"]) == plain[1:]
    zst = find_spec("zstandard") is not None
    write(tmp_path / "package" / "sae_probes" / "data", zst=zst)
    assert sae_probes_tasks(tmp_path / "package") == plain
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
        for path in (tmp_path / "package").rglob("*"):
            wheel.write(path, path.relative_to(tmp_path / "package"))
    assert sae_probes_tasks(tmp_path / "some.whl") == plain


def test_the_installed_package_is_the_default(tmp_path, monkeypatch):
    write(tmp_path / "data")
    (tmp_path / "__init__.py").touch()
    spec = type("Spec", (), dict(origin=str(tmp_path / "__init__.py")))
    monkeypatch.setattr(sae_probes, "find_spec", lambda name: spec)
    assert len(sae_probes_tasks()) == 2
    monkeypatch.setattr(sae_probes, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip download --no-deps sae-probes.*as `source`"):
        sae_probes_tasks()


def test_sizes_and_labels_are_those_of_the_package(tmp_path):
    (task, _) = sae_probes_tasks(write(tmp_path))
    assert (len(task.train_texts), len(task.test_texts)) == (200, 99)
    assert sum(task.train_labels) == 100 and sum(task.test_labels) == 50
    assert all((" cat " in text) == label for text, label in zip(task.test_texts, task.test_labels))
    (few, _) = sae_probes_tasks(tmp_path, n_test=10)
    assert few.train_texts == task.train_texts and len(few.test_texts) == 10
    (other, _) = sae_probes_tasks(tmp_path, seed=1)
    assert other.train_texts != task.train_texts


def test_what_is_wrong_with_a_benchmark_is_said(tmp_path):
    place = write(tmp_path / "some")
    with pytest.raises(ValueError, match="holds no folder cleaned_data of sae-probes: download"):
        sae_probes_tasks(tmp_path)
    with pytest.raises(ValueError, match="no binary task '3_years'; it has 2, such as 1_cats"):
        sae_probes_tasks(place, ["3_years"])
    with pytest.raises(ValueError, match="n_test = 1: both classes need a test text"):
        sae_probes_tasks(place, n_test=1)
    with pytest.raises(ValueError, match="1_cats: 200 texts are too few"):
        sae_probes_tasks(write(tmp_path / "small", 200))
    with pytest.raises(ValueError, match="1_cats: a binary task has two targets"):
        sae_probes_tasks(write(tmp_path / "one", targets=("no", "no")))
    (place / "cleaned_data" / "1_cats.csv").write_text("text,target\na,1\n")
    with pytest.raises(ValueError, match="1_cats.csv has no column 'prompt'; it has: text, target"):
        sae_probes_tasks(place)
    (place / "cleaned_data" / "1_cats.csv").unlink()
    with pytest.raises(ValueError, match="1_cats.csv is missing"):
        sae_probes_tasks(place)


# ---- the numbers of the package


def test_the_division_is_that_of_the_package():
    positive = np.array([i % 3 != 0 for i in range(40)])
    train, test = divide_benchmark(positive, 15, 6)
    assert train.tolist() == RECORDED["split"]["train"]
    assert test.tolist() == RECORDED["split"]["test"]
    with pytest.raises(ValueError, match="8 texts of a class are needed, and 7 are left"):
        divide_benchmark(positive, 15, 16)


@pytest.mark.parametrize(
    "row", RECORDED["rows"], ids=lambda r: f"{r['seed']}{r['penalty']}{r['k']}"
)
def test_scores_are_those_of_the_package(row):
    """Of L1 with five latents, the package's solver stops before the optimum.

    Seed 1: it finds .095, .51, .82, 1.59 for the weights .098, .53, .84, 2.77."""
    (x, y), (x_test, y_test) = made(row["seed"]), made(row["seed"] + 100)
    units = mean_activation_units(torch.tensor(x))
    best = top_features(units, torch.tensor(y), 5).tolist()
    assert best == row["best"]
    if row["penalty"] == "l1" and row["k"] == 5:
        return
    best = best[: row["k"]]
    found = probe_metrics(x[:, best], y, x_test[:, best], y_test, row["penalty"])
    tolerance = 1e-4 if row["penalty"] == "l2" else 4e-3
    assert found == pytest.approx({name: row[name] for name in SCORES}, abs=tolerance)


@pytest.mark.skipif(not find_spec("sae_probes"), reason="needs sae-probes")
def test_the_installed_package_finds_the_same():
    training = pytest.importorskip("sae_probes.utils_training")
    (x, y), (x_test, y_test) = made(5), made(105)
    theirs = training.find_best_reg(x, y, x_test, y_test, penalty="l2", seed=42).metrics
    assert probe_metrics(x, y, x_test, y_test, "l2")["test_auc"] == pytest.approx(theirs.test_auc)


# ---- probes


@pytest.mark.parametrize("C", [1e5, 1.0, 1e-2])
def test_l1_weights_are_optimal(C):
    "The slope of the loss is 1/C against each weight, and less where the weight is zero."
    x, y = made(3)
    w = fit_penalised(x, y, C, "l1")
    p = 1 / (1 + np.exp(np.where(y, 1, -1) * (x @ w[1:] + w[0])))
    slope = x.T @ (-np.where(y, 1, -1) * p)
    used = w[1:] != 0
    assert np.allclose(slope[used], -np.sign(w[1:])[used] / C, atol=2e-3)
    assert (np.abs(slope[~used]) <= 1 / C + 1e-6).all()


def test_l2_agrees_with_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model")
    x, y = made(4)
    x = x.astype(float)  # of single precision, scikit-learn computes in single precision
    theirs = linear.LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000).fit(x, y)
    w = fit_penalised(x, y, 0.1, "l2")
    assert w[1:] == pytest.approx(theirs.coef_[0], abs=1e-5)
    assert w[0] == pytest.approx(theirs.intercept_[0], abs=1e-5)


def test_start_does_not_change_the_optimum():
    x, y = made(2)
    far = np.linspace(-3, 3, x.shape[1] + 1)
    for penalty in sae_probes.PENALTIES:
        a, b = (fit_penalised(x, y, 0.5, penalty, start) for start in (None, far))
        assert np.allclose(a, b, atol=1e-3)


def test_more_features_than_texts():
    "A wide probe has the scores of the same features with copies of them."
    (x, y), (x_test, y_test) = made(6, 140), made(7, 140)
    wide, wide_test = (np.hstack([part / 5] * 25) for part in (x, x_test))
    narrow = probe_metrics(x, y, x_test, y_test, "l2")
    assert probe_metrics(wide, y, wide_test, y_test, "l2") == pytest.approx(narrow, abs=1e-6)


def test_nothing_is_chosen_on_test_texts():
    (x, y), (x_test, y_test) = made(8), made(9)
    a = probe_metrics(x, y, x_test, y_test)
    assert probe_metrics(x, y, x_test, ~y_test)["test_auc"] == pytest.approx(1 - a["test_auc"])


def test_wrong_probes_are_named():
    x, y = made(0)
    with pytest.raises(ValueError, match="unknown penalty 'l3': choose one of l1, l2"):
        probe_metrics(x, y, x, y, "l3")
    with pytest.raises(ValueError, match="127 training texts are too few"):
        probe_metrics(x[:127], y[:127], x, y)
    with pytest.raises(ValueError, match="AUC needs both classes; 0 of the 5"):
        auc(np.zeros(5), np.zeros(5, bool))


# ---- of an SAE


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


def texts_task(n=300):
    texts = tuple(f"the {'cat' if i % 2 else 'dog'} number {i}" for i in range(n))
    labels = tuple(bool(i % 2) for i in range(n))
    cut = n - 100
    return ProbingTask("pets", "pets", texts[:cut], labels[:cut], texts[cut:], labels[cut:])


def test_the_last_token_of_the_end_of_a_text_is_read(lm):
    task = ProbingTask("a", "a", ("one two three four", "five"), (True, False), ("one",), (True,))
    data = build_probing(lm, 1, [task], context=3, last=True)
    assert data.lengths.tolist() == [1, 1, 1]
    for text, i in data.texts.items():
        whole = token_rows(lm.tokenizer, [text], 10_000)[0]
        row = whole[:1] + whole[1:][-2:]
        assert token_rows(lm.tokenizer, [text], 3, last=True) == [row]
        x = read_site(lm, torch.tensor([row]), 1)[0, -1].float()
        assert torch.allclose(data.x[i], x, atol=1e-5)


def test_the_cache_tells_both_readings_apart(lm, tmp_path, monkeypatch):
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path))
    task = texts_task(4 + 100)
    last, whole = (get_probing(lm, 1, [task], last=last) for last in (True, False))
    assert len(last.x) == len(last.texts) < len(whole.x)
    assert torch.equal(get_probing(lm, 1, [task], last=True).x, last.x)


def test_one_latent_that_knows(lm, tmp_path, monkeypatch):
    "A latent that is active on positives alone has an AUC of 1, and is found among louder ones."
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path))
    task = texts_task()
    data = get_probing(lm, 1, [task], context=1024, last=True)
    sae = SAE(SAEConfig(lm.d_model, 6, "standard"))
    positive = torch.tensor(["cat" in text for text in data.texts])

    def encode(x):
        z = torch.full((len(x), 6), 50.0) + torch.randn(
            len(x), 6, generator=torch.Generator().manual_seed(0)
        )
        rows = (x[:, None] == data.x[None]).all(2).float().argmax(1)
        z[:, 3] = 0.01 * positive[rows]
        return z

    monkeypatch.setattr(sae, "encode", encode)
    result = score_sae_probes(sae, data, ks=(1, 2))
    (row,) = result.tasks.to_dict("records")
    assert (row["task"], row["n_train"], row["n_test"]) == ("pets", 200, 100)
    assert row["sae_top_1_test_auc"] == 1 and row["sae_top_1_test_accuracy"] == 1
    assert {f"{n}_{s}" for n in ("sae_top_1", "sae_top_2", "llm") for s in SCORES} <= set(row)
    assert result.summary["llm_test_auc"] == row["llm_test_auc"]
    bare = evaluate_sae_probes(sae, lm, 1, [task], ks=(1,), channels=False)
    assert bare.summary["sae_top_1_test_auc"] == 1 and "llm_test_auc" not in bare.summary


def test_width_of_another_model(lm):
    data = build_probing(lm, 1, [texts_task(104)], last=True)
    with pytest.raises(ValueError, match="was it trained on another model"):
        score_sae_probes(SAE(SAEConfig(7, 9)), data)
