"""Are the results of a GPU those of the CPU, and how much of the chip do training, extraction and
evaluation use?

    PYTHONPATH=. python benchmarks/gpu.py              # on a GPU: at most 8 minutes
    PYTHONPATH=. python benchmarks/gpu.py --budget 240 # parts that no longer fit are left out
    PYTHONPATH=. python benchmarks/gpu.py --write      # and put the tables into README.md
    PYTHONPATH=. python benchmarks/gpu.py --small      # tiny sizes, on any device: does it run?

Needs PyTorch, transformers, safetensors, pandas, scipy and pytest, and no network. Writes gpu.json
and gpu.md into the folder `--out`, anew after each part. A part that fails, or that is too slow,
leaves its error there, and the next one starts. The activations of the recipe are random numbers,
23 GB in the folder `--scratch`; `--tokens` makes them fewer."""

import argparse
import copy
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("topk", "jumprelu", "standard", "atm")
LARGE = dict(d_in=2304, widths=(16384, 65536), batches=(2048, 8192), square=8192, copied=2**30)
LARGE |= dict(seconds=2.0, rows=16, context=1024, layer=12, words=1500, limit=480, part=60)
LARGE |= dict(tokens=5_000_000, batch=2048, shard=2**18)
SMALL = dict(d_in=32, widths=(64,), batches=(16,), square=64, copied=2**16)
SMALL |= dict(seconds=0.0, rows=2, context=16, layer=1, words=150, limit=3600, part=600)
SMALL |= dict(tokens=600, batch=16, shard=256)
TESTS, RECIPE = 150, 150  # most seconds of the tests and of the recipe; `part`: of any other part
NEEDED = dict(tests=60, model=20, recipe=90)  # seconds that a part must have left; others: 5
MARKERS = ("<!-- gpu: begin -->", "<!-- gpu: end -->")  # of the tables in README.md
GOALS = dict(recipe=30, evaluation=20)  # seconds, fixed before the first run
BOUNDS = dict(fp32=1e-3, bf16=0.1, scores=1e-2)  # largest differences from the CPU's fp32 numbers


