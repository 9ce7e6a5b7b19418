"""`make site`: the reference of the modules, links between pages, a small site in a real browser
without network. `make lab` starts."""

import ast
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import make_site
import pytest
from reference import comments, entries, module_page, parameter_rows, signature

ROOT = Path(__file__).resolve().parent.parent


def missing(*names):
    "Those of some packages that are not installed."
    return [name for name in names if importlib.util.find_spec(name) is None]


# ---- reference

SOURCE = '''"""Widths and scores"""

__all__ = ["LIMIT", "Spec", "score"]

LIMIT = 8  # latents, at most


class Spec:
    "A `Spec` of *one* run."

    width: int  # of the dictionary
    seed: int = 0
    _hidden: int = 1

    @property
    def name(self) -> str:
        "Its name."

    def _private(self): ...


def score(
    sae: "SAE",
    targets: dict[str, int] | None = None,  # L0 that
    # every method is asked for
    *,
    n: int = 3,  # samples
    **more: float,
) -> float:  # between 0 and 1
    "How good $x$ is < 1."


def helper(x, y): ...
'''


def found(name):
    "The definition of a name in SOURCE, and its comments."
    tree = ast.parse(SOURCE)
    (node,) = [n for n in tree.body if getattr(n, "name", "") == name]
    return node, comments(SOURCE)


def test_parameters_are_documented_by_the_comments_behind_them():
    assert parameter_rows(*found("score")) == [
        ("sae", "SAE", "", ""),
        ("targets", "dict[str, int] | None", "None", "L0 that every method is asked for"),
        ("n", "int", "3", "samples"),
        ("**more", "float", "", ""),
        ("returns", "float", "", "between 0 and 1"),
    ]
    assert signature(found("score")[0]) == "(sae, targets=None, *, n=3, **more)"


def test_a_class_shows_its_fields_and_public_methods():
    text = dict(entries(ast.parse(SOURCE), comments(SOURCE)))["Spec"]
    assert "| `width` | `int` |  | of the dictionary |" in text
    assert "{py:property} name\n:type: str" in text and r"A `Spec` of \*one\* run." in text
    assert "_hidden" not in text and "_private" not in text


def test_a_module_shows_what_is_public(tmp_path):
    (tmp_path / "m.py").write_text(SOURCE)
    text = module_page(tmp_path / "m.py", "package.m", "core/m.ipynb")
    assert re.findall(r"(?m)^:+\{py:(?!property)\w+\} (\w+)", text) == ["LIMIT", "Spec", "score"]
    assert ":value: 8" in text and r"How good \$x\$ is \< 1." in text
    assert "](/core/m.ipynb)" in text and r"`dict[str, int] \| None`" in text


def test_every_public_function_of_the_package_is_shown():
    "Also those whose signatures have comments between parameters."
    for path in sorted((ROOT / "atm_sae").rglob("*.py")):
        if not path.name.startswith("_"):
            public = set(
                ast.literal_eval(re.search(r"__all__ = (\[.*?\])", path.read_text(), re.S)[1])
            )
            text = module_page(path, path.stem)
            shown = set(re.findall(r"(?m)^:::+\{py:(?:function|class|data)\} (\w+)", text))
            assert public <= shown, path


# ---- links


