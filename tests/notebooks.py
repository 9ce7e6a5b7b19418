"""The notebooks as source: `python tests/notebooks.py` followed by

export           write the modules in atm_sae/, formatted
check            say which modules are not what the notebooks export
execute PATH...  run notebooks from top to bottom in a kernel and save their outputs
readme           write README.md from nbs/index.ipynb
"""

import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


# ---- export


def modules(package: Path) -> dict[str, Path]:
    "{path in the package: file} of all modules."
    return {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}


def export(root: Path = ROOT) -> None:
    "Write the modules of `root` from its notebooks; a module without a notebook goes."
    for name, path in modules(root / "atm_sae").items():
        if not name.endswith("__init__.py"):
            path.unlink()
    environment = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    code = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    run = partial(subprocess.run, cwd=root, env=environment, check=True)
    run([sys.executable, "-c", code])
    run([sys.executable, "-m", "ruff", "format", "--quiet", "atm_sae"])


def differences(made: Path, found: Path) -> list[str]:
    "What is stale, missing or superfluous in the package `found`, as lines of text."
    new, old = modules(made), modules(found)
    lines = [f"missing: {name}" for name in new.keys() - old.keys()]
    lines += [f"no notebook makes: {name}" for name in old.keys() - new.keys()]
    for name in new.keys() & old.keys():
        if new[name].read_bytes() != old[name].read_bytes():
            lines.append(f"stale: {name}")
    return sorted(lines)


def check() -> None:
    "Export a copy; exits with what is not the same in atm_sae/."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "atm-sae"
        ignore = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__")
        for name in ("nbs", "atm_sae"):
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        for name in ("settings.ini", "pyproject.toml"):
            shutil.copy(ROOT / name, copy)
        export(copy)
        found = differences(copy / "atm_sae", ROOT / "atm_sae")
    if found:
        sys.exit("run make export: " + "; ".join(found))


# ---- execute


def execute(path: Path) -> None:
    "Run the notebook at `path` in a kernel and save it with its outputs, without its own traces."
    import nbformat
    from atm_sae.report.runner import kernel_manager, socket_folder
    from nbclient import NotebookClient
    from nbdev.clean import clean_nb, process_write

    notebook = nbformat.read(path, as_version=4)
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
    place = {"metadata": {"path": str(path.parent)}}
    with socket_folder() as sockets:
        manager = kernel_manager(sockets)
        client = NotebookClient(
            notebook, timeout=900, kernel_manager_class=manager, resources=place
        )
        client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.strip() and not cell.execution_count:
            sys.exit(f"{path}: not run: {cell.source}")
        cell["metadata"] = {k: v for k, v in cell["metadata"].items() if k == "tags"}
        if cell.cell_type == "code":
            cell["outputs"] = [o for o in cell.outputs if o.get("name") != "stderr"]
    notebook.metadata = {k: v for k, v in notebook.metadata.items() if k == "kernelspec"}
    nbformat.write(notebook, path)
    clean = partial(clean_nb, allowed_cell_metadata_keys=["tags"])
    process_write("cannot clean", clean, str(path), str(path))


# ---- run in a forked process, see forks.py


def one_process() -> None:
    "Grids of runs and their scores are made in this process; a pool would import PyTorch again."
    from atm_sae.report import tables
    from atm_sae.train import runs

    runs.run_grid = partial(runs.run_grid, workers=1)
    tables.score_runs = partial(tables.score_runs, workers=1)


def run_notebook(path: str) -> int:
    "Run a library notebook as nbdev_test does; exits with its traceback. Returns the cells run."
    from nbdev import test

    ran = []

    class Counting(test.CaptureShell):
        def cell(self, cell: Any, **more: Any) -> None:
            ran.append(cell)
            super().cell(cell, **more)

    test.CaptureShell = partial(Counting, mpl_format="png")
    os.chdir(ROOT)
    good, _ = test.test_nb(Path(path), skip_flags=test.get_config().tst_flags.split())
    if not good:
        sys.exit(1)
    return len(ran)


def run_cells(path: str, folder: str) -> None:
    "Run the notebook at `path` in `folder` and save it with its outputs; exits with its traceback."
    from execnb.shell import CaptureShell

    one_process()
    os.chdir(folder)
    shell = CaptureShell(mpl_format="png")
    try:
        shell.execute(path, path, exc_stop=True)
    except Exception:
        sys.exit(shell.prettytb(path))


def execute_forked(path: Path, parameters: dict, target: Path, label: str) -> Any:
    "Runs an experiment's notebook in a forked process, as papermill would in a kernel."
    import nbformat
    from atm_sae.report.runner import RunError
    from forks import forked
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    notebook = parameterize_notebook(load_notebook_node(str(path)), parameters)
    nbformat.write(notebook, target)
    ended = forked(run_cells, str(target), str(path.parent))
    if ended.status:
        raise RunError(ended.said)
    return nbformat.read(target, as_version=4)


# ---- the command


def main(command: str = "", *paths: str) -> None:
    "One of the commands above."
    if command == "export":
        export()
    elif command == "check":
        check()
    elif command == "readme":
        from readme import write_readme

        write_readme()
    elif command == "execute" and paths:
        sys.path.insert(0, str(ROOT))  # the kernel imports atm_sae from where this process does
        for path in paths:
            execute(Path(path).resolve())
            print(path)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(*sys.argv[1:])
