"The manifest: what is wrong with one, and whose results are out of date."

import json
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import yaml
from atm_sae.artefacts import artefact_closure, computing_versions
from atm_sae.report import manifest as M
from atm_sae.report.manifest import (
    ManifestError,
    Parameter,
    load_manifest,
    read_parameters,
    run_order,
)
from atm_sae.report.verdict import CONTROLS
from atm_sae.methods import method_name, twin_method, with_mask
from toy import COUNT, DECLARED, DOUBLE, notebook

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "old, new, message",
    [
        (
            "steps: 3",
            "stepps: 3",
            "declares no parameter 'stepps'; it has profile, out, steps, rate",
        ),
        ("steps: 3", "steps: 3.5", "steps must be int, got 3.5"),
        ("rate: 1", "rate: 2e-4", "rate must be float, got '2e-4'"),
        ("steps: 3", "out: x", "`out` is set by the runner"),
        (
            "default: {rate: 1}",
            "huge: {rate: 1}",
            "unknown profile 'huge' in parameters; the manifest has smoke, default",
        ),
        ("{default: because}", "{huge: because}", "unknown profile 'huge' in not_comparable"),
        ("name: double", "name: count", "the name 'count' is used twice"),
        (
            "tables/double.md",
            "tables/count-summary.csv",
            "the output 'tables/count-summary.csv' is declared twice",
        ),
        (
            "title: Doubling",
            "titel: Doubling",
            "double: unknown key 'titel'; known are name, title",
        ),
        ("title: Doubling", "title: 3", "double: `title` must be text, got 3"),
        ("- name: double", "- 3\n  - name: double", "object 1: expected a mapping, got 3"),
        ("published: [", "published: [3, ", "count: published 1: expected a mapping, got 3"),
        ("after: [count]", "after: [3]", "double: after 1: expected text, got 3"),
        ("total: 0.5", "total: much", "count: tolerance: `total` must be a number, got 'much'"),
        ("objects:", "objekts:", "manifest.yaml: no `objects`"),
        ("title: Doubling", "about: nothing", "no `title`"),
        ("20_double.ipynb", "21_double.ipynb", "no notebook 21_double.ipynb"),
        ("tables/double.md", "../x.md", "output '../x.md' must lie in figures/ or tables/"),
        ("after: [count]", "after: [counts]", "after: no object 'counts'"),
        (
            "after: [count]",
            "after: [count]\n    profiles: [huge]",
            "unknown profile 'huge' in profiles",
        ),
        ("after: [count]", "after: count", "`after` must be a list"),
        ("tolerance: {total: 0.5}", "", "no tolerance for the published metric 'total'"),
        ("method: topk", "method: topq", "unknown method 'topq'"),
        ("value: 6", "value: six", "count: published 1: `value` must be a number, got 'six'"),
        (
            "value: 6",
            "valu: 6",
            "count: published 1: unknown key 'valu'; known are method, metric, l0",
        ),
        ("expect: lower", "expect: less", "claims 1: `expect` must be 'lower' or 'higher'"),
        ("[tables/count-summary.csv]", "[tables/count.csv]", "read from tables/count-summary.csv"),
        ("budget: seconds}", "cost: 1}", "profile smoke: unknown key 'cost'"),
        ("title: Doubling", "title: Doubling\n    title: Again", "doubled key 'title'"),
        ("objects:", "objects: [", "not valid YAML"),
        ("name: double", "name: Double it", "may hold a-z"),
        ("outputs: [tables/double.md]", "outputs: []", "no outputs"),
        ("rate: 1", "rate: .nan", "count: default: rate is nan: nan cannot be part of a stable"),
        ("steps: 3", "rate: -.inf", "count: common: rate is -inf"),
        ("value: 6", "value: .nan", "published 1: `value` must be a finite number, got nan"),
        ("total: 0.5", "total: .inf", "tolerance: `total` must be a finite number, got inf"),
        ("value: 6", "value: 6, at: {w: .nan}", "count: published 1: at is {'w': nan}: nan cannot"),
        ("value: 6", "value: 6, at: {w: 2026-01-01}", "date has no plain form"),
    ],
)
def test_manifest_errors(toy, old, new, message):
    toy.replace(old, new)
    assert message in toy.error() and toy.cli("--list")[0] == 2


