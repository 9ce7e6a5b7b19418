"The notebooks are the source: module files, README and saved outputs all follow from them."

import ast, configparser, json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from readme import ROOT, readme_text

NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
LIBRARY = [p for p in NOTEBOOKS if p.parent.name == "nbs" and re.match(r"\d\d_", p.name)]
MODULES = sorted(p for p in (ROOT / "atm_sae").glob("*.py") if not p.name.startswith("_"))
name = lambda p: p.relative_to(ROOT / "nbs").with_suffix("").as_posix()
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=name)


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def code_cells(path):
    return [c for c in cells(path) if c["cell_type"] == "code"]


def module_order():
    "Module name -> its place in the order of the notebooks' numbers."
    order = {}
    for path in LIBRARY:
        found = re.search(
            r"^#\|\s*default_exp\s+(\w+)",
            "\n".join("".join(c["source"]) for c in code_cells(path)),
            re.M,
        )
        assert found, f"{path.name} has no #| default_exp"
        order[found[1]] = len(order)
    return order


# ---- notebooks -> atm_sae


def compare_trees(expected, found):
    "What is stale, missing or superfluous in `found`, as lines of text."
    read = lambda folder: {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*.py")
        if p.name != "__init__.py"
    }
    a, b = read(expected), read(found)
    return sorted(
        [f"missing: {n}" for n in a.keys() - b.keys()]
        + [f"no notebook makes: {n}" for n in b.keys() - a.keys()]
        + [f"stale: {n}" for n in a.keys() & b.keys() if a[n] != b[n]]
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A fresh copy of the project into which the notebooks were exported."
    copy = tmp_path_factory.mktemp("export") / "atm-sae"
    (copy / "atm_sae").mkdir(parents=True)
    shutil.copy(ROOT / "settings.ini", copy)
    shutil.copy(ROOT / "atm_sae" / "__init__.py", copy / "atm_sae")
    shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    command = [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return copy


def test_modules_are_what_the_notebooks_export(exported):
    differences = compare_trees(exported / "atm_sae", ROOT / "atm_sae")
    assert not differences, (
        "run nbdev_export (and delete modules without a notebook): " + "; ".join(differences)
    )


def test_export_leaves_the_version_alone(exported):
    assert (exported / "atm_sae" / "__init__.py").read_text() == (
        ROOT / "atm_sae" / "__init__.py"
    ).read_text()
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "settings.ini")
    assert (
        f'__version__ = "{settings["DEFAULT"]["version"]}"'
        in (ROOT / "atm_sae" / "__init__.py").read_text()
    )


def test_compare_trees_sees_all_three_faults(tmp_path):
    for folder, files in (
        ("a", {"same.py": "1", "old.py": "2", "new.py": "3"}),
        ("b", {"same.py": "1", "old.py": "0", "gone.py": "4"}),
    ):
        (tmp_path / folder).mkdir()
        for file, text in files.items():
            (tmp_path / folder / file).write_text(text)
    assert compare_trees(tmp_path / "a", tmp_path / "b") == [
        "missing: new.py",
        "no notebook makes: gone.py",
        "stale: old.py",
    ]


# ---- imports


def imports(tree):
    "All imports in a module, as (dotted name, names imported from it); relative ones made absolute."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["atm_sae" if node.level else "", node.module]))
            yield base, [alias.name for alias in node.names]


