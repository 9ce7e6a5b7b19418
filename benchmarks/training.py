"""How long a training step takes here and in the libraries that people use, on the same data, side
by side. README.md beside this file explains the numbers."""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import pandas as pd
import torch
from absorption import write_readme
from safetensors.torch import load_file, save_file

from atm_sae.artefacts import provenance
from atm_sae.core import cache_dir, generator
from atm_sae.report.tables import to_markdown
from atm_sae.stats import format_number
from atm_sae.sae.sae import SAE, SAEConfig

WORKER = Path(__file__).with_name("training_worker.py")
BEGIN, END = "<!-- training: begin -->", "<!-- training: end -->"
RIVALS = {"sae-lens": "sae-lens==6.54.12", "dictionary-learning": "dictionary-learning==0.1.0"}
METHODS = ("topk", "standard", "jumprelu")

# Fixed before the first run.
GOALS = dict(topk=3.0, standard=1.3, jumprelu=1.3)  # times as fast as the faster rival
MASK_COST, LOSS_GAP = 1.05, 0.02  # ATM over standard; loss after the same steps

TASK = dict(
    d_in=768,
    d_sae=12288,
    batch_size=1024,
    steps=24,
    lr=1e-3,
    k=32,
    l1=0.05,
    l0_coef=1e-3,
    bandwidth=0.05,
    threshold=0.01,
    # dictionary-learning's JumpReLU has no other penalty than this one, and its standard trainer
    # does not clip
    recipes={
        "jumprelu of dictionary-learning": dict(target_l0=32.0),
        "standard of dictionary-learning": dict(grad_clip=1e9),
    },
)
QUICK = dict(d_in=16, d_sae=64, batch_size=32, steps=6, k=4)

# ---- the task


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


def write_task(folder, task):
    "Batches, first weights and recipe, for every library."
    x, sae = (
        sparse_data(task),
        SAE(SAEConfig(task["d_in"], task["d_sae"], "jumprelu", init_threshold=task["threshold"])),
    )
    sae.init_b_dec(x[0])  # as ours and dictionary-learning's TopK begin by themselves
    save_file(dict(x=x[:-1].contiguous()), folder / "batches.safetensors")
    save_file(
        {n: t.contiguous() for n, t in sae.state_dict().items()}, folder / "start.safetensors"
    )
    (folder / "task.json").write_text(json.dumps(task))
    return x[-1]


# ---- the contestants


def environment(library):
    """The interpreter of a library's own environment; made first if need be, with the PyTorch of
    this one."""
    named = os.environ.get(f"ATM_SAE_{library.upper().replace('-', '_')}")
    if named or library == "atm-sae":
        return named or sys.executable
    folder = cache_dir() / "peers" / library
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, clear=True, with_pip=True)
        same = f"torch=={torch.__version__.split('+')[0]}"
        for wanted in (same, RIVALS[library], same):
            subprocess.run([python, "-m", "pip", "install", "-q", wanted], check=True)
        (folder / "ready").touch()
    return str(python)


def contestants():
    "(library, method, whose recipe)"
    yield from ((rival, m, rival) for m in METHODS for rival in RIVALS)
    yield from (
        ("atm-sae", m, "sae-lens") for m in ("topk", "standard", "standard+atm", "jumprelu")
    )
    yield from (("atm-sae", m, "dictionary-learning") for m in ("standard", "jumprelu"))


def race(who, folder, threads):
    "One training in a process of its own: seconds of each step, and the weights at the end."
    library, method, recipe = who
    result = folder / "result.json"
    command = [
        environment(library),
        str(WORKER),
        library,
        method,
        str(folder),
        str(result),
        "--threads",
        str(threads),
        "--recipe-of",
        recipe,
    ]
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": root},
    )
    if done.returncode:
        raise SystemExit(f"{library}, {method} failed:\n{done.stderr[-2000:]}")
    return json.loads(result.read_text()) | dict(
        weights=load_file(result.with_suffix(".safetensors"))
    )


@torch.no_grad()
def final_loss(weights, who, task, x):
    """Loss of the weights (squared error and penalty) on a batch that no step has seen, and the
    mean number of active latents."""
    base, task = (
        who[1].removesuffix("+atm"),
        task | task["recipes"].get(f"{who[1]} of {who[2]}", {}),
    )
    own = dict(topk=("k",), standard=("l1",), jumprelu=("l0_coef", "bandwidth", "target_l0"))[base]
    sae = SAE(SAEConfig(task["d_in"], task["d_sae"], base, **{n: task.get(n) for n in own}))
    sae.load_state_dict({n: weights[n] for n in sae.state_dict()})
    loss = sae.loss(x)
    return loss.total.item(), (loss.z > 0).sum(1).float().mean().item()


