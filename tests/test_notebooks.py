"Every assertion in every notebook holds: each is run from top to bottom, in a process of its own."

import os, subprocess, sys
from pathlib import Path
import pytest

NBS = Path(__file__).resolve().parent.parent / "nbs"
NOTEBOOKS = sorted(
    p
    for p in NBS.rglob("*.ipynb")
    if ".ipynb_checkpoints" not in p.parts and not (p.parent / ".notest").exists()
)


@pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda p: p.relative_to(NBS).with_suffix("").as_posix()
)
def test_notebook_runs(path):
    command = [
        sys.executable,
        "-c",
        "import sys; from nbdev.test import nbdev_test; nbdev_test(path=sys.argv[1], n_workers=0)",
        str(path),
    ]
    done = subprocess.run(
        command,
        cwd=NBS.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:] or done.stdout[-4000:]
    assert "Success." in done.stdout, done.stdout  # nothing eligible would pass silently