def test_all_problems_at_once(toy):
    toy.replace("steps: 3", "stepps: 3")
    toy.replace("title: Doubling", "titel: Doubling")
    assert toy.error().startswith("manifest.yaml: 3 problems") and "stepps" in toy.error()


@pytest.mark.parametrize("where", ["count", "double"])
def test_no_claim_is_decided_by_a_toy_model(toy, where):
    "Neither by the object's own model nor by that of the objects whose tables it reads."
    model = 'model: str = "nano-gemma2"'
    notebook(toy.path.parent / "10_count.ipynb", COUNT, parameters=f"{DECLARED}{model}")
    if where == "double":
        claim = "claims: [{text: less, difference: atm - topk, metric: total, expect: lower}]"
        toy.replace(f"    {claim}\n", "")
        more = f"outputs: [tables/double.md, tables/double-summary.csv]\n    {claim}"
        toy.replace("outputs: [tables/double.md]", more)
    words = f"{where}: default: claims would be decided by nano-gemma2, a toy of 1.8 million"
    assert words in toy.error() and "smoke" not in toy.error()
    toy.replace("default: {rate: 1}", "default: {rate: 1, model: ./data/nano-gemma2}")
    assert words in toy.error()
    toy.replace("./data/nano-gemma2", "smollm2")
    load_manifest(toy.path)
    toy.replace("model: smollm2", "model: nano-gemma2")
    toy.replace("expect: lower}", "expect: lower, world: planted}")
    load_manifest(toy.path)


def test_a_smoke_run_decides_no_claim(toy):
    toy.run()
    count = load_manifest(toy.path).pick("count")
    assert [line["verdict"] for line in M.claim_verdicts(count, "default", toy.out)] == ["holds"]
    assert M.claim_verdicts(count, "smoke", toy.out) == []


def test_circle(toy):
    toy.replace("name: count\n", "name: count\n    after: [double]\n")
    assert "double, count" in toy.error()


@pytest.mark.parametrize(
    "more, message",
    [
        (dict(tags=()), "no cell has the tag `parameters`"),
        (dict(tags=(["parameters"], ["parameters"])), "2 cells have the tag"),
        (dict(tags=(["parametres"],)), "no cell has"),
        (dict(parameters='profile: str = "smoke"'), "does not declare `out: str`"),
        (dict(parameters=DECLARED + "k = 3"), "`k = 3` is not of the form"),
        (dict(parameters=DECLARED + "k: int = steps"), "`k: int = steps` is not of the form"),
        (dict(parameters=DECLARED + "k: list = [\n1]"), "line 5"),
        (dict(parameters=DECLARED + "k: Odd = 3"), "with a type made of str, int, float"),
        (dict(parameters=DECLARED + "steps: int = 3"), "'steps' is declared twice"),
        (dict(parameters=DECLARED + "k: int = = 3"), "is not Python"),
        (dict(parameters=DECLARED + "k: list = [1e999]"), "double: 20_double.ipynb: k is [inf]"),
    ],
)
def test_notebook_errors(toy, more, message):
    notebook(toy.path.parent / "20_double.ipynb", DOUBLE, **more)
    assert message in toy.error() and "20_double.ipynb" in toy.error()


def test_unreadable_notebook(toy):
    (toy.path.parent / "20_double.ipynb").write_text("{")
    assert "cannot be read as a notebook" in toy.error()


def test_read_parameters(toy):
    p = read_parameters(nbformat.read(toy.path.parent / "10_count.ipynb", 4), "x")
    assert p["steps"] == M.Parameter("steps", "int", 2, "how far to count") and p["rate"].help == ""


