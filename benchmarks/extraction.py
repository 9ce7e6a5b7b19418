"""What extraction costs beside the model's own forward pass, and whether its memory grows with the
text. README.md beside this file explains the numbers."""

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from atm_sae.data import activations
from atm_sae.data.activations import build_cache
from atm_sae.artefacts import atomic_write, provenance
from atm_sae.report.estimate import lm_shape
from atm_sae.data.lm import residual_stream, tiny_lm
from atm_sae.report.tables import to_markdown
from atm_sae.data.text import PackedRows, python_docs

import pandas as pd

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- extraction: begin -->", "<!-- extraction: end -->"
LAYER, CONTEXT = 12, 128  # the paper's
OVERHEAD, GROWTH_MIB = 1.1, 16  # fixed before the first run


def deep_lm():
    "A deep and narrow Gemma-2, of which 13 of 16 blocks are run."
    return tiny_lm(n_layers=16, d_model=256)


def exact_lm():
    "Gemma-2-2b's exact shape with random weights in bfloat16: 2.6 billion parameters."
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        lm_shape("google/gemma-2-2b"), dtype=torch.bfloat16, attn_implementation="eager"
    )
    return replace(tiny_lm(), model=model.eval().requires_grad_(False), name="random-gemma-2-2b")


def rows(lm, n_docs=None):
    return PackedRows(lm.tokenizer, lambda n: iter(python_docs()[n:n_docs]), CONTEXT)


def forward_seconds(lm, n_rows, batch):
    "The model's own pass up to the layer, over the same rows, which are there already."
    tokens = rows(lm).take(n_rows)
    begin = time.perf_counter()
    for part in tokens.split(batch):
        residual_stream(lm, part, LAYER)
    return time.perf_counter() - begin


def extraction_seconds(lm, n_rows, batch):
    "All of it: reading, encoding, packing, the model, checks, writing, checksums."
    with tempfile.TemporaryDirectory() as tmp:
        begin = time.perf_counter()
        build_cache(
            lm,
            rows(lm),
            LAYER,
            f"{tmp}/store",
            dtype="bfloat16",
            batch_size=batch,
            progress=False,
            n_rows=n_rows,
        )
        return time.perf_counter() - begin


def ratios(make_lm, n_rows, batch, rounds, threads):
    "Extraction over forward, round by round, each in both orders, from the least to the most."
    torch.set_num_threads(threads)
    lm, found = make_lm(), []
    forward_seconds(lm, batch, batch)
    extraction_seconds(lm, batch, batch)
    for _ in range(rounds):
        a, b, c, d = (
            f(lm, n_rows, batch)
            for f in (forward_seconds, extraction_seconds, extraction_seconds, forward_seconds)
        )
        found.append((b + c) / (a + d))
    return sorted(found)


def peak_mib(n_rows, threads):
    "The most memory that a process has held that extracts so many rows."
    torch.set_num_threads(threads)
    lm, activations.SHARD_BYTES = (
        tiny_lm(n_layers=2, d_model=64),
        2**24,
    )  # both sizes fill several shards, and go through all of the documents
    with tempfile.TemporaryDirectory() as tmp:
        build_cache(
            lm,
            rows(lm, 640),
            1,
            f"{tmp}/store",
            dtype="bfloat16",
            batch_size=16,
            progress=False,
            n_rows=n_rows,
        )
    return provenance()["peak_memory_mib"]


def alone(function, *args):
    "In a process of its own."
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def ratio_row(name, make_lm, n_rows, batch, rounds, threads):
    "Extraction beside one model, as a line of the table."
    found = alone(ratios, make_lm, n_rows, batch, rounds, threads)
    middle = statistics.median(found)
    return {
        "what": f"extraction over the forward pass to block {LAYER} of {name},"
        f" {n_rows * CONTEXT:,} tokens",
        "measured": f"{middle:.3f} [{found[0]:.3f}, {found[-1]:.3f}]",
        "goal": f"at most {OVERHEAD}",
        "verdict": "met" if middle <= OVERHEAD else "NOT met",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="does it run? the numbers mean nothing"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    a = parser.parse_args()
    n_rows, rounds, sizes = (32, 1, (16, 32)) if a.quick else (256, 5, (4_000, 40_000))
    table = [ratio_row("16, width 256", deep_lm, n_rows, 16, rounds, a.threads)]
    if not a.quick:
        table.append(
            ratio_row(
                "26, Gemma-2-2b's exact shape, random weights in bfloat16",
                exact_lm,
                4,
                2,
                3,
                a.threads,
            )
        )
    few, many = (alone(peak_mib, n, a.threads) for n in sizes)
    table.append(
        {
            "what": f"peak memory at {sizes[0] * CONTEXT:,} and at {sizes[1] * CONTEXT:,} tokens",
            "measured": f"{few} and {many} MiB",
            "goal": f"{GROWTH_MIB} MiB apart at most",
            "verdict": "met" if many - few <= GROWTH_MIB else "NOT met",
        }
    )
    machine = provenance()
    text = (
        f"{time.strftime('%Y-%m-%d')}, {machine['cpu']}, {a.threads} thread, {rounds} rounds (3 of"
        f" the exact shape), median [least, most].\n\n{to_markdown(pd.DataFrame(table))}"
    )
    print(text)
    if not a.write:
        return
    before, _, rest = README.read_text().partition(BEGIN)
    with atomic_write(README) as part:
        part.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
