"""The libraries that the benchmarks compare with, each in its own environment, with the PyTorch of
this one."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import torch

from atm_sae.core import cache_dir

ROOT = Path(__file__).resolve().parent.parent
RIVALS = {"sae-lens": "sae-lens==6.54.12", "dictionary-learning": "dictionary-learning==0.1.0"}
MODULES = {  # what training_worker.py imports
    "sae-lens": ("sae_lens.saes.topk_sae", "sae_lens.training.sae_trainer"),
    "dictionary-learning": (
        "dictionary_learning.trainers.top_k",
        "dictionary_learning.trainers.jumprelu",
    ),
}
READY = "ready"  # the file in an environment that says what was installed and checked

# Imports the modules named on the command line; prints the first cause of a failure.
IMPORT = """
import importlib, sys
try:
    for name in sys.argv[1:]:
        importlib.import_module(name)
except Exception as error:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    sys.exit(f"{type(error).__name__}: {error}")
"""


def run_python(python, *arguments):
    "Run an interpreter; its exit code and its two streams."
    return subprocess.run(
        [str(python), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def import_error(python, *modules):
    "Why an interpreter cannot import modules; None if it can."
    done = run_python(python, "-c", IMPORT, *modules)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def installed_version(python, package):
    "The version of a package in an interpreter's environment; '' without one."
    code = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    return run_python(python, "-c", code, package).stdout.strip()


def variable(library):
    "The environment variable that names the Python of a library."
    return f"ATM_SAE_{library.upper().replace('-', '_')}"


def advice(library):
    return f"set {variable(library)} to a Python in which it imports"


def pip(python, library, *arguments):
    "Run pip; SystemExit names the library and says what pip said."
    done = run_python(python, "-m", "pip", *arguments)
    if done.returncode:
        raise SystemExit(
            f"pip could not install {RIVALS[library]}; it said:\n{done.stderr[-2000:]}\n"
            f"Mend that, or {advice(library)}."
        )


def install(python, library, torch_version):
    "Install a library beside a given PyTorch."
    # in one call: a later one could replace PyTorch, or what was built for it
    pip(python, library, "install", "-q", f"torch=={torch_version}", RIVALS[library])
    # torchvision is built for one build of PyTorch, and transformers imports it wherever it is
    # installed. No benchmark needs it, so one that does not fit is removed.
    if installed_version(python, "torchvision") and import_error(python, "torchvision"):
        pip(python, library, "uninstall", "-q", "-y", "torchvision")


def check(python, library, torch_version=None):
    "SystemExit if an environment lacks the library, or has another PyTorch than it should."
    reason = import_error(python, *MODULES[library])
    if reason:
        raise SystemExit(
            f"{library} does not import in {python}: {reason}. Mend that environment, or "
            f"{advice(library)}."
        )
    found = installed_version(python, "torch").split("+")[0]
    if torch_version and found != torch_version:
        raise SystemExit(
            f"{RIVALS[library]} came with torch {found} instead of {torch_version}: choose a "
            f"version of {library} that runs with torch {torch_version}, or {advice(library)}."
        )


def make_environment(folder, library, torch_version):
    "Make the environment of a library, and check it; one that fails is removed."
    python = folder / "bin" / "python"
    try:
        venv.create(folder, clear=True, with_pip=True)
        install(python, library, torch_version)
        check(python, library, torch_version)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def environment(library):
    "The interpreter of a library's own environment, which imports; made first if need be."
    if library == "atm-sae":
        return sys.executable
    named = os.environ.get(variable(library))
    if named:
        check(named, library)
        return named
    torch_version = torch.__version__.split("+")[0]
    folder = cache_dir() / "peers" / library
    wanted = f"{RIVALS[library]}, torch {torch_version}\n"
    ready = folder / READY
    python = folder / "bin" / "python"
    made = ready.exists() and ready.read_text() == wanted
    if not made or import_error(python, *MODULES[library]):
        make_environment(folder, library, torch_version)
        ready.write_text(wanted)
    return str(python)