# ---- the numbers


def phases(seconds):
    """Median of a step while the SAE is still dense, and once it is sparse: the first and the last
    third, without the very first step."""
    third = len(seconds) // 3
    return statistics.median(seconds[1:third]), statistics.median(seconds[-third:])


def table(records):
    "One line for each contestant: medians over the rounds."
    lines = []
    for who, runs in records.items():
        early, late = (sorted(p) for p in zip(*(phases(r["seconds"]) for r in runs)))
        lines.append(
            {
                "library": who[0],
                "method": who[1],
                "recipe of": who[2],
                "first steps, s": spread(early),
                "last steps, s": spread(late),
                "loss": runs[0]["loss"],
                "L0": runs[0]["l0"],
                "torch": runs[0]["torch"],
            }
        )
    return pd.DataFrame(lines)


def spread(values):
    "Median [least, most] of sorted values."
    return f"{statistics.median(values):.3f} [{values[0]:.3f}, {values[-1]:.3f}]"


def total(run):
    "Seconds of all steps but the first."
    return sum(run["seconds"][1:])


def ratios(records, slow, fast):
    "Of each round: how many times as fast `fast` is, over all steps but the first."
    return sorted(total(a) / total(b) for a, b in zip(records[slow], records[fast]))


def verdict(what, values, goal, met):
    return dict(
        what=what,
        measured=f"{statistics.median(values):.2f} [{values[0]:.2f}, {values[-1]:.2f}]",
        goal=goal,
        verdict="met" if met(statistics.median(values)) else "NOT met",
    )


def verdicts(records):
    "Goals, and what became of them."
    lines, ours = (
        [],
        lambda m, rival="sae-lens": (
            "atm-sae",
            m,
            rival if ("atm-sae", m, rival) in records else "sae-lens",
        ),
    )
    for m in METHODS:
        faster = min(
            ((r, m, r) for r in RIVALS),
            key=lambda w: statistics.median(map(total, records[w])),
        )
        lines.append(
            verdict(
                f"{m}: times as fast as {faster[0]}, the faster of the two",
                ratios(records, faster, ours(m, faster[0])),
                f"at least {GOALS[m]:g}",
                lambda v, m=m: v >= GOALS[m],
            )
        )
    cost = ratios(records, ours("standard+atm"), ours("standard"))
    lines.append(
        verdict(
            "ATM: time of a step over standard",
            cost,
            f"at most {MASK_COST:g}",
            lambda v: v <= MASK_COST,
        )
    )
    for m in METHODS:
        for rival in RIVALS:
            gap = [records[ours(m, rival)][0]["loss"] / records[rival, m, rival][0]["loss"]]
            lines.append(
                verdict(
                    f"{m}: loss over that of {rival}",
                    gap,
                    f"within {LOSS_GAP:.0%}",
                    lambda v: abs(v - 1) <= LOSS_GAP,
                )
            )
    return pd.DataFrame(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true")
    a = parser.parse_args()
    task, records = TASK | (QUICK if a.quick else {}), {who: [] for who in contestants()}
    with tempfile.TemporaryDirectory() as folder:
        unseen = write_task(Path(folder), task)
        for i in range(a.repeat):
            order = list(records)
            for who in order[i:] + order[:i]:
                run = race(who, Path(folder), a.threads)
                run["loss"], run["l0"] = final_loss(run.pop("weights"), who, task, unseen)
                records[who].append(run)
                print(
                    i,
                    *who,
                    *(f"{s:.3f} s" for s in phases(run["seconds"])),
                    f"loss {run['loss']:.4f} L0 {format_number(run['l0'])}",
                    flush=True,
                )
    machine, done = provenance(), verdicts(records)
    head = (
        f"{datetime.date.today()}, {machine['cpu']}, {a.threads} threads, {a.repeat} rounds, "
        f"median [least, most]; d_in {task['d_in']}, d_sae {task['d_sae']}, "
        f"batch {task['batch_size']}, {task['steps']} steps, fp32. {', '.join(RIVALS.values())}."
    )
    text = f"{head}\n\n{to_markdown(done)}\n\n{to_markdown(table(records))}\n"
    print(text)
    if a.json:
        a.json.write_text(json.dumps([dict(who=who, runs=runs) for who, runs in records.items()]))
    if a.write:
        write_readme(text, BEGIN, END)


if __name__ == "__main__":
    main()
