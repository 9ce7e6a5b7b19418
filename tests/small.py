"Small runs on a small planted world, and processes that are killed while they make them."

import os
import signal
import time
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import torch

from atm_sae.data.planted import WorldConfig
from atm_sae.methods import ARCHITECTURES
from atm_sae.sae.architectures import ARCHITECTURE_CLASSES, BatchTopK
from atm_sae.sae.sae import SAE
from atm_sae.train import runs
from atm_sae.train.runs import RunSpec, get_run, recipe, train_many

WORLD = WorldConfig(
    d_in=8, n_parents=2, children_per_parent=2, n_free=6, parent_rate=0.3, free_rate=0.2
)


def documents(n: int, length: int = 400) -> list[str]:
    "Pieces of Python's help topics, which are read faster than all docstrings."
    pieces = (t[i : i + length] for t in topics.values() for i in range(0, len(t), length))
    return [piece for piece in pieces if piece.strip()][:n]


def sized(architecture: str, k: int) -> dict[str, int]:
    "The setting `k` of an architecture that has one."
    return {"k": k} if ARCHITECTURES[architecture].sized_by == "k" else {}


# whose inference threshold follows the training batches
FOLLOWING = [name for name, kind in ARCHITECTURE_CLASSES.items() if issubclass(kind, BatchTopK)]


def small(method: str, steps: int = 40, seed: int = 0, **more) -> RunSpec:
    "A run of some milliseconds."
    snapshots = tuple(step for step in (10, 30) if step <= steps)
    usual = dict(batch_size=32, log_every=5, checkpoint_every=20, snapshot_steps=snapshots)
    more = usual | more
    return recipe(method, WORLD, d_in=8, d_sae=16, l0=3, steps=steps, seed=seed, **more)


def weights(sae: SAE) -> dict[str, bytes]:
    "The bytes of each weight."
    return {n: t.numpy().tobytes() for n, t in sae.state_dict().items()}


def make(specs: list[RunSpec]) -> None:
    "Make runs, or load them."
    for spec in specs:
        get_run(spec)


def make_and_die(specs: RunSpec | list[RunSpec], last: int) -> None:
    """Make a run, or several on one pass, and kill this process after a step of the last one.

    To be called in a process of its own."""
    specs = specs if isinstance(specs, list) else [specs]
    seen = []

    def watch(step, sae, history):
        seen.append(step)
        if seen.count(last) == len(specs):
            os.kill(os.getpid(), signal.SIGKILL)

    runs.train_together = partial(runs.train_together, watch=watch)
    train_many(specs)


def make_when(spec: RunSpec, go: Path) -> None:
    """Make a run that waits after its first step for the file `go`, at most a minute, and then long
    enough for the process that wrote the file to ask for the run.

    To be called in a process of its own."""

    def watch(step, *_):
        for _ in range(6000 if step == 1 else 0):
            if go.exists():
                time.sleep(0.2)
                break
            time.sleep(0.01)

    runs.train_together = partial(runs.train_together, watch=watch)
    get_run(spec)


def steps_taken(spec: RunSpec) -> int:
    "Make a run; the number of steps that this process took. To be called in one of its own."
    taken = []
    runs.train_together = partial(runs.train_together, watch=lambda step, *_: taken.append(step))
    get_run(spec)
    return len(taken)


def steps_beside(spec: RunSpec, go: Path) -> int:
    "`steps_taken` in a rank; rank 0 writes the file `go` first."
    if os.environ["RANK"] == "0":
        go.touch()
    return steps_taken(spec)


def asked_devices(monkeypatch, *modules) -> list[str]:
    "The devices that these modules ask `pick_device` for from now on; each of them is the CPU."
    asked: list[str] = []

    def pick(name="auto"):
        asked.append(str(name))
        return torch.device("cpu")

    for module in modules:
        monkeypatch.setattr(module, "pick_device", pick)
    return asked
