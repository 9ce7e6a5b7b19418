"""Every experiment small, from end to end: all in forked processes, one in real kernels, two of
the profiles for Gemma-2-2b with the shipped model; and the lines of the README."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from notebooks import execute_forked
from small import documents

from atm_sae.cli import main
from atm_sae.report import runner
from atm_sae.report.figures import figure_text
from atm_sae.report.manifest import load_manifest
from atm_sae.report.new_experiment import new_experiment
from atm_sae.report.runner import reproduce
from atm_sae.report.tables import SMOKE, read_summary

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def in_forks(monkeypatch, shared_cache):
    "Experiments run in forked processes, and share a cache with the notebooks."
    monkeypatch.setenv("ATM_SAE_CACHE", str(shared_cache))
    monkeypatch.setattr(runner, "execute_notebook", execute_forked)


def made(profile, out, **more):
    "Run experiments that must all succeed."
    lines = []
    done = reproduce(profile=profile, out=out, say=lines.append, **more)
    assert not [s.name for s in done.values() if s.state != "ok"], "\n".join(lines)[-6000:]


def check_outputs(items, out):
    "Every declared output is there, and recorded; every figure has a caption with n and its words."
    for item in items:
        for output in item.outputs:
            assert (out / output).stat().st_size > 0, output
            if output.endswith(".png"):
                words = figure_text(out / output)
                assert "n = " in words.caption and words.alt, output
        record = json.loads((out / f"provenance/{item.name}.json").read_text())
        assert set(record["outputs"]) == {*item.outputs, f"notebooks/{item.name}.ipynb"}


SUMMARIES = {
    "absorption": "mean_full_absorption_score",
    "reconstruction": "explained_variance",
    "probing": "sae_top_1_test_accuracy",
    "planted": "absorption",
}


def check_summary(name, metric, out):
    "The summary holds each method with its L0 and all seeds: two, or three of the planted pairs."
    rows = read_summary(out / f"tables/{name}-summary.csv")
    rows = rows[(rows.metric == metric) & ~rows.method.str.contains(" - ")]
    has_three = rows.method.isin(["atm", "standard+off"]) & (name == "planted")
    assert {"atm", "topk", "random"} <= set(rows.method), name
    assert (rows.n == has_three.map({True: 3, False: 2})).all(), name
    columns = ["mean", "low", "high", "l0", "l0_low", "l0_high"]
    assert rows[columns].notna().all().all(), name


def check_passes(out):
    "20,000 tokens are 34 batches of 512 to train on, so 60 steps read them more than once."
    table = pd.read_csv(out / "tables/scale.csv")
    assert sorted({*table.passes.round(2)}) == [0.59, 1.76]
    words = figure_text(out / "figures/scale_length.png").caption
    assert "20 steps read 0.0102 million tokens, each once" in words
    assert "of them different, in 1.8 passes" in words and "tokens are read again" in words


def test_the_whole_smoke_profile(tmp_path, in_forks):
    "One test, since all its parts look at the same run."
    items = load_manifest().experiments
    made("smoke", tmp_path)
    check_outputs(items, tmp_path)
    for name, metric in SUMMARIES.items():
        check_summary(name, metric, tmp_path)
    check_passes(tmp_path)
    page = (tmp_path / "index.md").read_text()
    assert SMOKE in page and all(item.title in page for item in items)


DENSITY = """profiles:
  smoke: {description: tiny, budget: a minute}
objects:
  - name: density
    title: Density
    notebook: 65_density.ipynb
    parameters:
      smoke: {methods: [topk], targets: [4], floor_targets: [], seeds: [0]}
    outputs:
      - figures/density.{png,svg,csv}
      - figures/density_measured.{png,svg,csv}
      - tables/density.{csv,md,tex}
      - tables/density-rounding.{csv,md,tex}
      - tables/density-measured.{csv,md,tex}
      - tables/density-summary.csv
      - tables/density-runs.csv
