"""How long a training step takes here and in the libraries that people use, on the same data, side
by side. README.md beside this file explains the numbers."""

import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

import masking
import pandas as pd
import torch
from common import heading, parsed, parser, sparse_data, spread, threads_used, write_readme
from peers import RIVALS, ROOT, environment
from safetensors.torch import load_file, save_file
from training_worker import IN_TURN, ONE_PASS, SEVERAL, TOGETHER, StreamedBatches, settings

from atm_sae.report.tables import to_markdown
from atm_sae.sae.sae import SAE, SAEConfig
from atm_sae.stats import format_number

WORKER = Path(__file__).with_name("training_worker.py")
BEGIN, END = "<!-- training: begin -->", "<!-- training: end -->"
METHODS = ("topk", "batchtopk", "matryoshka", "gated", "standard", "jumprelu")
OWN = ("ortsae",)  # no other library has it
KINDS = ("cached", "streamed")  # where the batches of several SAEs come from

# Fixed before the first run: times as fast as the fastest rival, and the loss after the same steps.
GOALS = dict(topk=3.0, batchtopk=1.3, matryoshka=1.3, gated=1.3, standard=1.3, jumprelu=1.3)
TOGETHER_GOAL, LOSS_GAP = 1.3, 0.02

TASK = dict(
    d_in=768,
    d_sae=6144,
    batch_size=512,
    steps=20,
    lr=1e-3,
    k=32,
    prefixes=[1 / 16, 1 / 8, 1 / 4, 1 / 2, 1],
    l1=0.05,
    l0_coef=1e-3,
    bandwidth=0.05,
    threshold=0.01,
    # dictionary-learning's JumpReLU has no other penalty than this one, and its standard and
    # gated trainers do not clip
    recipes={
        "jumprelu of dictionary-learning": dict(target_l0=32.0),
        "standard of dictionary-learning": dict(grad_clip=1e9),
        "gated of dictionary-learning": dict(grad_clip=1e9),
    },
)
QUICK = dict(d_in=32, d_sae=256, batch_size=64, steps=6, k=4)
# several TopK SAEs; streamed batches come from 15 blocks of the shape of SmolLM2-135M
SEVERAL_TASK = dict(
    d_in=576,
    d_sae=2048,
    batch_size=512,
    steps=3,
    ks=[8, 16, 24, 32, 40, 48, 56, 64],
    model=dict(
        shape=dict(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=15,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=1024,
        ),
        dtype="float32",
        context=128,
    ),
)
SEVERAL_QUICK = dict(d_in=32, d_sae=64, batch_size=32, steps=3, ks=[2, 4])
SMALL_MODEL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1)
SMALL_MODEL |= dict(num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
SEVERAL_QUICK["model"] = dict(shape=SMALL_MODEL, dtype="bfloat16", context=16)

# ---- the task


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
    "(library, method, whose recipe) of one SAE; (library, TOGETHER, kind of batches, way) of many"
    yield from ((rival, m, rival) for m in METHODS for rival in RIVALS)
    yield from (("atm-sae", m, "sae-lens") for m in METHODS)
    different = (m for m in METHODS if f"{m} of dictionary-learning" in TASK["recipes"])
    yield from (("atm-sae", m, "dictionary-learning") for m in different)
    yield from (("atm-sae", m, "atm-sae") for m in OWN)
    yield from ((library, TOGETHER, kind, way) for library, way in SEVERAL for kind in KINDS)


def race(who, folder, threads, python):
    """Contestants of one library, one after the other in a process of its own: {contestant: dict of
    the seconds of each step, the version of PyTorch, and the weights at the end}."""
    command = [python, str(WORKER), who[0][0], str(folder), json.dumps([w[1:] for w in who])]
    done = subprocess.run(
        [*command, "--threads", str(threads)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise SystemExit(f"{who[0][0]} failed:\n{done.stderr[-2000:]}")
    found = json.loads((folder / "results.json").read_text())
    return {
        one: run | dict(weights=load_file(folder / f"{i}.safetensors"))
        for i, (one, run) in enumerate(zip(who, found, strict=True))
    }


@torch.no_grad()
def loss_of(weights, method, task, x):
    """Loss of the weights (squared error and penalty) on a batch that no step has seen, and the
    mean number of active latents."""
    sae = SAE(SAEConfig(task["d_in"], task["d_sae"], method, **settings(method, task)))
    own = sae.state_dict()  # a threshold that training batches set takes no part in the loss
    own |= {n: w for n, w in weights.items() if n in own and own[n].shape == w.shape}
    sae.load_state_dict(own)
    loss = sae.loss(x)
    return loss.total.item(), (loss.z > 0).sum(1).float().mean().item()


def final_loss(weights, who, task, unseen):
    "Loss and L0 of a contestant; of several SAEs the means. `unseen`: {kind of batches: a batch}."
    if who[1] != TOGETHER:
        task = task | task["recipes"].get(f"{who[1]} of {who[2]}", {})
        return loss_of(weights, who[1], task, unseen["one SAE"])
    found = []
    for i, k in enumerate(task["ks"]):
        own = {n.removeprefix(f"{i}."): w for n, w in weights.items() if n.startswith(f"{i}.")}
        found.append(loss_of(own, "topk", task | dict(k=k), unseen[who[2]]))
    return tuple(statistics.mean(numbers) for numbers in zip(*found))


# ---- the numbers


def phases(seconds):
    """Median of a step while the SAE is still dense, and once it is sparse: the first and the last
    third, without the very first step."""
    third = max(2, len(seconds) // 3)
    return statistics.median(seconds[1:third]), statistics.median(seconds[-third:])


def title(who):
    "What a contestant trains: a method, or several SAEs."
    return f"several TopK, {who[2]}, {who[3]}" if who[1] == TOGETHER else who[1]


def table(records):
    "One line for each contestant: medians over the rounds."
    lines = []
    for who, runs in records.items():
        early, late = zip(*(phases(r["seconds"]) for r in runs))
        lines.append(
            {
                "library": who[0],
                "what": title(who),
                "recipe of": "sae-lens" if who[1] == TOGETHER else who[2],
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


def faster_rival(records, rivals):
    "The one of several contestants that takes the fewest seconds."
    return min(rivals, key=lambda who: statistics.median(map(total, records[who])))


def ours(records, method, rival):
    "Our contestant with the recipe of a rival."
    own = ("atm-sae", method, rival)
    return own if own in records else ("atm-sae", method, "sae-lens")


def speed_verdicts(records):
    "Times as fast as the fastest rival, for each method and for several SAEs on one pass."
    for m in METHODS:
        faster = faster_rival(records, [(r, m, r) for r in RIVALS])
        values = ratios(records, faster, ours(records, m, faster[0]))
        what = f"{m}: times as fast as {faster[0]}, the faster of the two"
        yield verdict(what, values, f"at least {GOALS[m]:g}", lambda v, m=m: v >= GOALS[m])
    for kind in KINDS:
        own = ("atm-sae", TOGETHER, kind, ONE_PASS)
        faster = faster_rival(
            records, [(r, TOGETHER, kind, way) for r, way in SEVERAL if r in RIVALS]
        )
        values = ratios(records, faster, own)
        what = f"several TopK, {kind}: times as fast as {faster[0]}, {faster[3]}"
        goal = f"at least {TOGETHER_GOAL:g}"
        yield verdict(what, values, goal, lambda v: v >= TOGETHER_GOAL)


def loss_verdicts(records):
    "Loss over that of each rival."
    pairs = [(m, r, ours(records, m, r), (r, m, r)) for m in METHODS for r in RIVALS]
    for kind in KINDS:
        own = ("atm-sae", TOGETHER, kind, ONE_PASS)
        rivals = [(r, TOGETHER, kind, ONE_PASS) for r in RIVALS]
        pairs += [(f"several TopK, {kind}", who[0], own, who) for who in rivals]
    for what, rival, own, who in pairs:
        gap = [records[own][0]["loss"] / records[who][0]["loss"]]
        goal = f"within {LOSS_GAP:.0%}"
        yield verdict(
            f"{what}: loss over that of {rival}", gap, goal, lambda v: abs(v - 1) <= LOSS_GAP
        )


def pass_verdicts(records):
    "How many times as fast one pass is as one after the other; no goal."
    for library in dict.fromkeys(library for library, way in SEVERAL if way == IN_TURN):
        for kind in KINDS:
            slow, fast = ((library, TOGETHER, kind, way) for way in (IN_TURN, ONE_PASS))
            what = f"several TopK, {kind}: one pass of {library}, times as fast as in turn"
            values = ratios(records, slow, fast)
            yield dict(what=what, measured=spread(values, 2), goal="none", verdict="")


def verdicts(records):
    "Goals, and what became of them."
    every = [*speed_verdicts(records), *loss_verdicts(records), *pass_verdicts(records)]
    return pd.DataFrame(every)


def write_tasks(folder, task, several):
    "The tasks for all libraries in two folders; {kind of batches: a batch that no step sees}."
    unseen = {}
    for name, one in (("one", task), ("several", several)):
        (folder / name).mkdir()
        unseen[name] = write_task(folder / name, one)
    streamed = StreamedBatches(several["model"], several["batch_size"], several["steps"] + 1)
    sae = SAE(SAEConfig(several["d_in"], several["d_sae"]))
    sae.init_b_dec(streamed.batch(0))
    path = folder / "several" / "start.safetensors"
    save_file(load_file(path) | {"b_dec of streamed": sae.b_dec.detach()}, path)
    return {
        "one SAE": unseen["one"],
        "cached": unseen["several"],
        "streamed": streamed.batch(several["steps"]),
    }


def measured(records, tasks, folder, threads, repeat):
    """Every contestant once in each round, those of a library in one process; each round begins
    with another library. `tasks`: that of one SAE and that of several."""
    libraries = ["atm-sae", *RIVALS]
    pythons = {library: environment(library) for library in libraries}
    unseen = write_tasks(folder, *tasks)
    for i in range(repeat):
        first = i % len(libraries)
        for library in libraries[first:] + libraries[:first]:
            for name, task in zip(("one", "several"), tasks):
                chosen = [who for who in records if who[0] == library]
                chosen = [who for who in chosen if (who[1] == TOGETHER) == (name == "several")]
                runs = race(chosen, folder / name, threads, pythons[library])
                for who, run in runs.items():
                    run["loss"], run["l0"] = final_loss(run.pop("weights"), who, task, unseen)
                    records[who].append(run)
                    say(i, who, run)


def say(i, who, run):
    "A line for a finished training."
    seconds = (f"{s:.3f} s" for s in phases(run["seconds"]))
    found = f"loss {run['loss']:.4f} L0 {format_number(run['l0'])}"
    print(i, *who, *seconds, found, flush=True)


def measured_masks(task, threads, repeat):
    "Steps of the warm-up, and rounds; a text if the masks do not hide their usual share."
    try:
        return masking.measure(task, threads, repeat)
    except SystemExit as error:
        return str(error)


def mask_report(masks):
    "The time of ATM's mask in Markdown."
    if isinstance(masks, str):
        return f"**ATM's mask was not measured**: {masks}"
    steps, rounds = masks
    return (
        f"**ATM's mask**, after {steps:,} steps of warm-up\n\n{to_markdown(masking.table(rounds))}"
    )


def report(records, tasks, masks, threads, repeat):
    "The tables in Markdown. `masks`: what `measured_masks` returned."
    task, several = tasks
    head = heading(
        threads_used(threads),
        f"{repeat} rounds",
        f"median [least, most]; d_in {task['d_in']}",
        f"d_sae {task['d_sae']}",
        f"batch {task['batch_size']}",
        f"{task['steps']} steps",
        f"fp32. Several: {len(several['ks'])} TopK SAEs, d_in {several['d_in']}",
        f"d_sae {several['d_sae']}",
        f"batch {several['batch_size']}",
        f"{several['steps']} steps. {', '.join(RIVALS.values())}.",
    )
    parts = to_markdown(verdicts(records)), mask_report(masks), to_markdown(table(records))
    return "\n\n".join([head, *parts]) + "\n"


def main():
    command_line = parser(__doc__, repeat=3, threads=2)
    command_line.add_argument("--json", type=Path, help="file for every single number")
    args = parsed(command_line)
    tasks = TASK | (QUICK if args.quick else {}), TASK | SEVERAL_TASK
    if args.quick:
        tasks = tasks[0], tasks[1] | SEVERAL_QUICK
    records = {who: [] for who in contestants()}
    masks = measured_masks(tasks[0], args.threads, args.repeat)
    with tempfile.TemporaryDirectory() as folder:
        measured(records, tasks, Path(folder), args.threads, args.repeat)
    text = report(records, tasks, masks, args.threads, args.repeat)
    print(text)
    if args.json:
        runs = [dict(who=who, runs=found) for who, found in records.items()]
        args.json.write_text(json.dumps(dict(training=runs, masking=masks)))
    if args.write:
        write_readme(text, BEGIN, END)


if __name__ == "__main__":
    main()
