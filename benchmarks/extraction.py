"""What extraction costs beside the model's own forward pass, and whether its memory grows with the
text. README.md beside this file explains the numbers."""

import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
from common import heading, parsed, parser, spread, threads_used, write_readme

from atm_sae.artefacts import provenance
from atm_sae.data import activations
from atm_sae.data.activations import build_cache
from atm_sae.data.lm import is_fetched, load_lm, residual_stream, tiny_lm
from atm_sae.data.text import PackedRows, open_documents, python_docs
from atm_sae.report.estimate import lm_shape
from atm_sae.report.tables import to_markdown

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


def real_lm():
    "SmolLM2-135M-Instruct in bfloat16, where it was fetched."
    return load_lm("smollm2", "bfloat16")


def write_documents(path, n_docs=None):
    "Write the text as a JSON-lines file: `python_docs` reads its sources once in a process only."
    lines = (json.dumps(dict(text=text)) for text in python_docs()[:n_docs])
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def rows(lm, path):
    "Rows of tokens, read from a file anew each time."
    return PackedRows(lm.tokenizer, lambda n: open_documents(str(path), n), CONTEXT)


def forward_seconds(lm, path, n_rows, batch):
    "The model's own pass up to the layer, over the same rows, which are there already."
    tokens = rows(lm, path).take(n_rows)
    begin = time.perf_counter()
    for part in tokens.split(batch):
        residual_stream(lm, part, LAYER)
    return time.perf_counter() - begin


def extraction_seconds(lm, path, n_rows, batch):
    "All of it: reading, encoding, packing, the model, checks, writing, checksums."
    with tempfile.TemporaryDirectory() as tmp:
        begin = time.perf_counter()
        build_cache(
            lm,
            rows(lm, path),
            LAYER,
            f"{tmp}/store",
            dtype="bfloat16",
            batch_size=batch,
            progress=False,
            n_rows=n_rows,
        )
        return time.perf_counter() - begin


def ratios(make_lm, n_rows, batch, rounds, threads):
    "Extraction over forward, round by round, each in both orders."
    torch.set_num_threads(threads)
    lm, found = make_lm(), []
    with tempfile.TemporaryDirectory() as tmp:
        path = write_documents(Path(tmp) / "documents.jsonl")
        forward_seconds(lm, path, batch, batch)
        extraction_seconds(lm, path, batch, batch)
        for _ in range(rounds):
            a, b, c, d = (
                f(lm, path, n_rows, batch)
                for f in (forward_seconds, extraction_seconds, extraction_seconds, forward_seconds)
            )
            found.append((b + c) / (a + d))
    return found


def peak_mib(n_rows, threads):
    "The most memory that a process has held that extracts so many rows, and its shards."
    torch.set_num_threads(threads)
    activations.SHARD_BYTES = 2**24  # so that both sizes fill several shards
    lm = tiny_lm(n_layers=2, d_model=64)
    with tempfile.TemporaryDirectory() as tmp:
        path = write_documents(Path(tmp) / "documents.jsonl", 640)
        build_cache(
            lm,
            rows(lm, path),
            1,
            f"{tmp}/store",
            dtype="bfloat16",
            batch_size=16,
            progress=False,
            n_rows=n_rows,
        )
        shards = len(list(Path(tmp, "store").glob("*.safetensors")))
    return provenance()["peak_memory_mib"], shards


def alone(function, *args):
    "In a process of its own."
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def ratio_row(name, make_lm, n_rows, batch, rounds, threads):
    "Extraction beside one model, as a line of the table."
    found = alone(ratios, make_lm, n_rows, batch, rounds, threads)
    return {
        "what": f"extraction over the forward pass to block {LAYER} of {name},"
        f" {n_rows * CONTEXT:,} tokens, {rounds} rounds",
        "measured": spread(found),
        "goal": f"at most {OVERHEAD}",
        "verdict": "met" if statistics.median(found) <= OVERHEAD else "NOT met",
    }


def memory_row(sizes, threads):
    "Peak memory at two lengths of text, as a line of the table."
    (few, few_shards), (many, many_shards) = (alone(peak_mib, n, threads) for n in sizes)
    less, more = (f"{n * CONTEXT:,}" for n in sizes)
    return {
        "what": f"peak memory at {less} tokens ({few_shards} shards)"
        f" and at {more} ({many_shards} shards)",
        "measured": f"{few} and {many} MiB",
        "goal": f"{GROWTH_MIB} MiB apart at most",
        "verdict": "met" if many - few <= GROWTH_MIB else "NOT met",
    }


def main():
    args = parsed(parser(__doc__, repeat=5, threads=1))
    n_rows, rounds, sizes = 256, args.repeat, (4_000, 40_000)
    if args.quick:
        n_rows, rounds, sizes = 32, 1, (16, 32)
    table = [ratio_row("16, width 256", deep_lm, n_rows, 16, rounds, args.threads)]
    if not args.quick:
        name = "26, Gemma-2-2b's exact shape, random weights in bfloat16"
        table.append(ratio_row(name, exact_lm, 4, 2, min(rounds, 3), args.threads))
    if is_fetched("smollm2"):
        few = (32, 16, 1) if args.quick else (128, 16, rounds)
        table.append(ratio_row("30, SmolLM2-135M in bfloat16", real_lm, *few, args.threads))
    else:
        print("smollm2 is left out, since it was not fetched: atm-sae fetch smollm2")
    table.append(memory_row(sizes, args.threads))
    head = heading(threads_used(args.threads), "median [least, most]")
    text = f"{head}.\n\n{to_markdown(pd.DataFrame(table))}\n"
    print(text)
    if args.write:
        write_readme(text, BEGIN, END)


if __name__ == "__main__":
    main()