def synchronise(device):
    "Wait until the device has done its work."
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function, device, least, warm=2):
    "Median seconds of a call, over at least three calls and `least` seconds."
    for _ in range(warm):
        function()
    synchronise(device)
    taken, begin = [], time.perf_counter()
    while len(taken) < 3 or (time.perf_counter() - begin < least and len(taken) < 200):
        start = time.perf_counter()
        function()
        synchronise(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


# --- what the chip can do


def ceilings(device, sizes):
    "Operations a second of a bf16 matrix product, and bytes a second of a copy."
    n = sizes["square"]
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_seconds = seconds_of(lambda: a @ b, device, sizes["seconds"] / 3)
    source = torch.zeros(sizes["copied"], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copy_seconds = seconds_of(lambda: target.copy_(source), device, sizes["seconds"] / 3)
    return dict(operations=2 * n**3 / product_seconds, bytes=2 * len(source) / copy_seconds)


def shares(seconds, operations, n_bytes, chip):
    "Shares of the two ceilings that a call reaches."
    return dict(
        seconds=seconds,
        of_operations=operations / seconds / chip["operations"] if chip else None,
        of_bytes=n_bytes / seconds / chip["bytes"] if chip else None,
    )


# --- the numbers of the CPU


def world_trainer(method, device, precision, folder=None, steps=20):
    "The trainer of a method in a small planted world, at its checkpoint if there is one."
    from atm_sae.data.planted import PlantedWorld, WorldBatches, WorldConfig
    from atm_sae.train.runs import make_trainer, recipe

    world = WorldConfig(d_in=16, n_parents=4, n_free=20)
    usual = dict(batch_size=64, log_every=100, precision=precision)
    spec = recipe(method, world, 16, 64, 4, steps, 0, **usual)
    batches = WorldBatches(PlantedWorld(world), 64, 0)
    made = make_trainer(spec, batches, [0.1] * steps, device, folder)
    made.restore_batches()
    return made


def trained(trainer, last):
    "The weights after step `last`, as one vector on the CPU."
    for step in range(trainer.steps, last):
        trainer.step(trainer.read_batch(step + 1))
    return torch.cat([w.detach().cpu().flatten() for w in trainer.sae.state_dict().values()])


def compared(what, precision, difference, bound):
    "A row of the table of equality."
    return dict(
        what=what,
        precision=precision,
        difference=difference,
        bound=bound,
        verdict="met" if difference <= bound else "NOT met",
    )


def equal_training(device):
    "For each method and precision: norm of the difference of all weights, over their norm."
    from atm_sae.core import generator
    from atm_sae.methods import METHODS

    rows = []
    for method in (m for m in METHODS if m != "random"):
        expected = trained(world_trainer(method, torch.device("cpu"), "fp32"), 20)
        for precision in ("fp32", "bf16"):
            trainer = world_trainer(method, device, precision)
            trainer.generator = generator(trainer.config.seed, "mask")  # the masks of the CPU
            found = trained(trainer, 20)
            difference = float((found - expected).norm() / expected.norm())
            rows.append(compared(f"training, {method}", precision, difference, BOUNDS[precision]))
    return rows


def equal_resume(device):
    "A training that was stopped and resumed on the device, against a whole one: no difference."
    with tempfile.TemporaryDirectory() as folder:
        whole = trained(world_trainer("topk+atm", device, "fp32"), 20)
        stopped = world_trainer("topk+atm", device, "fp32", folder)
        trained(stopped, 10)
        stopped.save()
        resumed = trained(world_trainer("topk+atm", device, "fp32", folder), 20)
    return [compared("resumed training", "fp32", float((whole - resumed).abs().max()), 0.0)]


def equal_scores(device):
    "For each protocol: the largest difference of a score of a dictionary that absorbs by half."
    from atm_sae.evals.absorption import PROTOCOLS, evaluate_absorption
    from atm_sae.evals.constructed import absorbing_sae, letter_world, word_task

    world, rows = letter_world(4, 64), []
    sae, task = absorbing_sae(world, 0.5), word_task(world, n=20)
    there = copy.deepcopy(sae).to(device)
    for protocol in PROTOCOLS:
        expected, found = (evaluate_absorption(s, task, protocol=protocol) for s in (sae, there))
        pairs = ((getattr(r, name) for r in (expected, found)) for name in ("full", "fraction"))
        difference = max(abs(a - b) for a, b in pairs)
        rows.append(compared(f"absorption, {protocol}", "fp32", difference, BOUNDS["scores"]))
    return rows


# --- training


class ResidentBatches:
    "Batches that lie on the device, so that a step and nothing else is measured."

    def __init__(self, d_in, batch_size, device):
        self.d_in, self.batch_size, self.next = d_in, batch_size, 0
        draws = torch.Generator(device).manual_seed(0)
        self.x = torch.randn(4, batch_size, d_in, generator=draws, device=device)

    def __next__(self):
        self.next = (self.next + 1) % len(self.x)
        return self.x[self.next]

    def state_dict(self):
        return dict(next=self.next)

    def load_state_dict(self, state):
        self.next = state["next"]


def hide_latents(masker):
    """Give ATM's masker averages under which it hides its usual share, and which keep their values.

    In the first steps of a training all importances are 0, and the mask hides nothing."""
    draws = torch.Generator().manual_seed(0)
    drawn = torch.randn(masker.d_sae, generator=draws).exp().to(masker.magnitude)
    for average in (masker.magnitude, masker.frequency, masker.contribution):
        average.copy_(drawn)
    masker.weight.fill_(1)
    masker.config = replace(masker.config, decay=1 - 1e-12)
    masker.step = 10**15  # the averages need no correction of their bias any more
    masker.warmup = masker.anneal = 0


def training_step(method, d_in, d_sae, batch, device, sizes, chip, fast=True):
    """A row of the table of training steps; `fast` takes the sparse code path where it is faster.

    Five matrix products of 2 * batch * d_in * d_sae operations: two forwards, three backwards. At
    least 28 bytes of traffic for each weight (Adam reads four numbers and writes three), and 6 for
    each latent of each sample (written forwards, read backwards, its gradient; bf16)."""
    from atm_sae.data.planted import WorldConfig
    from atm_sae.train.runs import make_trainer, recipe

    l0 = min(64, d_sae // 8)
    usual = dict(batch_size=batch, log_every=100, fast=fast)
    spec = recipe(method, WorldConfig(d_in=d_in), d_in, d_sae, l0, 10**5, 0, **usual)
    trainer = make_trainer(spec, ResidentBatches(d_in, batch, device), None, device)
    if trainer.masker is not None:
        hide_latents(trainer.masker)
    seconds = seconds_of(
        lambda: trainer.step(trainer.read_batch(trainer.steps + 1)), device, sizes["seconds"], 5
    )
    operations = 10 * batch * d_in * d_sae
    n_bytes = 28 * 2 * d_in * d_sae + 6 * batch * d_sae
    row = dict(method=method, d_sae=d_sae, batch=batch, samples_a_second=batch / seconds)
    row["code_path"] = "sparse" if fast else "dense"
    if trainer.masker is not None:
        row["of_latents_hidden"] = trainer.masker.current_probability().mean().item()
    return row | shares(seconds, operations, n_bytes, chip)


# --- the recipe of the paper


def write_cache(folder, n, d_in, device, shard):
    "An activation cache of `n` random rows in bfloat16, `shard` rows in a file."
    from atm_sae.artefacts import write_json
    from atm_sae.data.activations import ActivationCache, shard_name, write_shard

    draws, shards = torch.Generator(device).manual_seed(0), []
    for i, first in enumerate(range(0, n, shard)):
        sizes = [min(2**16, left) for left in range(min(shard, n - first), 0, -(2**16))]
        pieces = (torch.randn(m, d_in, generator=draws, device=device) for m in sizes)
        rows, sha = write_shard(folder / shard_name(i), pieces, d_in, "bfloat16")
        shards.append(dict(n=rows, sha256=sha))
    about = dict(n=n, d_in=d_in, dtype="bfloat16", sha256="", shards=shards)
    write_json(folder / "meta.json", about)
    return ActivationCache.open(folder, verify=False)


def train_from_cache(device, sizes, scratch):
    "Seconds from the stored activations to a trained TopK SAE, once over all of them."
    from atm_sae.data.batches import batches_for, cached_batches
    from atm_sae.data.planted import WorldConfig
    from atm_sae.sae.sae import SAE
    from atm_sae.train.loop import train
    from atm_sae.train.runs import recipe

    d_in, d_sae, batch = sizes["d_in"], sizes["widths"][0], sizes["batch"]
    steps, l0 = sizes["tokens"] // batch, min(64, d_sae // 8)
    # the data of the recipe are not read: the batches are those of the cache
    spec = recipe("topk", WorldConfig(d_in=d_in), d_in, d_sae, l0, steps, 0, batch)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        begin = time.perf_counter()
        cache = write_cache(Path(folder), sizes["tokens"], d_in, device, sizes["shard"])
        written = time.perf_counter() - begin
        begin = time.perf_counter()
        batches = batches_for(cached_batches(cache, batch, 0), device)
        train(SAE(spec.sae).to(device), batches, spec.train, progress=False)
        synchronise(device)
        seconds = time.perf_counter() - begin
    what = f"recipe: {sizes['tokens']:,} stored activations, one TopK SAE of {d_sae:,} latents"
    row = dict(what=what, tokens_a_second=steps * batch / seconds, seconds=seconds)
    return row | goal("recipe", seconds) | dict(seconds_to_write=written)


def goal(name, seconds):
    "The goal of a row and whether it is met; goals are those of the full sizes on a GPU."
    met = "met" if seconds <= GOALS[name] else "NOT met"
    return dict(goal=f"at most {GOALS[name]} s", verdict=met)


# --- the model


def gemma(device, sizes, small):
    "A model with random weights: Gemma-2-2b's shape in bf16, or a tiny one."
    from atm_sae.data.lm import LM, tiny_lm

    tiny = tiny_lm()
    if small:
        return replace(tiny, model=tiny.model.to(device))
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(attn_implementation="eager")  # its defaults are those of Gemma-2-2b
    assert (config.hidden_size, config.num_hidden_layers) == (sizes["d_in"], 26)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    return LM(model, tiny.tokenizer, "gemma-2-2b-shape", "", "")


def random_tokens(device, sizes):
    draws = torch.Generator().manual_seed(0)
    shape = sizes["rows"], sizes["context"]
    return torch.randint(5, 900, shape, generator=draws).to(device)


def extraction(lm, device, sizes, chip):
    "Activations of a layer: operations are twice the weights of its blocks for each token."
    from atm_sae.data.lm import read_site

    tokens = random_tokens(device, sizes)
    seconds = seconds_of(lambda: read_site(lm, tokens, sizes["layer"], batch_size=8), device, 1)
    blocks = lm.model.model.layers[: sizes["layer"] + 1]
    weights = sum(p.numel() for p in blocks.parameters())
    calls, size = -(-len(tokens) // 8), next(blocks.parameters()).element_size()
    row = dict(what=f"activations of layer {sizes['layer']}", tokens_a_second=tokens.numel())
    row["tokens_a_second"] /= seconds
    return row | shares(seconds, 2 * weights * tokens.numel(), calls * weights * size, chip)


class Evaluation:
    "One untrained SAE on activations of the model, and how long each evaluation of it takes."

    def __init__(self, lm, device, sizes):
        from atm_sae.data.lm import read_site
        from atm_sae.sae.architectures import SAEConfig
        from atm_sae.sae.sae import calibrate_l0, random_sae

        self.lm, self.device, self.sizes, self.task = lm, device, sizes, None
        self.tokens = random_tokens(device, sizes)
        read = read_site(lm, self.tokens, sizes["layer"], batch_size=8)
        self.x = read[:, 1:].flatten(0, 1).float()
        d_in, d_sae = self.x.shape[1], sizes["widths"][0]
        config = SAEConfig(d_in, d_sae, architecture="jumprelu", target_l0=min(64, d_sae // 8))
        sae = random_sae(config).to(device)
        self.sae = calibrate_l0(sae, self.x[:512], config.target_l0, centre=True)

    def timed(self, what, run):
        "A row with the seconds of one call, and what the call returns."
        start = time.perf_counter()
        result = run()
        synchronise(self.device)
        return dict(what=what, seconds=time.perf_counter() - start), result

    def reconstruction(self, chip):
        from atm_sae.evals.metrics import reconstruction_metrics

        seconds = seconds_of(lambda: reconstruction_metrics(self.sae, self.x), self.device, 1)
        row = dict(what="reconstruction", tokens_a_second=len(self.x) / seconds)
        d_sae = self.sizes["widths"][0]
        operations, n_bytes = 4 * self.x.numel() * d_sae, 8 * self.x.shape[1] * d_sae
        return row | shares(seconds, operations, n_bytes, chip)

    def loss_recovered(self):
        from atm_sae.evals.metrics import spliced_metrics

        layer, held_out = self.sizes["layer"], self.tokens[:, :128]
        run = partial(spliced_metrics, self.sae, self.lm, layer, held_out)
        return self.timed("loss recovered", run)[0]

    def first_letters(self):
        from atm_sae.evals.first_letter import build_task

        words = self.sizes["words"]
        run = partial(build_task, self.lm, self.sizes["layer"], max_words=words)
        row, task = self.timed("task of first letters", run)
        self.task = replace(task, f1=torch.ones(26), b=task.b + 100)  # so that every letter counts
        return row

    def absorption(self, protocol):
        "The scores solve sparse problems on the CPU."
        from atm_sae.evals.absorption import AbsorptionConfig, evaluate_absorption

        least = AbsorptionConfig(min_letters=1, min_f1=-1.0)
        run = partial(evaluate_absorption, self.sae, self.task, least, protocol=protocol)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a random model does not read the word
            return self.timed(f"absorption, {protocol}", run)[0]


# --- the report


def run_tests(limit):
    "What pytest says about the tests marked `gpu`."
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "tests/test_gpu.py"]
    shared = dict(cwd=ROOT, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    try:
        done = subprocess.run(command, **shared, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace")
        return dict(passed=False, said=f"{said[-3000:]}\nnot finished after {limit} s")
    return dict(passed=done.returncode == 0, said=(done.stdout + done.stderr)[-6000:])


class Parts:
    "Runs the parts one after the other; `found` is written after each, as plain data."

    def __init__(self, out, device, small, sizes):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.found = dict(device=name, torch=torch.__version__, small=small, ceilings=None)
        self.found |= dict(equality=[], training=[], model=[], left_out=[], errors={}, seconds={})
        self.out, self.device, self.sizes = out, device, sizes
        self.begin = time.perf_counter()

    def run(self, name, function, seconds=None):
        "What a part returns; None if it fails, is too slow, or no longer fits into the budget."
        start, seconds = time.perf_counter(), seconds or self.sizes["part"]
        left, needed = self.sizes["limit"] - (start - self.begin), NEEDED.get(name, 5)
        if left < needed:
            said = f"{name}: needs about {needed} s, {max(0, left):.0f} s are left"
            self.found["left_out"].append(said)
            return None
        seconds = min(seconds, left)
        signal.signal(signal.SIGALRM, partial(self.stop, seconds))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        result = None
        try:
            result = function()
        except torch.OutOfMemoryError:
            self.found["left_out"].append(f"{name}: the device has too little memory")
        except Exception:
            self.found["errors"][name] = traceback.format_exc()[-3000:]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.found["seconds"][name] = time.perf_counter() - start
        return result

    def stop(self, seconds, *_):
        raise TimeoutError(f"not finished after {seconds} s")

    def write(self):
        "Write gpu.json and gpu.md, and free what the last part left."
        (self.out / "gpu.json").write_text(json.dumps(self.found, indent=1), encoding="utf-8")
        (self.out / "gpu.md").write_text(report(self.found), encoding="utf-8")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def measure(parts, device, sizes, small, tests, scratch):
    "All measurements, into `parts`: the most wanted ones first."
    for part in (equal_training, equal_resume, equal_scores):
        name = part.__name__.replace("_", " ")
        parts.found["equality"] += parts.run(name, partial(part, device)) or []
        parts.write()
    chip = parts.found["ceilings"] = parts.run("ceilings", lambda: ceilings(device, sizes))
    parts.write()
    cases = [*product(sizes["widths"], sizes["batches"], METHODS)]
    for d_sae, batch, method in cases[: len(METHODS)]:  # the smallest size of each method
        measure_training(parts, method, d_sae, batch, device, sizes, chip)
    row = parts.run("recipe", lambda: train_from_cache(device, sizes, scratch), RECIPE)
    parts.found["model"] += [row] if row else []
    measure_model(parts, device, sizes, small, chip)
    for d_sae, batch, method in cases[: len(METHODS)]:
        measure_training(parts, method, d_sae, batch, device, sizes, chip, fast=False)
    if tests:
        parts.found["tests"] = parts.run("tests", lambda: run_tests(TESTS), TESTS + 30)
        parts.write()
    for d_sae, batch, method in cases[len(METHODS) :]:
        measure_training(parts, method, d_sae, batch, device, sizes, chip)


def measure_training(parts, method, d_sae, batch, device, sizes, chip, fast=True):
    "One row of the table of training steps."
    case = f"{method}, {d_sae:,} latents, batches of {batch:,}{'' if fast else ', dense code path'}"
    size = (method, sizes["d_in"], d_sae, batch)
    row = parts.run(case, partial(training_step, *size, device, sizes, chip, fast))
    parts.found["training"] += [row] if row else []
    parts.write()


def measure_model(parts, device, sizes, small, chip):
    "The rows of extraction and evaluation."
    lm = parts.run("model", lambda: gemma(device, sizes, small))
    if lm is None:
        return
    rows = {"extraction": lambda: extraction(lm, device, sizes, chip)}
    made = parts.run("SAE", lambda: Evaluation(lm, device, sizes))
    if made is not None:
        rows["reconstruction"] = lambda: made.reconstruction(chip)
        rows["first letters"] = made.first_letters
        for protocol in ("exact", "saebench"):
            rows[f"absorption, {protocol}"] = partial(made.absorption, protocol)
        rows["loss recovered"] = made.loss_recovered
    scored = ("reconstruction", "absorption, exact", "absorption, saebench", "loss recovered")
    seconds = {}
    for name, function in rows.items():
        row = parts.run(name, function)
        parts.found["model"] += [row] if row else []
        seconds |= {name: row["seconds"]} if row and name in scored else {}
        parts.write()
    if len(seconds) == len(scored):
        whole = sum(seconds.values())
        what = f"evaluation of one SAE of {sizes['widths'][0]:,} latents, all of these four"
        parts.found["model"].append(dict(what=what, seconds=whole) | goal("evaluation", whole))
        parts.write()


def table(rows, columns):
    "Rows as a Markdown table; a share is printed in per cent."

    def text(name, value):
        if value is None:
            return ""
        if name.startswith("of_"):
            return f"{value:.0%}"
        if name in ("seconds", "difference", "bound"):
            return f"{value:.3g}"
        return f"{value:,.0f}" if isinstance(value, float) else f"{value:,}"

    def line(row):
        cells = (row.get(name) for name in columns)
        texts = (c if isinstance(c, str) else text(n, c) for n, c in zip(columns, cells))
        return f"| {' | '.join(texts)} |"

    heads = (name.replace("_", " ") for name in columns)
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(columns) + "|", *map(line, rows)])


EQUALITY = (
    "Against fp32 on the CPU, in a small planted world. *difference* of training: norm of the "
    "difference of all weights after 20 steps, over their norm. bf16 is autocast."
)


def report(found):
    "The Markdown text of what has been measured so far."
    chip, ends = found["ceilings"], ("seconds", "of_operations", "of_bytes")
    parts = [f"**{found['device']}**, PyTorch {found['torch']}."]
    if chip:
        parts[0] += (
            f" {chip['operations'] / 1e12:.3g} TFLOP/s in a bf16 matrix product, "
            f"{chip['bytes'] / 1e9:.3g} GB/s in a copy. *of operations* and *of bytes* are shares "
            "of these."
        )
    if found["equality"]:
        columns = ("what", "precision", "difference", "bound", "verdict")
        parts.append(f"{EQUALITY}\n\n{table(found['equality'], columns)}")
    training = ("method", "d_sae", "batch", "code_path", "samples_a_second", *ends)
    training += ("of_latents_hidden",)
    if found["training"]:
        parts.append(table(found["training"], training))
    if found["model"]:
        parts.append(table(found["model"], ("what", "tokens_a_second", *ends, "goal", "verdict")))
    if found.get("tests"):
        verdict = "passed" if found["tests"]["passed"] else "FAILED"
        parts.append(f"Tests marked `gpu`: {verdict}.\n\n```\n{found['tests']['said']}\n```")
    parts += [f"Left out: {case}." for case in found["left_out"]]
    parts += [f"FAILED: {part}\n\n```\n{said}\n```" for part, said in found["errors"].items()]
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description="Results and speed on a GPU")
    add = parser.add_argument
    add("--small", action="store_true", help="tiny sizes, on any device")
    add("--no-tests", action="store_true", help="leave out `pytest -m gpu`")
    add("--out", type=Path, default=Path("."), help="folder of gpu.json and gpu.md")
    add("--budget", type=float, help="seconds; a part that no longer fits is left out")
    add("--tokens", type=int, help="stored activations of the recipe")
    add("--scratch", type=Path, help="folder of these activations (default: that of the system)")
    add("--write", action="store_true", help="put the tables into README.md")
    args = parser.parse_args()
    if args.small and args.write:
        parser.error("the numbers of --small mean nothing: run without it to write them")
    if not args.small and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here: use --small to see whether the script runs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    asked = dict(tokens=args.tokens, limit=args.budget)
    sizes = SMALL if args.small else LARGE
    sizes = sizes | {name: value for name, value in asked.items() if value is not None}
    parts = Parts(args.out, device, args.small, sizes)
    measure(parts, device, sizes, args.small, not (args.small or args.no_tests), args.scratch)
    print(report(parts.found))
    if args.write:
        from common import write_readme

        write_readme(report(parts.found), *MARKERS)
    if parts.found["errors"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
