"""What becomes stale after a change: cache keys of artefacts, and objects of the reports.

Each case edits one line in a copy of the package; closures are read from that copy as text."""

import shutil
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from atm_sae import ActivationSpec, WorldConfig, artefacts, closure, recipe
from atm_sae.artefacts import write_json
from atm_sae.data.activations import activation_artefact
from atm_sae.data.lm import load_lm, model_checksum
from atm_sae.evals.first_letter import TaskSpec, task_artefact
from atm_sae.evals.probing import ProbingTask, probing_artefact
from atm_sae.report.manifest import (
    changed_parts,
    fingerprint,
    load_manifest,
    notebook_closure,
    opened_changes,
    opened_groups,
)
from atm_sae.sae.atm import ATMConfig
from atm_sae.train.runs import run_artefact

PACKAGE = Path(str(files("atm_sae")))
ROOT = PACKAGE.parent
WORLD, STORE = WorldConfig(), ActivationSpec(n_tokens=20_000)
OBJECTS = ("planted", "absorption")  # one reads planted worlds alone, one the language model


def specs(store=STORE):
    "Runs of some methods, in the planted world and on the language model."
    out = {}
    for method in ("atm", "topk", "jumprelu"):
        out[f"planted {method}"] = recipe(method, WORLD, 64, 128, l0=4, steps=10)
        out[f"lm {method}"] = recipe(method, store, 128, 256, l0=4, steps=10)
    out["planted dropout"] = recipe("dropout", WORLD, 64, 128, l0=4, steps=10)
    return out


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "cache"))
    yield
    notebook_closure.cache_clear()


@pytest.fixture(scope="module")
def lm():
    return load_lm("nano-gemma2")


def put_activations(store=STORE, content="the same bytes"):
    "Pretend that the activations were made, with this content."
    found = activation_artefact(store)
    write_json(found.folder.with_suffix(".json"), {"content": content})


def all_artefacts(lm, store=STORE):
    "One artefact of each kind, and several runs."
    questions = [ProbingTask("toy", "toy", ("a", "b"), (True, False), ("c", "d"), (True, False))]
    found = {"activations": activation_artefact(store), "task": task_artefact(lm, TaskSpec(2))}
    found["probing"] = probing_artefact(lm, 2, questions)
    return found | {name: run_artefact(spec) for name, spec in specs(store).items()}


def keys_of(found):
    return {name: artefact.key for name, artefact in found.items()}


def read_by(name, found):
    "The artefacts that an object opens."
    kinds = {"planted": PLANTED, "absorption": ["activations", "task", *LM]}
    return [found[n] for n in kinds[name]]


def read_code_from(folder, monkeypatch):
    "Closures are read from the package in this folder."
    monkeypatch.setattr(closure, "files", lambda name: folder)
    notebook_closure.cache_clear()


