"""The runner: what it refuses, what it runs again, what it leaves behind. Most tests replace the
kernel by a fast stand-in."""

import base64
import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import nbformat
import numpy as np
import pytest
from PIL import Image
from nbclient.exceptions import DeadKernelError
from atm_sae.report import manifest as M, runner as R
from atm_sae.artefacts import file_sha256, read_json
from atm_sae.closure import Closure
from atm_sae.report.manifest import ManifestError, load_manifest, published_verdicts
from atm_sae.report.runner import tidy_notebook
from toy import COUNT, DOUBLE, notebook, stand_in

PAGES = {"index.md", "index.html"}
FRESH, DONE = {"count": "ok", "double": "ok"}, {"count": "up to date", "double": "up to date"}


# ---- what runs, and what runs again


def test_order_follows_after_and_a_second_run_does_nothing(toy):
    states, lines = toy.run()
    assert (
        list(states.items()) == list(FRESH.items())
        and "[1/2] count: running 10_count.ipynb (never run)" in lines
    )
    before = toy.hashes()
    assert toy.run()[0] == DONE and toy.hashes() == before
    assert set(before) == {
        "index.md",
        "index.html",
        "tables/count-summary.csv",
        "tables/double.md",
        "notebooks/count.ipynb",
        "notebooks/double.ipynb",
        "provenance/count.json",
        "provenance/double.json",
    }


def test_changed_parameter(toy):
    toy.run()
    toy.replace("steps: 3", "steps: 4")
    states, lines = toy.run()
    assert (
        states == FRESH
        and "count: running 10_count.ipynb (changed: parameters (steps))" in lines
        and "double: running 20_double.ipynb (changed: inputs (tables/count-summary.csv))" in lines
    )


def test_changed_code_but_not_prose(toy):
    toy.run()
    path = toy.path.parent / "20_double.ipynb"
    text = path.read_text()
    path.write_text(text.replace("# Toy", "# Another toy"))
    assert toy.run()[0] == DONE
    path.write_text(text.replace("characters", "letters"))
    assert (
        toy.run()[0] == {"count": "up to date", "double": "ok"} and toy.run(force=True)[0] == FRESH
    )


def test_changed_published_value_matters_to_notebooks_that_read_it(toy):
    notebook(
        toy.path.parent / "20_double.ipynb",
        DOUBLE,
        "from atm_sae.report.manifest import load_manifest",
    )
    toy.run()
    toy.replace("value: 6", "value: 7")
    assert (
        toy.run()[0] == {"count": "up to date", "double": "ok"}
        and "differs" in (toy.out / "index.md").read_text()
    )


def test_changed_library(toy, monkeypatch):
    toy.run()
    other = Closure({"stats.summarise": "other"}, ("numpy",))
    monkeypatch.setattr(M, "notebook_closure", lambda code: other)
    lines = toy.run(dry_run=True)[1]
    assert "count: would run (changed: library (stats.summarise), packages (numpy)" in lines


@pytest.mark.parametrize("harm", [lambda p: p.unlink(), lambda p: p.write_text("changed")])
@pytest.mark.parametrize(
    "name", ["tables/double.md", "notebooks/double.ipynb", "provenance/double.json"]
)
def test_harmed_output(toy, harm, name):
    toy.run()
    good = toy.hashes("provenance")
    harm(toy.out / name)
    assert (
        toy.run()[0] == {"count": "up to date", "double": "ok"}
        and toy.hashes("provenance").keys() == good.keys()
    )
    assert {k: v for k, v in toy.hashes("provenance").items() if k not in PAGES} == {
        k: v for k, v in good.items() if k not in PAGES
    }


def test_only(toy):
    states, lines = toy.run(only=["double"])
    assert states == {"double": "skipped"} and "it needs count, which was not run" in lines
    assert toy.run(only=["10_count"])[0] == {"count": "ok"} and toy.run(only=["double"])[0] == {
        "double": "ok"
    }
    with pytest.raises(
        ManifestError, match="no object 'triple' in the manifest; it has double, count"
    ):
        toy.run(only=["triple"])


