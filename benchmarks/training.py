"""How long a training step takes here and in the libraries that people use, on the same data, side
by side. README.md beside this file explains the numbers."""

import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

import pandas as pd
import torch
from common import heading, parsed, parser, spread, threads_used, write_readme
from peers import RIVALS, ROOT, environment
from safetensors.torch import load_file, save_file
from training_worker import settings

from atm_sae.core import generator
from atm_sae.report.tables import to_markdown
from atm_sae.sae.sae import SAE, SAEConfig
from atm_sae.stats import format_number

WORKER = Path(__file__).with_name("training_worker.py")
BEGIN, END = "<!-- training: begin -->", "<!-- training: end -->"
METHODS = ("topk", "standard", "jumprelu")
OWN = ("batchtopk", "ortsae", "gated")  # trained here alone

# Fixed before the first run.
GOALS = dict(topk=3.0, standard=1.3, jumprelu=1.3)  # times as fast as the faster rival
LOSS_GAP = 0.02  # loss after the same steps

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


def contestants():
    "(library, method, whose recipe)"
    yield from ((rival, m, rival) for m in METHODS for rival in RIVALS)
    yield from (("atm-sae", m, "sae-lens") for m in METHODS)
    yield from (("atm-sae", m, "dictionary-learning") for m in ("standard", "jumprelu"))
    yield from (("atm-sae", m, "atm-sae") for m in OWN)


def race(who, folder, threads, python):
    """One training in a process of its own, by an interpreter: seconds of each step, and the
    weights at the end."""
    library, method, recipe = who
    result = folder / "result.json"
    command = [
        python,
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
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)},
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
    _, method, recipe = who
    task = task | task["recipes"].get(f"{method} of {recipe}", {})
    sae = SAE(SAEConfig(task["d_in"], task["d_sae"], method, **settings(method, task)))
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
        early, late = zip(*(phases(r["seconds"]) for r in runs))
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


def total(run):
    "Seconds of all steps but the first."
    return sum(run["seconds"][1:])


def ratios(records, slow, fast):
    "Of each round: how many times as fast `fast` is, over all steps but the first."
    return [total(a) / total(b) for a, b in zip(records[slow], records[fast])]


def verdict(what, values, goal, met):
    return dict(
        what=what,
        measured=spread(values, 2),
        goal=goal,
        verdict="met" if met(statistics.median(values)) else "NOT met",
    )


def verdicts(records):
    "Goals, and what became of them."
    lines = []

    def ours(method, rival):
        own = ("atm-sae", method, rival)
        return own if own in records else ("atm-sae", method, "sae-lens")

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


def measured(records, task, folder, threads, repeat):
    "Every contestant once in each round, each round beginning with another one."
    pythons = {library: environment(library) for library in ("atm-sae", *RIVALS)}
    unseen = write_task(folder, task)
    for i in range(repeat):
        order = list(records)
        for who in order[i:] + order[:i]:
            run = race(who, folder, threads, pythons[who[0]])
            run["loss"], run["l0"] = final_loss(run.pop("weights"), who, task, unseen)
            records[who].append(run)
            seconds = (f"{s:.3f} s" for s in phases(run["seconds"]))
            found = f"loss {run['loss']:.4f} L0 {format_number(run['l0'])}"
            print(i, *who, *seconds, found, flush=True)


def main():
    command_line = parser(__doc__, repeat=3, threads=2)
    command_line.add_argument("--json", type=Path)
    args = parsed(command_line)
    task, records = TASK | (QUICK if args.quick else {}), {who: [] for who in contestants()}
    with tempfile.TemporaryDirectory() as folder:
        measured(records, task, Path(folder), args.threads, args.repeat)
    head = heading(
        threads_used(args.threads),
        f"{args.repeat} rounds",
        f"median [least, most]; d_in {task['d_in']}",
        f"d_sae {task['d_sae']}",
        f"batch {task['batch_size']}",
        f"{task['steps']} steps",
        f"fp32. {', '.join(RIVALS.values())}.",
    )
    text = f"{head}\n\n{to_markdown(verdicts(records))}\n\n{to_markdown(table(records))}\n"
    print(text)
    if args.json:
        runs = [dict(who=who, runs=found) for who, found in records.items()]
        args.json.write_text(json.dumps(runs))
    if args.write:
        write_readme(text, BEGIN, END)


if __name__ == "__main__":
    main()