def used_modules(tree):
    "The modules of this package that a module imports."
    for base, names in imports(tree):
        package, _, rest = base.partition(".")
        if package == "atm_sae":
            yield from ([rest.split(".")[0]] if rest else (n for n in names if n != "__version__"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_module_imports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not {base.split(".")[0] for base, _ in imports(tree)} & {
        "nbdev",
        "fastcore",
        "execnb",
        "ghapi",
    }, "development tools must not be imported"
    order = module_order()
    assert path.stem in order, f"no notebook exports {path.name}"
    wrong = [m for m in used_modules(tree) if order.get(m, len(order)) >= order[path.stem]]
    assert not wrong, f"{path.stem} imports {wrong}, which do not come before it"


def test_used_modules_sees_every_form():
    tree = ast.parse(
        "import atm_sae.a, numpy\nfrom atm_sae import b, __version__\nfrom .c import x\nfrom . import d\ndef f():\n    from atm_sae.e import y"
    )
    assert sorted(used_modules(tree)) == ["a", "b", "c", "d", "e"]


# ---- notebooks as they are saved

# an experiment is saved bare: its outputs depend on the profile, and stand in the executed copies that the runner keeps
EXECUTED = sorted(
    [
        *(ROOT / "reports" / "notebooks").glob("*.ipynb"),
        *(ROOT / "reports" / "full" / "notebooks").glob("*.ipynb"),
    ]
)


def test_every_experiment_has_an_executed_copy():
    assert {p.stem.partition("_")[2] for p in NOTEBOOKS if p.parent.name == "experiments"} == {
        p.stem for p in EXECUTED
    }


@pytest.mark.parametrize(
    "path",
    [p for p in NOTEBOOKS if p.parent.name != "experiments"] + EXECUTED,
    ids=lambda p: p.relative_to(ROOT).with_suffix("").as_posix(),
)
def test_notebook_has_outputs_and_no_errors(path):
    outputs = [o for c in code_cells(path) for o in c["outputs"]]
    assert outputs, "saved without outputs: run it and save"
    assert not [o["ename"] for o in outputs if o["output_type"] == "error"]


FOREIGN = re.compile(
    r'(?<![\w.:/])(/(home|root|work|tmp|Users|private|mnt|workspace)/\w[^\s"\']*|[A-Z]:\\\\\w+)'
)


@each_notebook
def test_notebook_has_no_absolute_paths(path):
    texts = ["".join(c["source"]) for c in cells(path)]
    for output in (o for c in code_cells(path) for o in c["outputs"]):
        texts += ["".join(output.get("text", []))]
        texts += ["".join(v) for k, v in output.get("data", {}).items() if k.startswith("text/")]
    found = [m[1] for text in texts for m in FOREIGN.finditer(text)]
    assert not found


def test_foreign_paths():
    assert (
        FOREIGN.search("in '/home/me/x.py'")
        and FOREIGN.search("File /tmp/a")
        and not FOREIGN.search("see https://a.b/home/x or ../tmp/y or data/work/z")
    )


@each_notebook
def test_notebook_is_clean(path, tmp_path):
    from nbdev.clean import clean_nb, process_write

    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "settings.ini")
    keys = settings["DEFAULT"]["allowed_cell_metadata_keys"].split()
    process_write(
        "cannot clean",
        lambda nb: clean_nb(nb, allowed_cell_metadata_keys=keys),
        path,
        tmp_path / "clean.ipynb",
    )
    assert (tmp_path / "clean.ipynb").read_text(encoding="utf-8") == path.read_text(
        encoding="utf-8"
    ), "run nbdev_clean"


# ---- README


@pytest.mark.skipif(
    not (ROOT / "nbs" / "index.ipynb").exists(), reason="there is no nbs/index.ipynb"
)
def test_readme_is_the_index_notebook():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme_text(), (
        "run python tests/readme.py"
    )


def test_readme_text(tmp_path):
    code = lambda source, *outputs: {
        "cell_type": "code",
        "source": source,
        "outputs": list(outputs),
    }
    path = tmp_path / "index.ipynb"
    path.write_text(
        json.dumps(
            {
                "cells": [
                    {
                        "cell_type": "markdown",
                        "source": "# Title\n[sae](05_sae.ipynb) ![f](../reports/figures/f.png) [web](https://x.org) [top](#title)",
                    },
                    code("#| hide\nsecret = 1"),
                    code(
                        "#| eval: true\n1 + 1",
                        {"output_type": "execute_result", "data": {"text/plain": "2"}},
                    ),
                    code(
                        "print('a')", {"output_type": "stream", "name": "stdout", "text": ["a\n"]}
                    ),
                ]
            }
        )
    )
    assert readme_text(path) == (
        "# Title\n[sae](nbs/05_sae.ipynb) ![f](reports/figures/f.png) [web](https://x.org) [top](#title)\n\n"
        "```python\n1 + 1\n```\n\n```\n2\n```\n\n```python\nprint('a')\n```\n\n```\na\n```\n"
    )


def test_readme_refuses_pictures(tmp_path):
    path = tmp_path / "index.ipynb"
    path.write_text(
        json.dumps(
            {
                "cells": [
                    {
                        "cell_type": "code",
                        "source": "plot()",
                        "outputs": [{"output_type": "display_data", "data": {"image/png": ""}}],
                    }
                ]
            }
        )
    )
    with pytest.raises(ValueError, match="index.ipynb, cell 0 draws a picture"):
        readme_text(path)


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert (
        len(links) > 20 and [l for l in links if "://" not in l and not (ROOT / l).exists()] == []
    )