@pytest.fixture
def project(tmp_path):
    "A small project: index, library, module, an experiment and its report, a page of the tutorial."
    root = tmp_path / "project"
    formula = "Absorption is $\\frac{a}{b}$.\n\n$$\\sum_i x_i^2$$"
    links = "[width](core/width.ipynb), [run](../reports/notebooks/width.ipynb), [all](../LICENSE)"
    shown = dict(
        output_type="display_data", metadata={}, data={"text/markdown": "[t](lost.md) $z$"}
    )
    hidden = "# | hide\nsecret = 1"
    cells = [f"# Small\n\n{formula}\n\n{links}\n\n[own](tutorial/own.md#second-part)"]
    write_notebook(root / "nbs/index.ipynb", *cells)
    write_notebook(root / "nbs/core/width.ipynb", "# Width\n\n[index](../index.ipynb)", hidden)
    write_notebook(root / "nbs/report/explore.ipynb", "# Explore")
    write_notebook(root / "reports/notebooks/width.ipynb", "# Run\n\n[Width](../core/width.ipynb)")
    notebook = json.loads((root / "reports/notebooks/width.ipynb").read_text())
    notebook["cells"].append(code("# | echo: false\nprint(1)", shown))
    (root / "reports/notebooks/width.ipynb").write_text(json.dumps(notebook))
    texts = {
        "LICENSE": "free",
        "nbs/guide/more.md": "# More\n",
        "atm_sae/width.py": SOURCE,
        "nbs/tutorial/own.md": "# Own\n\n## Second part\n\nHere, "
        "[a report](../../reports/index.html) and [settings](../experiments/manifest.yaml).",
        "nbs/experiments/manifest.yaml": "profiles: {}\nobjects:\n"
        "  - {name: width, title: Width of a run, group: Own, notebook: 10_width.ipynb}\n",
        "reports/index.html": '<a href="notebooks/width.ipynb">run</a> <a href="tables/t.md">t</a>',
        "reports/tables/t.md": "| a |\n|---|\n| 1 |\n",
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def code(source, *outputs):
    return dict(
        cell_type="code", metadata={}, source=source, outputs=list(outputs), execution_count=1
    )


def write_notebook(path, markdown, *sources):
    cells = [dict(cell_type="markdown", metadata={}, source=markdown), *map(code, sources)]
    spec = dict(display_name="python3", language="python", name="python3")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(dict(cells=cells, metadata=dict(kernelspec=spec), nbformat=4, nbformat_minor=4))
    )


def test_links_lead_to_pages_and_files(project):
    names = make_site.page_names(project, make_site.site_pages(project))
    page = make_site.Page("experiments/width", "reports/notebooks/width.ipynb", "nbs/experiments")
    used = set()

    def changed(text):
        return make_site.with_site_links(text, page, project, names, used)

    assert changed("[a](../core/width.ipynb#x)") == "[a](/core/width.ipynb#x)"
    assert changed("[a](10_width.ipynb) [b](#x)") == "[a](10_width.ipynb) [b](#x)"
    assert changed("[a](../../reports/notebooks/width.ipynb)") == "[a](/experiments/width.ipynb)"
    assert changed("[a](../../LICENSE)") == "[a](site:../LICENSE)" and used == {"LICENSE"}
    assert changed("[a](https://a.b/c)") == "[a](https://a.b/c)"
    (project / "nbs/experiments/10_width.ipynb").write_text("{}")
    assert changed("[a](10_width.ipynb)") == "[a](/experiments/width.ipynb)"


def test_links_that_lead_nowhere_are_found(tmp_path):
    good = '<p id="x"></p><a href="b.html#y"></a><a href="#x"></a><a href="https://a.b"></a>'
    (tmp_path / "a.html").write_text(good)
    (tmp_path / "b.html").write_text('<p id="y"></p><a href="a.html?q=1"></a><a href="#word=s">')
    assert make_site.broken_links(tmp_path) == []
    (tmp_path / "c.html").write_text('<a href="a.html#y"></a><img src="no.png"><a href="#z"></a>')
    assert make_site.broken_links(tmp_path) == ["c.html: #z", "c.html: a.html#y", "c.html: no.png"]


# ---- a small site in a browser


