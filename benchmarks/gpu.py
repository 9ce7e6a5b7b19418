"""Are the results of a GPU those of the CPU, and how much of the chip do training, extraction and
evaluation use?

    PYTHONPATH=. python benchmarks/gpu.py            # on a GPU: at most 8 minutes
    PYTHONPATH=. python benchmarks/gpu.py --small    # tiny sizes, on any device: does it run?

Needs PyTorch, transformers, safetensors, pandas, scipy and pytest, and no network. Writes gpu.json
and gpu.md into the folder `--out`."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from atm_sae.data.lm import LM, read_site, tiny_lm
from atm_sae.data.planted import WorldConfig
from atm_sae.evals.absorption import (
    PROTOCOLS,
    AbsorptionConfig,
    evaluate_absorption,
)
from atm_sae.evals.first_letter import build_task
from atm_sae.evals.metrics import reconstruction_metrics, spliced_metrics
from atm_sae.sae.architectures import SAEConfig
from atm_sae.sae.sae import calibrate_l0, random_sae
from atm_sae.train.runs import make_trainer, recipe

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("topk", "jumprelu", "standard", "atm")
LARGE = dict(d_in=2304, widths=(16384, 65536), batches=(2048, 8192), square=8192, copied=2**30)
LARGE |= dict(seconds=3.0, rows=16, context=1024, layer=12, words=1500, tests=150, limit=420)
SMALL = dict(d_in=32, widths=(64,), batches=(16,), square=64, copied=2**16)
SMALL |= dict(seconds=0.0, rows=2, context=16, layer=1, words=150, tests=0, limit=600)


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
        of_operations=operations / seconds / chip["operations"],
        of_bytes=n_bytes / seconds / chip["bytes"],
    )


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


def training_step(method, d_in, d_sae, batch, device, sizes, chip):
    """A row of the table of training steps.

    Five matrix products of 2 * batch * d_in * d_sae operations: two forwards, three backwards. At
    least 28 bytes of traffic for each weight (Adam reads four numbers and writes three), and 6 for
    each latent of each sample (written forwards, read backwards, its gradient; bf16)."""
    masked = dict(warmup=0.0) if method == "atm" else {}
    l0 = min(64, d_sae // 8)
    usual = dict(batch_size=batch, log_every=100, **masked)
    spec = recipe(method, WorldConfig(d_in=d_in), d_in, d_sae, l0, 10**5, 0, **usual)
    trainer = make_trainer(spec, ResidentBatches(d_in, batch, device), None, device)
    seconds = seconds_of(
        lambda: trainer.step(trainer.read_batch(trainer.steps + 1)), device, sizes["seconds"], 5
    )
    operations = 10 * batch * d_in * d_sae
    n_bytes = 28 * 2 * d_in * d_sae + 6 * batch * d_sae
    row = dict(method=method, d_sae=d_sae, batch=batch, samples_a_second=batch / seconds)
    return row | shares(seconds, operations, n_bytes, chip)


# --- the model


def gemma(device, sizes, small):
    "A model with random weights: Gemma-2-2b's shape in bf16, or a tiny one."
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


def extraction(lm, device, sizes, chip):
    "Activations of a layer: operations are twice the weights of its blocks for each token."
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 900, (sizes["rows"], sizes["context"]), generator=draws).to(device)
    seconds = seconds_of(lambda: read_site(lm, tokens, sizes["layer"], batch_size=8), device, 1)
    blocks = lm.model.model.layers[: sizes["layer"] + 1]
    weights = sum(p.numel() for p in blocks.parameters())
    calls, size = -(-len(tokens) // 8), next(blocks.parameters()).element_size()
    row = dict(what=f"activations of layer {sizes['layer']}", tokens_a_second=tokens.numel())
    row["tokens_a_second"] /= seconds
    return row | shares(seconds, 2 * weights * tokens.numel(), calls * weights * size, chip), tokens


def evaluation(lm, tokens, device, sizes, chip):
    "Seconds of each evaluation of one SAE; the absorption scores solve sparse problems on the CPU."
    x = read_site(lm, tokens, sizes["layer"], batch_size=8)[:, 1:].flatten(0, 1).float()
    d_in, d_sae = x.shape[1], sizes["widths"][0]
    config = SAEConfig(d_in, d_sae, architecture="jumprelu", target_l0=min(64, d_sae // 8))
    sae = calibrate_l0(random_sae(config).to(device), x[:512], config.target_l0, centre=True)
    seconds = seconds_of(lambda: reconstruction_metrics(sae, x), device, 1)
    row = dict(what="reconstruction", tokens_a_second=len(x) / seconds)
    rows = [row | shares(seconds, 4 * x.numel() * d_sae, 8 * d_in * d_sae, chip)]
    held_out = tokens[:, :128]

    def timed(what, run):
        start = time.perf_counter()
        result = run()
        synchronise(device)
        rows.append(dict(what=what, seconds=time.perf_counter() - start))
        return result

    timed("loss recovered", lambda: spliced_metrics(sae, lm, sizes["layer"], held_out))
    task = timed(
        "task of first letters",
        lambda: build_task(lm, sizes["layer"], max_words=sizes["words"]),
    )
    task = replace(task, f1=torch.ones(26), b=task.b + 100)  # so that every letter counts
    least = AbsorptionConfig(min_letters=1, min_f1=-1.0)
    warnings.simplefilter("ignore")  # a random model does not read the word
    for name in PROTOCOLS:
        score = partial(evaluate_absorption, sae, task, least, protocol=name)
        timed(f"absorption, {name}", score)
    return rows


# --- the report


def run_tests(limit):
    "What pytest says about the tests marked `gpu`."
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests/test_gpu.py"]
    shared = dict(cwd=ROOT, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    try:
        done = subprocess.run(command, **shared, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return dict(passed=False, said=f"not finished after {limit} s")
    return dict(passed=done.returncode == 0, said=done.stdout[-2000:])


def measure(device, sizes, small):
    "All measurements, as plain data; those that do not fit into the time or memory say so."
    begin = time.perf_counter()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    about = dict(device=name, torch=torch.__version__, small=small)
    found = about | dict(training=[], left_out=[])
    if sizes["tests"]:
        found["tests"] = run_tests(sizes["tests"])
    chip = found["ceilings"] = ceilings(device, sizes)
    lm = gemma(device, sizes, small)
    row, tokens = extraction(lm, device, sizes, chip)
    found["model"] = [row, *evaluation(lm, tokens, device, sizes, chip)]
    del lm
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for method, d_sae, batch in product(METHODS, sizes["widths"], sizes["batches"]):
        case = f"{method}, {d_sae:,} latents, batches of {batch:,}"
        if time.perf_counter() - begin > sizes["limit"]:
            found["left_out"].append(f"{case}: no time left")
            continue
        try:
            step = training_step(method, sizes["d_in"], d_sae, batch, device, sizes, chip)
            found["training"].append(step)
        except torch.OutOfMemoryError:
            found["left_out"].append(f"{case}: the device has too little memory")
    return found | dict(seconds=time.perf_counter() - begin)


def table(rows, columns):
    "Rows as a Markdown table; a share is printed in per cent."

    def text(name, value):
        if value is None:
            return ""
        if name.startswith("of_"):
            return f"{value:.0%}"
        if name == "seconds":
            return f"{value:.3g}"
        return f"{value:,.0f}" if isinstance(value, float) else f"{value:,}"

    def line(row):
        cells = (row.get(name) for name in columns)
        texts = (c if isinstance(c, str) else text(n, c) for n, c in zip(columns, cells))
        return f"| {' | '.join(texts)} |"

    heads = (name.replace("_", " ") for name in columns)
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(columns) + "|", *map(line, rows)])


def report(found):
    "The Markdown text."
    chip, ends = found["ceilings"], ("seconds", "of_operations", "of_bytes")
    parts = [
        f"**{found['device']}**, PyTorch {found['torch']}: {chip['operations'] / 1e12:.3g} TFLOP/s "
        f"in a bf16 matrix product, {chip['bytes'] / 1e9:.3g} GB/s in a copy. *of operations* and "
        "*of bytes* are shares of these.",
        table(found["training"], ("method", "d_sae", "batch", "samples_a_second", *ends)),
        table(found["model"], ("what", "tokens_a_second", *ends)),
    ]
    if "tests" in found:
        verdict = "passed" if found["tests"]["passed"] else "FAILED"
        parts.append(f"Tests marked `gpu`: {verdict}.\n\n```\n{found['tests']['said']}\n```")
    parts += [f"Left out: {case}." for case in found["left_out"]]
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description="Results and speed on a GPU")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of gpu.json and gpu.md")
    args = parser.parse_args()
    if not args.small and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here: use --small to see whether the script runs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = measure(device, SMALL if args.small else LARGE, args.small)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (args.out / "gpu.md").write_text(report(found), encoding="utf-8")
    print(report(found))


if __name__ == "__main__":
    main()
