"""What the benchmarks share: the command line, the data of the training steps, the versions they
name, and the tables in README.md."""

import argparse
import datetime
import statistics
from pathlib import Path

import torch

from atm_sae.artefacts import atomic_write, provenance
from atm_sae.core import generator

README = Path(__file__).parent / "README.md"


def parser(description, repeat, threads):
    "The arguments that all benchmarks take, with their defaults."
    found = argparse.ArgumentParser(description=description)
    add = found.add_argument
    add("--quick", action="store_true", help="tiny sizes: does it run? Numbers mean nothing")
    add("--threads", type=int, default=threads, help=f"threads of PyTorch (default {threads})")
    add("--repeat", type=int, default=repeat, help=f"rounds (default {repeat})")
    add("--write", action="store_true", help="replace the tables in README.md")
    return found


def parsed(command_line):
    "The arguments. Numbers of --quick, or of a single round, do not go into README.md."
    args = command_line.parse_args()
    if args.repeat < 1:
        command_line.error("--repeat must be at least 1")
    if args.write and args.quick:
        command_line.error(
            "the numbers of --quick mean nothing: run without it to write them into README.md"
        )
    if args.write and args.repeat < 2:
        command_line.error("one round shows no spread: --write needs --repeat 2 or more")
    return args


def threads_used(n):
    return f"{n} thread{'s' * (n > 1)}"


def spread(values, digits=3):
    "Median [least, most]."
    numbers = statistics.median(values), min(values), max(values)
    middle, least, most = (f"{number:.{digits}f}" for number in numbers)
    return f"{middle} [{least}, {most}]"


def sparse_data(task, features=8192, active=24, seed=0):
    "(steps + 1, batch, d_in): sparse sums of unit vectors, the rarer the later, with E|x|^2 = 1."
    g = generator(seed, "training benchmark")
    directions = torch.nn.functional.normalize(
        torch.randn(features, task["d_in"], generator=g), dim=1
    )
    often = torch.arange(1, features + 1) ** -0.8
    often = (active * often / often.sum()).clamp(max=0.9)
    shape = task["batch_size"], features

    def size():
        return (1 + 0.3 * torch.randn(shape, generator=g)).clamp(min=0.1)

    x = torch.stack(
        [
            ((torch.rand(shape, generator=g) < often) * size()) @ directions
            for _ in range(task["steps"] + 1)
        ]
    )
    return x / x.square().sum(-1).mean().sqrt()


def heading(*facts):
    "Date, processor, the version that measures, and further facts."
    machine = provenance()
    commit = (machine["git_sha"] or "")[:12]
    version = f"commit {commit}" if commit else "no commit"
    if machine["git_dirty"]:
        version += " with changes"
    about = [
        f"{datetime.date.today()}",
        machine["cpu"],
        f"atm_sae {machine['atm_sae']} ({version})",
    ]
    return ", ".join([*about, *facts])


def write_readme(report, begin, end):
    "Put the report between two markers of README.md."
    before, rest = README.read_text(encoding="utf-8").split(begin)
    with atomic_write(README) as part:
        part.write_text(f"{before}{begin}\n\n{report}\n{end}{rest.split(end)[1]}", encoding="utf-8")