"""


def test_the_l0_of_the_published_atm(tmp_path, in_forks):
    "The inference needs no SAE; its table, its figure and its words tell the same L0s."
    path = tmp_path / "experiments" / "manifest.yaml"
    path.parent.mkdir()
    shutil.copy(ROOT / "nbs/experiments/65_density.ipynb", path.parent)
    path.write_text(DENSITY)
    made("smoke", tmp_path / "out", manifest=path)
    tables = tmp_path / "out" / "tables"
    inferred = pd.read_csv(tables / "density.csv").set_index("measure")
    assert inferred["implied L0"].to_dict() == {"MSE": "4,182", "Cosine": "3,929"}
    assert inferred["share of the latents"].tolist() == ["25.5%", "24.0%"]
    fits = pd.read_csv(tables / "density-rounding.csv").groupby("metric").fits.unique()
    assert fits.map(list).to_dict() == {"Cosine": ["yes"], "MSE": ["yes"], "Top-1 probing": ["no"]}
    words = figure_text(tmp_path / "out/figures/density.png")
    assert "L0 4,182 by MSE and L0 3,929 by Cosine" in words.caption
    reading = (tmp_path / "out/notebooks/density.ipynb").read_text()
    assert "(0.0114 − 0.0068) / 0.0114 = 40%, against JumpReLU only" in reading


# ---- a new experiment

MANIFEST = """# this stays
profiles:
  smoke: {description: tiny, budget: a minute}
  default: {description: small, budget: an hour}

objects:
  - name: planted  # and this
    title: Planted
    notebook: 70_planted.ipynb
    outputs: [tables/planted-summary.csv]
