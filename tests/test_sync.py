"The notebooks are the source: modules, README and saved outputs follow from them."

import configparser
import json
import re
from functools import partial
from pathlib import Path

import pytest
from atm_sae.report.manifest import load_manifest
from notebooks import differences
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from readme import ROOT, described, readme_text

NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)


def title(path):
    "A notebook as it is called in the tests."
    return path.relative_to(ROOT).with_suffix("").as_posix()


each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=title)


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def code_cells(path):
    return [c for c in cells(path) if c["cell_type"] == "code"]


def settings():
    "The part of settings.ini that nbdev reads."
    found = configparser.ConfigParser(interpolation=None)
    found.read(ROOT / "settings.ini")
    return found["DEFAULT"]


# ---- notebooks -> atm_sae


# That the modules are what the notebooks export is checked by `make lint`.


def test_the_version_is_that_of_the_settings():
    text = (ROOT / "atm_sae" / "__init__.py").read_text()
    assert f'__version__ = "{settings()["version"]}"' in text


def test_differences_are_of_three_kinds(tmp_path):
    for folder, files in (
        ("made", {"same.py": "1", "part/old.py": "2", "new.py": "3"}),
        ("found", {"same.py": "1", "part/old.py": "0", "gone.py": "4"}),
    ):
        for file, text in files.items():
            (tmp_path / folder / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / file).write_text(text)
    assert differences(tmp_path / "made", tmp_path / "found") == [
        "missing: new.py",
        "no notebook makes: gone.py",
        "stale: part/old.py",
    ]


def test_a_module_lies_where_its_notebook_lies():
    wrong = []
    for path in NOTEBOOKS:
        source = "\n".join("".join(c["source"]) for c in code_cells(path))
        found = re.search(r"^#\s*\|\s*default_exp\s+(\S+)", source, re.M)
        if not found:
            continue
        place = path.relative_to(ROOT / "nbs").with_suffix("").as_posix().removeprefix("core/")
        if place != found[1].replace(".", "/"):
            wrong.append(f"{place} exports {found[1]}")
    assert not wrong


# ---- notebooks as they are saved

# An experiment is saved without outputs, since they depend on the profile. The copies that the
# runner keeps have them.
EXECUTED = sorted((ROOT / "reports").glob("**/notebooks/*.ipynb"))
EXECUTED = [p for p in EXECUTED if p.relative_to(ROOT / "reports").parts[0] != "smoke"]


def test_every_experiment_has_an_executed_copy():
    "All but those of which the full profile's runs on the language model are still to come."
    names = {p.stem.partition("_")[2] for p in NOTEBOOKS if p.parent.name == "experiments"}
    manifest = load_manifest()
    default = {e.name for e in manifest.of("default")}
    waiting = {
        e.name
        for e in manifest.of("full")
        if e.name not in default and e.resolved("full").get("model") == "smollm2"
    }
    executed = {p.stem for p in EXECUTED}
    assert names - waiting <= executed <= names


@pytest.mark.parametrize(
    "path", [p for p in NOTEBOOKS if p.parent.name != "experiments"] + EXECUTED, ids=title
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
    assert FOREIGN.search("in '/home/me/x.py'") and FOREIGN.search("File /tmp/a")
    assert not FOREIGN.search("see https://a.b/home/x or ../tmp/y or data/work/z")


@each_notebook
def test_notebook_is_clean(path, tmp_path):
    from nbdev.clean import clean_nb, process_write

    keys = settings()["allowed_cell_metadata_keys"].split()
    clean = partial(clean_nb, allowed_cell_metadata_keys=keys)
    process_write("cannot clean", clean, path, tmp_path / "clean.ipynb")
    text = (tmp_path / "clean.ipynb").read_text(encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), "run nbdev_clean"


# ---- README


def test_readme_is_the_index_notebook():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == readme_text(), "run python tests/notebooks.py readme"


def code(source, *outputs):
    "A code cell."
    return {"cell_type": "code", "source": source, "outputs": list(outputs)}


def test_readme_text(tmp_path):
    prose = (
        "# Title\n[sae](sae/sae.ipynb) ![f](../reports/f.png) [web](https://x.org) [top](#title)"
    )
    two = {"output_type": "execute_result", "data": {"text/plain": "2"}}
    printed = {"output_type": "stream", "name": "stdout", "text": ["a\n"]}
    notebook = [
        {"cell_type": "markdown", "source": prose},
        code("# | hide\nsecret = 1"),
        code("#| eval: true\n1 + 1", two),
        code("print('a')", printed),
    ]
    path = tmp_path / "index.ipynb"
    path.write_text(json.dumps({"cells": notebook}))
    links = "[sae](nbs/sae/sae.ipynb) ![f](reports/f.png) [web](https://x.org) [top](#title)"
    assert readme_text(path) == (
        f"# Title\n{links}\n\n```python\n1 + 1\n```\n\n```\n2\n```\n\n"
        "```python\nprint('a')\n```\n\n```\na\n```\n"
    )


def test_readme_takes_the_text_alternative_of_a_figure_from_its_file(tmp_path):
    "A file without one, and a file that is not there, keep the words of the notebook."
    words = PngInfo()
    words.add_text("Title", "ATM is lowest.")
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png", pnginfo=words)
    Image.new("RGB", (1, 1)).save(tmp_path / "b.png")
    text = described("![x](a.png) ![y](b.png) ![z](c.png) [l](a.png)", tmp_path)
    assert text == "![ATM is lowest.](a.png) ![y](b.png) ![z](c.png) [l](a.png)"


def test_readme_refuses_pictures(tmp_path):
    picture = {"output_type": "display_data", "data": {"image/png": ""}}
    path = tmp_path / "index.ipynb"
    path.write_text(json.dumps({"cells": [code("plot()", picture)]}))
    with pytest.raises(ValueError, match="index.ipynb, cell 0 draws a picture"):
        readme_text(path)


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    local = [Path(link) for link in links if "://" not in link]
    assert len(links) > 20 and [p for p in local if not (ROOT / p).exists()] == []