def test_tables_of_other_code_may_be_read_and_are_named(toy):
    toy.run()
    path = toy.path.parent / "10_count.ipynb"
    path.write_text(path.read_text().replace("5.5,6.5", "5.4,6.5"))
    states, lines = toy.run(only=["double"], force=True)
    assert states == {"double": "ok"}
    assert (
        "double: running 20_double.ipynb (forced; reads tables that other code made: count)"
        in lines
    )
    record = M.read_record(toy.out, "double")
    assert record["tables_of_other_code"] == {"count": "changed: notebook"}
    page = (toy.out / "index.md").read_text()
    assert "Made from tables of other code:" in page and "1 made from tables of other code" in page
    assert toy.run()[0] == FRESH
    assert M.read_record(toy.out, "double")["tables_of_other_code"] == {}
    assert "tables of other code" not in (toy.out / "index.md").read_text()


@pytest.mark.parametrize("change", ["parameters", "published values", "damage"])
def test_tables_of_other_parameters_or_inputs_are_not_read(toy, change):
    toy.run()
    if change == "parameters":
        toy.replace("steps: 3", "steps: 4")
    elif change == "published values":
        code = "from atm_sae.report.manifest import load_manifest"
        notebook(toy.path.parent / "10_count.ipynb", COUNT, code)
        toy.run()
        toy.replace("value: 6", "value: 7")
    else:
        (toy.out / "tables/count-summary.csv").write_text("changed")
    states, lines = toy.run(only=["double"], force=True)
    assert states == {"double": "skipped"}
    assert (
        "it needs count, which was not run with these parameters and inputs: run that too" in lines
    )


def test_dry_run_touches_nothing(toy):
    states, lines = toy.run(dry_run=True, profile="default")
    assert (
        states == {"count": "would run", "double": "would run"}
        and not toy.out.exists()
        and "needs: patience" in lines
    )
    toy.run(only=["count"])
    (toy.out / "tables/count-summary.csv").unlink()
    toy.run(only=["count"])
    assert "count: up to date" in toy.run(dry_run=True)[1]


def test_objects_of_other_profiles(toy):
    toy.replace(
        "{common: *all, default: {rate: 1}}", "{default: {rate: 1}}\n    profiles: [default]"
    )
    notebook(
        toy.path.parent / "20_double.ipynb",
        "from pathlib import Path",
        'Path(out, "tables/double.md").write_text("x");',
    )
    assert toy.run()[0] == {"double": "ok"} and "Counting" not in (toy.out / "index.md").read_text()
    with pytest.raises(ManifestError, match="count: not part of profile 'smoke'"):
        toy.run(only=["count"])


def test_outputs_no_longer_declared_are_removed(toy):
    toy.run()
    toy.replace("tables/double.md", "tables/twice.md")
    notebook(toy.path.parent / "20_double.ipynb", DOUBLE.replace("double", "twice"))
    toy.run()
    assert (toy.out / "tables/twice.md").is_file() and not (toy.out / "tables/double.md").exists()


def test_reports_that_came_with_a_clone_are_made_again(toy, monkeypatch, tmp_path):
    assert toy.run()[0] == FRESH and toy.run()[0] == DONE
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "another"))
    manifest = load_manifest(toy.path)
    states = M.object_states(manifest, "smoke", toy.out)
    assert {s.reason for s in states.values()} == {M.MADE_ELSEWHERE}
    assert toy.run()[0] == FRESH


# ---- what goes wrong while running


def test_failure_keeps_old_outputs_and_skips_what_follows(toy):
    toy.run()
    old = toy.hashes()
    notebook(toy.path.parent / "10_count.ipynb", COUNT, 'raise KeyError("deliberate")')
    states, lines = toy.run()
    assert (
        states == {"count": "FAILED", "double": "skipped"}
        and "deliberate" in lines
        and "it needs count, which failed" in lines
    )
    kept = toy.folder / "cache" / "reproduce"
    assert [p.name for p in kept.rglob("*.ipynb")] == ["count.ipynb"] and str(
        next(kept.rglob("*.ipynb"))
    ) in lines
    new = toy.hashes()
    assert {k: v for k, v in new.items() if k not in PAGES} == {
        k: v for k, v in old.items() if k not in PAGES
    }
    assert "not made again since (changed: notebook" in (toy.out / "index.md").read_text()
    assert toy.cli()[0] == 1