def edited(folder, edits):
    "A copy of the package with some lines changed: {file: (old, new)}."
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, (old, new) in edits.items():
        path = folder / name
        source = path.read_text(encoding="utf-8")
        assert old in source, f"{name} has no {old!r}: adapt the test"
        path.write_text(source.replace(old, new, 1), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def before(lm, tmp_path_factory):
    "Keys, fingerprints and opened artefacts before any change."
    out, opened = tmp_path_factory.mktemp("out"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATM_SAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        put_activations()
        found = all_artefacts(lm)
        for name in OBJECTS:
            patch.setenv("ATM_SAE_OPENED", str(out / f"{name}.jsonl"))
            for artefact in read_by(name, found):
                artefact.opened()
            opened[name] = opened_groups(out / f"{name}.jsonl")
        return keys_of(found), fingerprints(out), opened


def fingerprints(out):
    manifest = load_manifest()
    return {n: fingerprint(manifest, manifest.pick(n), "default", out) for n in OBJECTS}


def stale_after(before, lm, out):
    "Names of the artefacts and of the objects that have to be made again."
    old_keys, old_prints, opened = before
    keys, prints = keys_of(all_artefacts(lm)), fingerprints(out)
    objects = [
        name
        for name in OBJECTS
        if changed_parts(old_prints[name], prints[name]) or opened_changes(opened[name])
    ]
    return [n for n in keys if keys[n] != old_keys[n]], objects


RUNS = [*specs()]
PLANTED = [n for n in RUNS if n.startswith("planted")]
LM = [n for n in RUNS if n.startswith("lm")]
NEW_ROW = '    "lasso": Architecture(\n        label="Lasso",\n        colour="#000000",\n'
NEW_ROW += '        settings=("l1",),\n        sized_by="target_l0",\n        learning_rate=1e-3,\n'
NEW_ROW += '        inference="standard",\n    ),\n    "topk": Architecture('

BOTH = list(OBJECTS)
CASES = {
    "docstring": ("train/loop.py", "Train `sae`", "Trains `sae`", [], []),
    "error text": ("sae/architectures.py", "must be positive", "must be at least 1", [], []),
    "type hint": ("sae/losses.py", "pre: Tensor, k: int", "pre: object, k: object", [], []),
    "version": ("__init__.py", '__version__ = "0.1.0"', '__version__ = "0.2.0"', [], []),
    "colour": ("methods.py", 'colour="#0072B2"', 'colour="#0072B3"', [], BOTH),
    "figure": ("report/figures.py", '"font.size": 8', '"font.size": 7', [], BOTH),
    "new row": ("methods.py", '    "topk": Architecture(', NEW_ROW, [], BOTH),
    "mask": (
        "sae/atm.py",
        "importance.std(correction=0)",
        "importance.std()",
        ["planted atm", "lm atm", "planted dropout"],
        BOTH,
    ),
    "one architecture": (
        "sae/architectures.py",
        "return pre > weights.threshold\n",
        "return pre >= weights.threshold\n",
        ["planted jumprelu", "lm jumprelu"],
        BOTH,
    ),
    "loop": ("train/loop.py", "fused=True", "fused=False", RUNS, BOTH),
    "what hands out the work": ("train/runs.py", "r[0], fresh) for r", "r[0], x) for r", [], []),
    "planted world": ("data/planted.py", "torch.randn(", "torch.rand(", PLANTED, ["planted"]),
    "text": ("data/text.py", "len(d) > 60", "len(d) > 61", ["activations"], ["absorption"]),
    "what a run reads": (
        "data/batches.py",
        "CacheBatches(cache, batch_size, seed)",
        "CacheBatches(cache, batch_size, seed, stop=0.8)",
        LM,
        ["absorption"],
    ),
    "rows of a cache": (
        "data/activations.py",
        "return -(-spec.n_tokens // spec.context)",
        "return spec.n_tokens // spec.context",
        ["activations"],
        ["absorption"],
    ),
    "order of a cache": ("data/batches.py", '"epoch"', '"round"', LM, ["absorption"]),
    "probes": (
        "evals/first_letter.py",
        "share: float = 0.2",
        "share: float = 0.3",
        ["task"],
        ["absorption"],
    ),
}


@pytest.mark.parametrize(
    "name, old, new, artefacts_changed, objects_changed", CASES.values(), ids=CASES
)
def test_an_edit_makes_exactly_what_depends_on_it_stale(
    name, old, new, artefacts_changed, objects_changed, before, lm, tmp_path, monkeypatch
):
    read_code_from(edited(tmp_path / "atm_sae", {name: (old, new)}), monkeypatch)
    put_activations()
    stale, objects = stale_after(before, lm, tmp_path)
    assert stale == artefacts_changed
    assert objects == objects_changed


def test_equal_activations_keep_the_runs(before, lm):
    put_activations(content="other bytes")
    assert [n for n, key in keys_of(all_artefacts(lm)).items() if key != before[0][n]] == LM


@pytest.mark.parametrize(
    "package, stale, objects",
    [
        ("torch", ["activations", "task", "probing", *RUNS], BOTH),
        ("transformers", ["activations", "task", "probing"], BOTH),
        ("tokenizers", ["activations", "task", "probing"], BOTH),
        ("safetensors", [], []),
    ],
)
def test_versions_of_packages(package, stale, objects, before, lm, tmp_path, monkeypatch):
    version = artefacts.package_version
    monkeypatch.setattr(
        artefacts, "package_version", lambda name: "9.9" if name == package else version(name)
    )
    put_activations()
    found, stale_objects = stale_after(before, lm, tmp_path)
    assert sorted(found) == sorted(stale)
    assert stale_objects == objects


def test_a_file_of_the_model(lm, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "data" / "nano-gemma2", folder)
    store = replace(STORE, model=str(folder))
    put_activations(store)
    first = keys_of(all_artefacts(replace(lm, checksum=model_checksum(folder)), store))
    with open(folder / "tokenizer_config.json", "a", encoding="utf-8") as f:
        f.write("\n")
    put_activations(store)
    after = keys_of(all_artefacts(replace(lm, checksum=model_checksum(folder)), store))
    assert [n for n in after if after[n] != first[n]] == ["activations", "task", "probing"]


def test_a_default_of_the_mask(monkeypatch):
    "A recipe writes its defaults into the specification, so another default is another run."
    before = keys_of({n: run_artefact(s) for n, s in specs().items() if n in PLANTED})
    monkeypatch.setattr(
        ATMConfig.__init__, "__defaults__", (0.9, *ATMConfig.__init__.__defaults__[1:])
    )
    after = keys_of({n: run_artefact(s) for n, s in specs().items() if n in PLANTED})
    assert [n for n in after if after[n] != before[n]] == ["planted atm", "planted dropout"]


@pytest.mark.parametrize("name", ["absorption"])
def test_published_values_belong_to_what_draws_them(name, tmp_path):
    manifest = load_manifest()
    found = fingerprint(manifest, manifest.pick(name), "default", tmp_path)
    assert "published values" in found["inputs"]
