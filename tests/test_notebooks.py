"Every assertion in every library notebook holds: each is run from top to bottom in a process."

import json
import sys
from pathlib import Path
from statistics import median

import pytest
from forks import forked
from notebooks import execute, run_cells, run_notebook

NBS = Path(__file__).resolve().parent.parent / "nbs"
NOTEBOOKS = sorted(
    path
    for path in NBS.rglob("*.ipynb")
    if ".ipynb_checkpoints" not in path.parts and not (path.parent / ".notest").exists()
)


@pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda path: path.relative_to(NBS).with_suffix("").as_posix()
)
def test_notebook_runs(path, shared_cache):
    ended = forked(run_notebook, str(path), ATM_SAE_CACHE=shared_cache)
    assert ended.status == 0, ended.said[-4000:]
    assert ended.value > 0, "no cell was run"


def saved(path, *sources):
    "A notebook of code cells at `path`."
    cells = [dict(cell_type="code", metadata={}, outputs=[], source=s) for s in sources]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return str(path)


def test_a_failing_cell_is_shown(tmp_path):
    good, bad = "#| eval: false\n1 / 0", "assert 1 + 1 == 3"
    ended = forked(run_notebook, saved(tmp_path / "bad.ipynb", good, "#| slow\n1 / 0", bad))
    assert ended.status == 1
    assert "While Executing Cell #3" in ended.said and "AssertionError" in ended.said
    assert forked(run_notebook, saved(tmp_path / "good.ipynb", good, "1")).value == 1


def test_a_cell_that_ends_the_process_is_no_success(tmp_path):
    path = saved(tmp_path / "ends.ipynb", "import os\nos._exit(0)", "1 / 0")
    for run in (run_notebook, run_cells):
        with pytest.raises(ChildProcessError, match="status 0, but the function did not return"):
            forked(run, path, *[str(tmp_path)] * (run is run_cells))
    path = saved(tmp_path / "exits.ipynb", "import sys\nsys.exit(0)", "1 / 0")
    assert forked(run_notebook, path).status == 1


def test_a_notebook_is_executed_without_a_network(tmp_path):
    "Its kernel is this Python, and its sockets are files."
    source = (
        "import sys\n"
        "from ipykernel.connect import get_connection_info\n"
        "print(get_connection_info(unpack=True)['transport'], sys.executable)"
    )
    path = Path(saved(tmp_path / "n.ipynb", source))
    execute(path)
    (cell,) = json.loads(path.read_text())["cells"]
    assert "".join(cell["outputs"][0]["text"]).split() == ["ipc", sys.executable]


# ---- the tutorial

CHAPTERS = sorted((NBS / "tutorial").glob("[0-9]_*.ipynb"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_is_short_and_saved_with_its_pictures(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    lengths = [len(cell["source"]) for cell in codes]
    assert len(cells) <= 40 and max(lengths) <= 30 and median(lengths) <= 6
    assert not any("export" in "".join(cell["source"]) for cell in codes)
    drawn = [any("image/png" in o.get("data", {}) for o in c.get("outputs", [])) for c in cells]
    assert any(drawn[:10]), "no picture in the first ten cells"
    assert not any(o["output_type"] == "error" for cell in codes for o in cell["outputs"])
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert text.startswith("# ") and "**It takes**" in text and "<details>" in text


def test_each_chapter_ends_with_a_link_to_the_next():
    assert [path.name[0] for path in CHAPTERS] == list("12345")[: len(CHAPTERS)]
    for path, following in zip(CHAPTERS, CHAPTERS[1:]):
        last = json.loads(path.read_text(encoding="utf-8"))["cells"][-1]["source"]
        assert f"]({following.name})" in last[-1]
