"Processes that start with PyTorch and the rest imported: forks of one server in each test worker."

import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any


@cache
def fork_server() -> ForkServerContext:
    "Starts processes that have imported what `preload` imports. The server starts with the first."
    context = get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    return context


@dataclass(frozen=True)
class Ended:
    "How a process ended."

    status: int  # exit status; of a process that was killed the negative number of the signal
    value: Any  # what its function returned; None if it did not
    said: str  # what it printed, on both streams; with the traceback of its error


class Fork:
    "A function that runs in a forked process, with the environment of the caller."

    def __init__(self, function: Callable, *args: Any, **environment: Any) -> None:
        changes = {name: str(value) for name, value in environment.items()}
        self.output = tempfile.NamedTemporaryFile()
        self.receiver, sender = fork_server().Pipe(duplex=False)
        job = (function, args, os.environ | changes, self.output.name, sender)
        self.process = fork_server().Process(target=_run, args=job, daemon=False)
        self.process.start()
        sender.close()

    def kill(self) -> None:
        "End the process at once."
        self.process.kill()

    def ended(self, seconds: float = 600) -> Ended:
        """Wait until the process ends; TimeoutError, and the process is killed, if it does not.

        ChildProcessError if it ends as a success before its function does."""
        value, returned = None, False
        if self.receiver.poll(seconds):
            try:
                value, returned = self.receiver.recv(), True
            except EOFError:
                pass  # it ended without a value
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"not ended after {seconds} s: {self.said()}")
        if self.process.exitcode == 0 and not returned:
            raise ChildProcessError(f"status 0, but the function did not return: {self.said()}")
        return Ended(self.process.exitcode, value, self.said())

    def said(self) -> str:
        "What the process has printed until now."
        with open(self.output.name, encoding="utf-8", errors="replace") as file:
            return file.read()


def forked(function: Callable, *args: Any, **environment: Any) -> Ended:
    "Run `function(*args)` in a forked process; keywords are environment variables."
    return Fork(function, *args, **environment).ended()


def _run(
    function: Callable, args: tuple, environment: dict, output: str, sender: Connection
) -> None:
    "What a forked process does."
    place = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(place, 1)
    os.dup2(place, 2)
    os.environ.clear()
    os.environ.update(environment)
    importlib.import_module("preload")  # there already, or its error is told here
    value = function(*args)
    sys.stdout.flush()
    sender.send(value)


# ---- several that share each batch


def forked_ranks(function: Callable, *args: Any, size: int = 2, **environment: Any) -> list[Ended]:
    """Run `function(*args)` in several processes that are joined by gloo, as torchrun would.

    When one fails, the others have some seconds to find that out; then they are killed."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = dict(WORLD_SIZE=size, CUDA_VISIBLE_DEVICES="") | environment
        forks = [
            Fork(_as_rank, function, args, f"{folder}/store", RANK=i, LOCAL_RANK=i, **ranks)
            for i in range(size)
        ]
        waiting = list(forks)
        while waiting:
            broken = any(fork.process.exitcode for fork in forks)
            ready = wait([fork.process.sentinel for fork in waiting], 10 if broken else 300)
            for fork in waiting if not ready else ():
                fork.kill()
            waiting = [fork for fork in waiting if fork.process.exitcode is None]
        return [fork.ended() for fork in forks]


def _as_rank(function: Callable, args: tuple, store: str) -> Any:
    "Join the other ranks, which find each other through the file `store`, and run the function."
    from torch import distributed

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = f"file://{store}"
    distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=size)
    value = function(*args)
    distributed.barrier()  # none leaves while another still talks to it
    return value