@pytest.mark.parametrize(
    "code, message",
    [
        ("None", "did not write tables/double.md"),
        ('open(out + "/tables/double.md", "w")', "empty tables/double.md"),
        (
            DOUBLE + '\nPath(out, "tables/more.csv").write_text("x")',
            "wrote tables/more.csv, which the manifest does not declare",
        ),
        (
            DOUBLE + '\nPath(out, "tables/count-summary.csv").write_text("x")',
            "changed tables/count-summary.csv, which another object made",
        ),
    ],
)
def test_outputs_must_be_as_declared(toy, code, message):
    notebook(toy.path.parent / "20_double.ipynb", code)
    states, lines = toy.run()
    assert (
        states == {"count": "ok", "double": "FAILED"}
        and message in lines
        and not (toy.out / "tables/double.md").exists()
    )


def test_out_folder_that_cannot_be_written(toy):
    toy.out.write_text("a file")
    code, _, err = toy.cli()
    assert code == 2 and "cannot write" in err and "What to do" in err
    toy.out.unlink()
    toy.out.mkdir(mode=0o500)
    if os.geteuid():
        assert toy.cli()[0] == 2


def test_full_disk_while_publishing(toy, monkeypatch):
    toy.run()
    old = toy.hashes()
    toy.replace("steps: 3", "steps: 4")
    copy = R.shutil.copyfile

    def full(source, target):
        if "notebooks" in str(target):
            raise OSError(28, "No space left on device")
        return copy(source, target)

    monkeypatch.setattr(R.shutil, "copyfile", full)
    states, lines = toy.run()
    assert states["count"] == "FAILED" and "disk is full" in lines
    assert {k: v for k, v in toy.hashes().items() if k not in PAGES} == {
        k: v for k, v in old.items() if k not in PAGES
    }