@pytest.mark.parametrize(
    "type, value, fits",
    [
        ("int | None", None, True),
        ("float", 1, True),
        ("list[int]", [1], True),
        ("dict[str, float]", {"a": 1}, True),
        ("int", True, False),
        ("int", "1", False),
        ("int", None, False),
        ("list[int]", ["1"], False),
    ],
)
def test_types(type, value, fits):
    assert Parameter("x", type, None).accepts(value) == fits


def test_braces(toy):
    toy.replace("[tables/double.md]", '["tables/{x,y}.{md, csv}"]')
    names = ("x.md", "x.csv", "y.md", "y.csv")
    assert load_manifest(toy.path).pick("double").outputs == tuple(f"tables/{n}" for n in names)


def test_manifest_that_is_not_there(tmp_path):
    with pytest.raises(ManifestError, match="no manifest .*pass --manifest"):
        load_manifest(tmp_path / "none.yaml")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_manifest_of_any_editor_is_read(toy, encoding):
    toy.path.write_text(toy.path.read_text(encoding="utf-8"), encoding=encoding)
    assert load_manifest(toy.path).pick("double").title == "Doubling"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"profiles: {}\n# d\xe9j\xe0", r"cannot be read: .*manifest\.yaml, line 2: byte 0xe9"),
        (b"profiles: {[a]: 1, b: 2}", "not valid YAML: .*unhashable key"),
        (b"", r"manifest\.yaml: expected a mapping"),
    ],
)
def test_a_manifest_that_is_no_text_or_no_mapping(toy, content, message):
    toy.path.write_bytes(content)
    with pytest.raises(ManifestError, match=f"(?s){message}"):
        load_manifest(toy.path)


def test_a_folder_is_no_manifest(tmp_path):
    with pytest.raises(ManifestError, match="cannot be read: .*Is a directory"):
        load_manifest(tmp_path)


def test_a_file_that_is_no_notebook_is_named(tmp_path):
    (tmp_path / "a.ipynb").write_text("[]")
    with pytest.raises(ValueError, match=r"a\.ipynb holds a list.*a notebook was expected"):
        M.notebook_code(tmp_path / "a.ipynb")


# ---- the project's own manifest


def test_the_real_manifest_fits_the_real_notebooks():
    path = M.project_root() / "nbs" / "experiments" / "manifest.yaml"
    manifest = load_manifest(path)
    assert set(manifest.profiles) == {"smoke", "default", "full", "gemma", "gemma-long"}
    assert {e.notebook for e in manifest.experiments} == {
        p.name for p in path.parent.glob("*.ipynb")
    }


def test_the_real_manifest_is_well_formed_and_holds_the_published_values():
    path = M.project_root() / "nbs" / "experiments" / "manifest.yaml"
    experiments, wrong = M.check_manifest(yaml.safe_load(path.read_text()), path)
    assert not wrong
    values = {
        (p["method"], p["metric"], p.get("l0")): p["value"]
        for e in experiments
        for p in e.published
    }
    assert (
        values["atm", "saebench_full_absorption", None] == 0.0068
        and values["topk", "saebench_full_absorption", 40.0] == 0.140248
    )
    assert (
        values["jumprelu", "saebench_full_absorption", 2665.9] == 0.011419
        and values["atm", "mse_saebench", None] == 0.5508
    )
    assert all(p.get("source") and p.get("confidence") for e in experiments for p in e.published)
    order = [e.name for e in run_order(experiments)]
    assert order.index("verdict") > max(map(order.index, ("absorption", "planted", "probing")))


CHOOSING = (
    "tuning",
    "learning_rates",
    "attempts",
    "ablations",
    "why",
)  # objects that choose settings, or could


@pytest.mark.parametrize("profile", ["smoke", "default", "full", "gemma", "gemma-long"])
def test_no_seed_serves_both_tuning_and_verdict(profile):
    used = {True: set(), False: set()}
    for e in load_manifest().of(profile):
        if "seeds" not in (given := e.resolved(profile)):
            continue
        used[e.name in CHOOSING] |= {*given["seeds"], *given.get("choice_seeds", [])}
    assert used[False] and not used[True] & used[False]
    if profile in ("smoke", "full"):
        assert used[True]


