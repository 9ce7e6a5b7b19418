"The manifest: what is wrong with one, and whose results are out of date."

from pathlib import Path
import nbformat
import pandas as pd
import pytest
from atm_sae.report import manifest as M
from atm_sae.report.manifest import ManifestError, load_manifest, read_parameters, run_order
from atm_sae.methods import method_name
from toy import DECLARED, DOUBLE, notebook, real, toy  # real and toy are fixtures

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
        ("title: Doubling", "titel: Doubling", "unknown key 'titel'"),
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
        ("value: 6", "value: six", "published value 'six' is not a number"),
        ("value: 6", "valu: 6", "unknown key 'valu'"),
        ("expect: lower", "expect: less", "expects 'lower' or 'higher'"),
        ("[tables/count-summary.csv]", "[tables/count.csv]", "read from tables/count-summary.csv"),
        ("budget: seconds}", "cost: 1}", "profile smoke: unknown key 'cost'"),
        ("title: Doubling", "title: Doubling\n    title: Again", "doubled key 'title'"),
        ("objects:", "objects: [", "not valid YAML"),
        ("name: double", "name: Double it", "may hold a-z"),
        ("outputs: [tables/double.md]", "outputs: []", "no outputs"),
    ],
)
def test_manifest_errors(toy, old, new, message):
    toy.replace(old, new)
    assert message in toy.error() and toy.cli("--list")[0] == 2


def test_all_problems_at_once(toy):
    toy.replace("steps: 3", "stepps: 3")
    toy.replace("title: Doubling", "titel: Doubling")
    assert toy.error().startswith("manifest.yaml: 3 problems") and "stepps" in toy.error()


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
        (dict(parameters=DECLARED + "steps: int = 3"), "'steps' is declared twice"),
        (dict(parameters=DECLARED + "k: int = = 3"), "is not Python"),
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


def test_types():
    assert (
        M._fits(None, "int | None")
        and M._fits(1, "float")
        and M._fits([1], "list[int]")
        and M._fits(object(), "Odd")
    )
    assert not M._fits(True, "int") and not M._fits("1", "int") and not M._fits(None, "int")


def test_braces():
    assert M._expand("a/{x,y}.{p, q}") == ["a/x.p", "a/x.q", "a/y.p", "a/y.q"]


def test_manifest_that_is_not_there(tmp_path):
    with pytest.raises(ManifestError, match="no manifest .*pass --manifest"):
        load_manifest(tmp_path / "none.yaml")


# ---- the project's own manifest


def test_the_real_manifest_fits_the_real_notebooks():
    path = M.project_root() / "nbs" / "experiments" / "manifest.yaml"
    if not list(path.parent.glob("*.ipynb")):
        pytest.skip("no experiment notebooks yet")
    manifest = load_manifest(path)
    assert set(manifest.profiles) == {"smoke", "default", "full", "gemma", "gemma-long"}
    assert {e.notebook for e in manifest.experiments} == {
        p.name for p in path.parent.glob("*.ipynb")
    }


def test_the_real_manifest_is_well_formed_and_holds_the_published_values():
    path = M.project_root() / "nbs" / "experiments" / "manifest.yaml"
    experiments, wrong = M._check_manifest(M._load_yaml(path), path)
    assert [w for w in wrong if "no notebook" not in w] == [] or list(path.parent.glob("*.ipynb"))
    values = {
        (p["method"], p["metric"], p.get("l0")): p["value"]
        for e in experiments
        for p in e.published
    }
    assert (
        values["atm", "mean_full_absorption_score", None] == 0.0068
        and values["topk", "mean_full_absorption_score", 40.0] == 0.140248
    )
    assert (
        values["jumprelu", "mean_full_absorption_score", 2665.9] == 0.011419
        and values["atm", "mse_saebench", None] == 0.5508
    )
    assert all(p.get("source") and p.get("confidence") for e in experiments for p in e.published)
    order = [e.name for e in run_order(experiments)]
    assert order.index("verdict") > max(map(order.index, ("absorption", "planted", "probing")))


CHOOSING = ("tuning", "attempts", "ablations")  # objects that choose settings, or could


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
    for name in (
        "absorption",
        "reconstruction",
        "probing",
        "planted",
        "masking",
        "dynamics",
        "letters",
        "noise",
        "stability",
        "case_study",
    ):
        for profile in ("default", "full"):
            e = manifest.pick(name)
            if not e.profiles or profile in e.profiles:
                assert e.resolved(profile)["tuned"] == tuned, (name, profile)


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


def test_the_library_is_hashed_once_as_long_as_its_files_stay(tmp_path, monkeypatch):
    "Every object of a page asks for it."
    (tmp_path / "a.py").write_text("x = 1")
    asked = []
    monkeypatch.setattr(M.importlib.resources, "files", lambda package: tmp_path)
    monkeypatch.setattr(
        M, "code_hash", lambda without: asked.append(without) or f"hash {len(asked)}"
    )
    assert [M._library_hash() for _ in range(3)] == ["hash 1"] * 3
    (tmp_path / "a.py").write_text("x = 22")
    assert M._library_hash() == "hash 2"
    (tmp_path / "b.py").write_text("")
    assert [M._library_hash() for _ in range(2)] == ["hash 3"] * 2 and len(asked) == 3