@pytest.mark.skipif(
    bool(missing("sphinx", "myst_nb", "furo", "ziamath")), reason="needs the extra `site`"
)
def test_a_site_without_network(project, browser, tmp_path, monkeypatch):
    monkeypatch.setattr(make_site, "write_sample", lambda path: path.write_text("<h1>Sample</h1>"))
    site = make_site.build(project, tmp_path / "site")
    assert "secret" not in (site / "core/width.html").read_text()
    context, trouble = browser.new_context(offline=True, color_scheme="dark"), []
    page = context.new_page()
    page.on("console", lambda m: trouble.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: trouble.append(str(e)))
    page.on("requestfailed", lambda r: trouble.append(r.url))
    page.on(
        "request", lambda r: None if r.url.startswith(("file:", "data:")) else trouble.append(r.url)
    )
    page.goto((site / "index.html").as_uri())
    formulas = page.locator("math").evaluate_all("all => all.map(m => m.getBoundingClientRect())")
    fonts = page.evaluate(
        "document.fonts.ready.then(all => [...all].map(f => [f.family, f.status]))"
    )
    assert ['"STIX Two Math"', "loaded"] in fonts or ["STIX Two Math", "loaded"] in fonts
    assert len(formulas) == 2 and all(box["height"] > 10 and box["width"] > 5 for box in formulas)
    assert page.locator(".sidebar-tree").get_by_role("link", name="More").count() == 1
    page.locator("article").get_by_role("link", name="own").click()
    assert page.url.endswith("tutorial/own.html#second-part")
    page.get_by_role("link", name="a report").click()
    page.get_by_role("link", name="run").click()
    assert page.url.endswith("experiments/width.html") and page.locator("math").count() == 1
    assert page.locator("article").get_by_text("print(1)").count() == 0
    page.goto((site / "api/atm_sae.width.html").as_uri())
    assert "L0 that every method is asked for" in page.locator("table").all_inner_texts()[-1]
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", dark)[:3])) < 60
    for name in ("results", "report/explore"):
        page.goto((site / f"{name}.html").as_uri())
        page.get_by_role("link", name="sample page of the explorer").click()
        assert page.locator("h1").inner_text() == "Sample"
    page.goto((site / "search.html").as_uri() + "?q=absorption")
    page.locator("#search-results li a").first.wait_for(timeout=10_000)
    assert any(text == "Small" for text in page.locator("#search-results li a").all_inner_texts())
    context.close()
    assert trouble == []


@pytest.mark.skipif(
    bool(missing("sphinx", "myst_nb", "furo", "ziamath")), reason="needs the extra `site`"
)
def test_a_link_that_leads_nowhere_keeps_the_old_site(project, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.html").write_text("old")
    (project / "nbs/tutorial/own.md").write_text("# Own\n\n## Second part\n\n[lost](lost.ipynb)\n")
    with pytest.raises(SystemExit):
        make_site.build(project, tmp_path / "site")
    assert (tmp_path / "site/index.html").read_text() == "old"


def test_the_sample_page_is_made_by_the_commands(tmp_path, monkeypatch):
    "Both commands run, on a planted world and for a few steps."
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "cache"))
    size = "--data planted --l0 4 --d-sae 100 --steps 20 --batch-size 64"
    monkeypatch.setattr(make_site, "SAMPLE_SIZE", size)
    make_site.write_sample(tmp_path / "sample.html")
    text = (tmp_path / "sample.html").read_text(encoding="utf-8")
    assert "What mask off and mask on absorb" in text
    monkeypatch.setattr(make_site, "SAMPLE_SIZE", "--data no-such-model")
    with pytest.raises(SystemExit, match="sample page of the explorer was not made"):
        make_site.write_sample(tmp_path / "sample.html")


# ---- make lab


@pytest.mark.skipif(bool(missing("jupyterlab")), reason="needs the extra `lab`")
def test_make_lab_starts(tmp_path):
    "It serves the page of the lab from a port, and ends when it is told to."
    (tmp_path / "home").mkdir()
    folders = {
        f"JUPYTER_{name}_DIR": str(tmp_path / "home") for name in ("CONFIG", "DATA", "RUNTIME")
    }
    options = "--no-browser --allow-root --port 0 --IdentityProvider.token=word"
    command = ["make", "-s", "-o", ".venv/lab.stamp", "lab", f"ARGS={options}"]
    command.append(f"BIN={Path(sys.executable).parent}")
    log = tmp_path / "log"
    with log.open("w") as file:
        lab = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | folders,
            start_new_session=True,
        )
    try:
        while not (url := re.search(r"(http://127\.0\.0\.1:\d+)(/\S*)\?token", log.read_text())):
            assert lab.poll() is None, log.read_text()
            time.sleep(0.1)
        assert url[2] == "/lab/tree/nbs/tutorial"
        with urllib.request.urlopen(f"{url[1]}{url[2]}?token=word", timeout=60) as answer:
            assert answer.status == 200 and "<title>JupyterLab</title>" in answer.read().decode()
    finally:
        os.killpg(lab.pid, signal.SIGTERM)
        lab.wait(60)