"""


@pytest.fixture
def one_object(tmp_path):
    "A manifest with one object, in a folder with its notebook."
    folder = tmp_path / "experiments"
    folder.mkdir()
    shutil.copy(ROOT / "nbs/experiments/70_planted.ipynb", folder)
    path = folder / "manifest.yaml"
    path.write_text(MANIFEST)
    return path


def test_a_new_experiment_runs_at_once(one_object, tmp_path, in_forks, capsys):
    assert main(["new-experiment", "width", "--manifest", str(one_object)]) == 0, (
        capsys.readouterr()
    )
    assert f"reproduce width --profile smoke --manifest {one_object}" in capsys.readouterr().out
    assert one_object.read_text().startswith(MANIFEST + "\n  - name: width\n")
    assert all(not cell.get("outputs") for cell in cells(one_object.parent / "width.ipynb"))
    made("smoke", tmp_path / "out", manifest=one_object, only=["width"])
    items = [item for item in load_manifest(one_object).experiments if item.name == "width"]
    check_outputs(items, tmp_path / "out")


def test_the_parts_of_a_new_experiment(one_object):
    notebook = new_experiment("width", one_object)
    text = ["".join(cell["source"]) for cell in cells(notebook)]
    headings = [line for part in text for line in part.splitlines() if line.startswith("## ")]
    assert headings == [f"## {part}" for part in PARTS]
    assert not [part for part in text if "my_experiment" in part]
    assert [cell["metadata"] for cell in cells(notebook) if cell["metadata"]] == [
        {"tags": ["parameters"]}
    ]


def cells(path):
    return json.loads(path.read_text())["cells"]


PARTS = ["Parameters", "Measure", "Table", "Figure", "Reading", "Limits"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("planted", "has an experiment 'planted' already: choose another name"),
        ("70_planted", "70_planted.ipynb exists already"),
        ("Width", "'Width' cannot name an experiment: use lower-case letters"),
        ("../width", "cannot name an experiment"),
        ("", "cannot name an experiment"),
    ],
)
def test_a_name_that_is_refused_leaves_nothing(one_object, name, message, capsys):
    before = sorted(one_object.parent.iterdir())
    assert main(["new-experiment", name, "--manifest", str(one_object)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(one_object.parent.iterdir()) == before and one_object.read_text() == MANIFEST


def test_a_manifest_that_cannot_take_an_entry_stays(one_object):
    "Here the objects are not the last part of the file."
    other = MANIFEST + "\nshared: {}\n"
    one_object.write_text(other)
    before = sorted(one_object.parent.iterdir())
    with pytest.raises(
        ValueError, match="manifest.yaml cannot take the experiment 'width': .*YAML"
    ):
        new_experiment("width", one_object)
    assert sorted(one_object.parent.iterdir()) == before and one_object.read_text() == other


# ---- in kernels


def command(out, *args):
    "The command in this process."
    return main(["reproduce", "--profile", "smoke", "--only", "planted", "--out", str(out), *args])


def outputs(folder):
    "Content of all figures and tables."
    files = (p for part in ("figures", "tables") for p in sorted((folder / part).iterdir()))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_kernels_make_an_object_once(tmp_path, shared_cache, monkeypatch, capsys):
    monkeypatch.setenv("ATM_SAE_CACHE", str(shared_cache))
    assert command(tmp_path) == 0 and "1 ok" in capsys.readouterr().out
    check_outputs([load_manifest().pick("planted")], tmp_path)
    before = outputs(tmp_path)
    assert command(tmp_path) == 0 and "1 up to date" in capsys.readouterr().out
    (tmp_path / "figures/planted.png").unlink()
    assert command(tmp_path) == 0 and "1 ok" in capsys.readouterr().out
    assert outputs(tmp_path) == before


# ---- the profiles for Gemma-2-2b, small

SMALL = dict(
    layer=2,
    d_sae=64,
    batch_size=256,
    steps=20,
    n_tokens=10_000,
    targets=[8],
    target=4,
    seeds=[0, 1],
    pretrained=[],
    max_words=600,
    every=10,
)
METHODS = ("atm", "jumprelu as published", "jumprelu+atm anneal=0.5", "random")


def small(value, text):
    "Parameters of the manifest with small numbers, the shipped model, and a text from a file."
    if not isinstance(value, dict):
        return value
    out = {k: SMALL[k] if k in SMALL else small(v, text) for k, v in value.items()}
    if "model" in out:
        out["model"] = str(ROOT / "data" / "nano-gemma2")
    if "activations" in out:
        buffer = {"buffer": 2048} if "buffer" in out["activations"] else {}
        out["activations"] |= {"text": str(text), "context": 64} | buffer
    if isinstance(out.get("methods"), list):
        out["methods"] = [m for m in out["methods"] if m in METHODS]
    return out


def small_manifest(profile, folder):
    "The experiments with small parameters, in `folder`; returns the path of the manifest."
    shutil.copytree(ROOT / "nbs" / "experiments", folder / "exp")
    lines = [json.dumps(dict(text=text)) for text in documents(1000)]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    path = folder / "exp" / "manifest.yaml"
    manifest = yaml.safe_load(path.read_text())
    for item in manifest["objects"]:
        given = item.get("parameters", {})
        kept = {p: given[p] for p in ("common", profile) if p in given}
        item["parameters"] = small(kept, folder / "text.jsonl")
        if item["name"] == "reconstruction":
            item["parameters"]["common"]["spliced_tokens"] = 512
        item.pop("claims", None)  # no claim may be decided by nano-gemma2
    path.write_text(yaml.safe_dump(manifest, sort_keys=False))
    return path


@pytest.mark.parametrize(
    "profile, name", [("gemma", "reconstruction"), ("gemma-long", "absorption")]
)
def test_a_profile_for_gemma_with_the_shipped_model(profile, name, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(runner, "execute_notebook", execute_forked)
    path = small_manifest(profile, tmp_path)
    made(profile, tmp_path / "out", only=[name], manifest=path)
    check_outputs([load_manifest(path).pick(name)], tmp_path / "out")
    stored = [json.loads(p.read_text())["spec"] for p in cache.glob("activations/*/meta.json")]
    assert all(s["dtype"] == s["lm_dtype"] == "bfloat16" for s in stored)
    assert all(s["text"] == str(tmp_path / "text.jsonl") for s in stored)
    held_out = {s["held_out"] for s in stored}
    assert held_out == ({True} if profile == "gemma-long" else {False, True})  # a stream keeps none


# ---- the README


def test_ten_lines_of_the_readme_train_a_base_and_atm():
    "They are a cell of nbs/index.ipynb, which test_notebooks runs."
    readme = (ROOT / "README.md").read_text()
    code, printed = re.findall(r"```python\n(.*?)```\s*```\n(.*?)```", readme, re.S)[0]
    assert "planted_metrics" in code and "steps=2000" in code
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    shape = r"(standard|atm): raw (\d\.\d+), beyond misses (-?\d\.\d+) at L0 \d"
    found = {name: (float(raw), float(beyond)) for name, raw, beyond in re.findall(shape, printed)}
    assert found.keys() == {"standard", "atm"}
    assert all(abs(beyond) <= raw <= 1 for raw, beyond in found.values())