def test_every_object_of_the_verdict_uses_the_frozen_settings():
    manifest = load_manifest()
    tuned = manifest.pick("tuning").resolved("full")["tuned"]
    on_smollm2 = manifest.pick("learning_rates").resolved("full")["tuned"]
    for name in (
        "absorption",
        "importance",
        "reconstruction",
        "probing",
        "planted",
        "masking",
        "dynamics",
        "noise",
        "stability",
        "scale",
        "case_study",
        "letter",
    ):
        for profile in ("default", "full"):
            e = manifest.pick(name)
            if not e.profiles or profile in e.profiles:
                given = e.resolved(profile)
                expected = on_smollm2 if given.get("model") == "smollm2" else tuned
                assert given["tuned"] == expected, (name, profile)


def test_importance_and_stability_read_the_saes_that_absorption_trains_and_the_controls():
    manifest = load_manifest()
    names = ("absorption", "importance", "stability")
    first, *others = (manifest.pick(name).resolved("full") for name in names)
    shared = "model layer activations n_tokens targets seeds steps batch_size d_sae tuned"
    for name in shared.split():
        assert all(given[name] == first[name] for given in others), name
    importance, stability = ({*given["methods"]} for given in others)
    assert stability < importance
    controls = {with_mask(base, mask) for base in ("standard", "topk") for mask in CONTROLS}
    assert controls < importance and importance - controls < {*first["methods"]}
    assert {"standard", "topk", *map(twin_method, controls)} < importance


def test_on_smollm2_the_rates_are_those_that_the_committed_search_chose():
    given = load_manifest().pick("learning_rates").resolved("full")
    table = pd.read_csv(ROOT / "reports/full/tables/learning_rates.csv", keep_default_na=False)
    assert set(table.groupby("base").size()) == {4}  # the same budget for every base
    chosen = table[table.chosen == "yes"].set_index("base").rate
    assert len(chosen) == len(given["scales"]) == 5
    for base, scales in given["scales"].items():
        rate = chosen[method_name(base)]
        assert min(scales) < rate < max(scales)
        assert given["tuned"][base].get("lr_scale", 1) == rate


def test_on_smollm2_a_base_and_its_masked_form_differ_in_the_mask_alone():
    manifest = load_manifest()
    tuned = manifest.pick("learning_rates").resolved("full")["tuned"]
    strength = {k: manifest.pick("tuning").resolved("full")["tuned"]["atm"][k] for k in "cr"}
    for base in ("standard", "topk", "batchtopk", "jumprelu", "matryoshka"):
        assert tuned[with_mask(base, "atm")] == tuned[base] | strength


def test_the_frozen_settings_are_what_the_committed_search_chose():
    manifest = load_manifest()
    tuned, best = (
        manifest.pick(n).resolved("full")[k] for n, k in (("tuning", "tuned"), ("attempts", "best"))
    )
    table = pd.read_csv(ROOT / "reports/full/tables/tuning.csv", keep_default_na=False)
    chosen = table[table.chosen == "yes"]
    read = {
        r.method: {}
        if r.settings == "default"
        else {k: float(v) for k, v in (pair.split(" = ") for pair in r.settings.split(", "))}
        for r in chosen.itertuples()
    }
    assert read == {method_name(m): s for m, s in tuned.items() if " " not in m} and len(read) == 10
    assert set(table.groupby("method").size()) == {8}  # the same budget for every method
    runs = pd.read_csv(ROOT / "reports/full/tables/attempts-runs.csv")
    cost = runs[runs.method.str.contains("atm")].groupby("method").cost.mean()
    assert (
        cost.idxmin() == best
        and tuned[best]
        == tuned["jumprelu+atm"] | manifest.pick("attempts").resolved("full")["attempts"][best]
    )


# ---- fingerprints