def test_killed_while_publishing_counts_as_stale(toy, monkeypatch):
    toy.run()
    toy.replace("steps: 3", "steps: 4")
    monkeypatch.setattr(R, "write_json", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    assert toy.cli()[0] == 130
    monkeypatch.undo()
    monkeypatch.setattr(R, "execute_notebook", stand_in)
    monkeypatch.setenv("ATM_SAE_CACHE", str(toy.folder / "cache"))
    toy.replace("steps: 4", "steps: 3")
    states, lines = toy.run()
    assert states["count"] == "ok" and "not as it was written: " in lines


def test_states_are_computed_once(toy, monkeypatch):
    "At the start, and after an object ran: its own, and that of each object that reads it."
    asked = []
    compute = M.fingerprint

    def count(manifest, experiment, *rest):
        asked.append(experiment.name)
        return compute(manifest, experiment, *rest)

    monkeypatch.setattr(M, "fingerprint", count)
    toy.run()
    asked.clear()
    assert toy.run(dry_run=True)[0] == DONE and asked == ["double", "count"]
    toy.replace("steps: 3", "steps: 4")
    asked.clear()
    toy.run()
    assert asked == ["double", "count", "double", "count", "double"]


def test_opened_artefacts_are_recorded(toy):
    line = dict(kind="runs", key="k", content="x", code="old", inputs={}, sources={})
    line |= dict(makers=["stats.summarise"], choose={}, cut=[], spec_types=[], packages={})
    log = f"import os; open(os.environ['ATM_SAE_OPENED'], 'a').write({json.dumps(line)!r})"
    notebook(toy.path.parent / "10_count.ipynb", log, COUNT)
    toy.run()
    (group,) = read_json(toy.out / "provenance/count.json")["opened"]
    assert (group["kind"], group["number"]) == ("runs", 1) and "ATM_SAE_OPENED" not in os.environ
    assert "count: would run (changed: runs (code, packages))" in toy.run(dry_run=True)[1]


def test_two_runs_into_one_folder(toy):
    with R.reports_lock(toy.out, "smoke"):
        code, _, err = toy.cli()
    assert code == 2 and "another run is writing" in err


def test_tidy_notebook(tmp_path):
    out = nbformat.v4.new_output
    cell = nbformat.v4.new_code_cell(
        f"out = {str(tmp_path)!r}\nsteps = 3",
        metadata={"tags": ["injected-parameters"], "papermill": {"duration": 1}},
        outputs=[
            out("stream", name="stderr", text="100%"),
            out("display_data", data={"application/vnd.jupyter.widget-view+json": {}}),
            out(
                "stream",
                name="stdout",
                text=f"{tmp_path}/tables, {sys.prefix}/lib, <A at 0x7f0123456789>",
            ),
        ],
    )
    last = nbformat.v4.new_code_cell(
        "",
        metadata={"tags": ["epilogue"]},
        outputs=[out("stream", name="stdout", text='{"memory_mib": 7}')],
    )
    nb, peak = tidy_notebook(
        nbformat.v4.new_notebook(cells=[cell, last], metadata={"papermill": {}}), tmp_path
    )
    assert peak == {"memory_mib": 7} and len(nb.cells) == 1 and nb.metadata == {}
    assert nb.cells[0].source == 'out = ""\nsteps = 3' and nb.cells[0].metadata == {
        "tags": ["injected-parameters"]
    }
    assert [o.get("text") for o in nb.cells[0].outputs] == ["/tables, python/lib, <A>"]


def test_pictures_of_an_executed_notebook_have_few_colours(tmp_path):
    picture = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(picture, "png")
    data = {"image/png": base64.b64encode(picture.getvalue()).decode()}
    cell = nbformat.v4.new_code_cell("", outputs=[nbformat.v4.new_output("display_data", data)])
    nb, _ = tidy_notebook(nbformat.v4.new_notebook(cells=[cell]), tmp_path)
    small = base64.b64decode(nb.cells[0].outputs[0]["data"]["image/png"])
    assert Image.open(io.BytesIO(small)).mode == "P" and len(small) < len(picture.getvalue()) / 2


def test_outputs_of_an_executed_notebook_are_json(tmp_path):
    "NaN and infinity, which Jupyter does not open, become null."
    data = {"application/json": {"a": [math.nan, 1.5]}, "text/plain": "nan"}
    output = nbformat.v4.new_output("display_data", data=data, metadata={"b": math.inf})
    cell = nbformat.v4.new_code_cell("", outputs=[output])
    nb, _ = tidy_notebook(nbformat.v4.new_notebook(cells=[cell]), tmp_path)
    nbformat.write(nb, tmp_path / "n.ipynb")
    text = (tmp_path / "n.ipynb").read_text()
    (output,) = json.loads(text, parse_constant=pytest.fail)["cells"][0]["outputs"]
    assert output["data"] == {"application/json": {"a": [None, 1.5]}, "text/plain": ["nan"]}
    assert output["metadata"] == {"b": None}


# ---- with real kernels


@pytest.fixture
def other_kernel(tmp_path, monkeypatch):
    "The user has another kernel called python3, and a plotting back end with windows."
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = ["/nowhere/python", "-f", "{connection_file}"]
    kernel = dict(argv=argv, display_name="other", language="python")
    (spec / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("MPLBACKEND", "TkAgg")


def test_real_kernel_is_this_python(real, other_kernel, monkeypatch):
    monkeypatch.setenv("HERE", f"{sys.executable} {real.path.parent}")
    notebook(
        real.path.parent / "10_count.ipynb",
        COUNT,
        """
        import os, sys
        assert f"{sys.executable} {Path.cwd()}" == os.environ["HERE"]
        assert os.environ["MPLBACKEND"] != "TkAgg"
        print(out, profile, steps, "warning", sys.path[0]); print("noise", file=sys.stderr)""",
    )
    states, lines = real.run(only=["count"])
    assert states == {"count": "ok"}, lines
    nb = nbformat.read(real.out / "notebooks/count.ipynb", 4)
    text = (real.out / "notebooks/count.ipynb").read_text()
    assert (
        str(real.folder) not in text
        and " smoke 3 " in text
        and "noise\\n" not in text
        and "papermill" not in nb.metadata
    )
    injected = next(c for c in nb.cells if "injected-parameters" in c.metadata.get("tags", []))
    assert 'out = ""' in injected.source and "steps = 3" in injected.source
    record = read_json(real.out / "provenance/count.json")
    assert (
        record["peak"]["memory_mib"] > 10
        and record["seconds"] > 0
        and record["parameters"] == {"steps": 3, "rate": 0.5}
        and record["command"].endswith("--only count")
    )
    assert str(real.folder) not in json.dumps(record) and record["outputs"][
        "tables/count-summary.csv"
    ] == file_sha256(real.out / "tables/count-summary.csv")
    assert (
        published_verdicts(load_manifest(real.path).pick("count"), "smoke", real.out).verdict[0]
        == "reproduced"
    )


def test_real_failure_names_cell_and_error(real):
    notebook(real.path.parent / "10_count.ipynb", COUNT, "steps/0")
    code, out, _ = real.cli("--only", "count")
    assert (
        code == 1
        and "ZeroDivisionError: division by zero\n    line 1: steps/0" in out
        and "failed/count.ipynb" in out
        and not (real.out / "tables").exists()
    )


def test_a_notebook_that_exits_has_failed(real):
    "papermill takes status 0 for a success."
    notebook(real.path.parent / "10_count.ipynb", COUNT, "import sys\nsys.exit(0)", "1 / 0")
    states, lines = real.run()
    assert states == {"count": "FAILED", "double": "skipped"}
    assert "cell 4 ended the notebook with SystemExit, and the cells after it did not run" in lines
    assert "failed/count.ipynb" in lines and not (real.out / "tables").exists()


def test_every_code_cell_must_have_run(tmp_path, monkeypatch):
    "The parts of the check that need no kernel."
    cell = partial(nbformat.v4.new_code_cell, metadata={"papermill": {"exception": False}})
    ran, blank = cell("1 + 1", execution_count=1), cell(" ")
    R._check_every_cell_ran(nbformat.v4.new_notebook(cells=[ran, blank]))
    skipped = nbformat.v4.new_notebook(cells=[ran, cell("x = 2\ny = 3"), blank])
    with pytest.raises(R.RunError, match="the cell that begins with 'x = 2' did not run"):
        R._check_every_cell_ran(skipped)

    def die(*args, **more):
        raise DeadKernelError("Kernel died")

    monkeypatch.setattr("papermill.execute_notebook", die)
    notebook(tmp_path / "n.ipynb", "1")
    with pytest.raises(R.RunError, match="the kernel ended before the notebook did: it was killed"):
        R.execute_notebook(tmp_path / "n.ipynb", {}, tmp_path / "out.ipynb", "")


def test_sockets_have_short_paths(tmp_path, monkeypatch):
    "A path of more than 107 bytes is no place for a socket."
    long = tmp_path / ("ж" * 45)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with R.socket_folder() as folder:
        assert folder.parent == Path("/tmp") and folder.is_dir()
    assert not folder.exists()
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/")
    with R.socket_folder() as folder:
        assert folder.parent == Path("/tmp")


DRAW = """
import matplotlib.pyplot as plt
plt.figtext(0, 0, "a letter")
plt.gcf().canvas.draw()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="ports")
def test_a_kernel_needs_no_network_and_writes_to_cache_and_output_alone(real):
    "Not even a loopback interface; nothing is left in the home and temporary folders."
    notebook(real.path.parent / "10_count.ipynb", COUNT, DRAW)
    apart = ["unshare", "-rn"] if permitted("unshare", "-rn", "true") else []
    home, temporary = real.folder / "home", real.folder / "temporary"
    home.mkdir(), temporary.mkdir()
    own = dict(HOME=str(home), TMPDIR=str(temporary))
    others = ("XDG_", "JUPYTER_", "IPYTHONDIR", "MPLCONFIGDIR")
    env = {k: v for k, v in os.environ.items() if not k.startswith(others)} | own
    args = ["--profile", "smoke", "--only", "count", "--manifest", real.path, "--out", real.out]
    command = [*apart, sys.executable, "-m", "atm_sae.cli", "reproduce", *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [*home.rglob("*")] == [*temporary.rglob("*")] == []
    if not apart:
        pytest.skip("unshare -rn is not permitted here, so the kernel had a network")


def permitted(*command):
    "True if a command is there and succeeds."
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


SLOW = """
import os, time
if "GO" not in os.environ:
    Path(out, "pid").write_text(str(os.getpid()))
    time.sleep(300)"""
# A job in the background inherits SIGINT as ignored; a user's terminal does not.
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from atm_sae.cli import main
sys.exit(main())
"""


def status_when_stopped(how, real, out):
    "Exit status of the command that makes the object `count` and is sent a signal meanwhile."
    args = ["--profile", "smoke", "--only", "count", "--manifest", real.path, "--out", out]
    command = [sys.executable, "-c", COMMAND, "reproduce", *map(str, args)]
    pipes = dict(stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    with subprocess.Popen(command, **pipes) as process:
        path = R.scratch_folder(out, "smoke", "count") / "out" / "pid"
        until(lambda: path.is_file() and path.read_text())
        kernel = int(path.read_text())
        process.send_signal(how)
        process.communicate(timeout=150)
    until(lambda: not alive(kernel))
    return process.returncode


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_killed_then_resumed_gives_the_same_bytes(real, monkeypatch):
    """Terminated, interrupted and killed outright, in three runs one after the other (kernels that
    start at once race for ports); then resumed."""
    notebook(real.path.parent / "10_count.ipynb", COUNT, SLOW)
    statuses = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}
    for how, status in statuses.items():
        out = real.folder / how.name
        assert status_when_stopped(how, real, out) == status
        assert not [p for p in out.rglob("*") if p.is_file() and p.name not in PAGES]
    monkeypatch.setenv("GO", "1")
    results = []
    for out in (real.folder / "SIGKILL", real.out):
        real.out = out
        assert real.run(only=["count"])[0] == {"count": "ok"}
        results.append({k: v for k, v in real.hashes("provenance").items() if k not in PAGES})
    assert results[0] == results[1]


def alive(pid):
    "True if the process exists and is not a zombie."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds=150):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


# ---- where runs are trained


def test_notebooks_are_told_where_to_train(toy, monkeypatch):
    said = """
import os
Path(out, "tables/double.md").write_text(str(os.environ.get("ATM_SAE_EXECUTOR")))
"""
    notebook(toy.path.parent / "20_double.ipynb", "from pathlib import Path", said)
    monkeypatch.delenv("ATM_SAE_EXECUTOR", raising=False)
    for before in (None, "dask:before"):
        if before:
            monkeypatch.setenv("ATM_SAE_EXECUTOR", before)
        assert toy.cli("--force", "--executor", "dask:tcp://10.0.0.1:8786")[0] == 0
        assert (
            toy.out / "tables/double.md"
        ).read_text() == "dask:tcp://10.0.0.1:8786" and os.environ.get("ATM_SAE_EXECUTOR") == before
    assert (
        toy.cli("--force")[0] == 0 and (toy.out / "tables/double.md").read_text() == "dask:before"
    )


def test_an_unknown_executor_is_refused_before_anything_is_written(toy):
    with pytest.raises(ValueError, match="unknown executor 'slurm'"):
        toy.run(executor="slurm")
    code, _, err = toy.cli("--executor", "slurm")
    assert code == 2 and "atm-sae: unknown executor 'slurm'" in err and not toy.out.exists()


def test_a_bar_where_somebody_watches(monkeypatch):
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: False))
    assert R._progress("planted") is False
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: True))
    bar = R._progress("planted")
    assert bar["desc"] == "planted" and not bar["leave"]


def test_a_missing_ipykernel_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="ipykernel"):
        R.kernel_manager(tmp_path)