def opened(*lines):
    "The lines of a log, as `Artefact.opened` writes them."
    base = dict(kind="runs", code="c", inputs={}, makers=["a.b"], choose={}, cut=[], sources={})
    base |= dict(spec_types=[], packages={}, content="x")
    return "".join(json.dumps(base | line) + "\n" for line in lines)


def test_opened_artefacts_are_grouped(tmp_path):
    log = tmp_path / "opened.jsonl"
    assert M.opened_groups(log) == []
    log.write_text(opened(dict(key="1"), dict(key="2"), dict(key="1"), dict(key="3", code="d")))
    groups = {g["code"]: g for g in M.opened_groups(log)}
    assert {code: g["number"] for code, g in groups.items()} == {"c": 2, "d": 1}
    assert "key" not in groups["c"] and groups["c"]["keys"] != groups["d"]["keys"]


def test_opened_artefacts_that_would_be_made_otherwise(tmp_path, monkeypatch):
    "Once for each kind, with what changed: code, packages, or an input."
    maker = ("data.planted.zipf_rates",)
    now = artefact_closure(*maker, choose={}, cut=(), spec_types=())
    versions = computing_versions(now.packages)
    good = dict(makers=maker, code=now.hash, packages=versions, sources=dict(model="m"))
    good |= dict(inputs=dict(model="abc", activations="any"))
    monkeypatch.setattr("atm_sae.data.lm.model_checksum", lambda name: {"m": "abc"}[name])
    log = tmp_path / "opened.jsonl"

    def changes(*lines):
        log.write_text(opened(*(good | dict(key=str(i)) | line for i, line in enumerate(lines))))
        return M.opened_changes(M.opened_groups(log))

    assert changes({}, {}) == []
    assert changes(dict(code="old"), {}) == ["runs (code)"]
    assert changes(dict(makers=["data.planted.gone"])) == ["runs (code)"]
    assert changes(dict(packages=dict(numpy="1"))) == ["runs (packages)"]
    old = dict(inputs=dict(model="xyz"), kind="activations", code="old")
    assert changes(old, {}) == ["activations (code, model)"]


def test_changed_parts_name_at_most_three():
    old = dict(notebook="a", library=dict(a=1, b=1, c=1, d=1), inputs=dict(x=1))
    new = dict(notebook="b", library=dict(a=2, b=2, c=2, e=1), inputs=dict(x=1))
    assert M.changed_parts(old, new) == ["notebook", "library (a, b, c, ...)"]
    assert M.changed_parts({}, dict(parameters=dict(steps=1))) == ["parameters"]


def test_a_fingerprint_follows_what_the_notebook_imports(toy):
    "The code that it reaches by name, up to the getters; not the modules that only carry results."
    path = toy.path.parent / "20_double.ipynb"
    call = "from atm_sae.train.runs import get_run\nfrom atm_sae.stats import format_interval"
    notebook(path, call)
    manifest = load_manifest(toy.path)
    parts = M.fingerprint(manifest, manifest.pick("double"), "smoke", toy.out)
    assert {"stats.format_interval", "stats.format_number"} <= parts["library"].keys()
    assert not [k for k in parts["library"] if k.startswith(("train", "report", "artefacts"))]
    assert parts["inputs"] == {"tables/count-summary.csv": None}
    notebook(path, call + "  # a comment")
    assert M.fingerprint(manifest, manifest.pick("double"), "smoke", toy.out) == parts


def test_code_that_is_no_python_is_kept_and_cannot_be_followed(tmp_path):
    cell = nbformat.v4.new_code_cell("%time x = 1\nfor")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "a.ipynb")
    code = M.notebook_code(tmp_path / "a.ipynb")
    assert code == "%time x = 1\nfor"
    with pytest.raises(M.ManifestError, match="the code of a notebook cannot be followed"):
        M.notebook_closure(code)


def test_other_outputs_and_unknown_inputs(tmp_path):
    experiment = SimpleNamespace(name="b", outputs=("a.csv",))
    assert M._output_reason(dict(outputs={}), experiment, tmp_path) == (
        "other outputs are declared now"
    )
    assert M._input_checksum("weather", None) is None
