"""How long the absorption evaluator takes, how much memory it needs, and how both grow. README.md
beside this file explains the numbers."""

import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import parsed, parser, spread, threads_used, write_readme
from torch.nn import functional as F

from atm_sae.evals import absorption, first_letter
from atm_sae.evals.absorption import AbsorptionConfig, encode_words, evaluate_absorption
from atm_sae.evals.first_letter import LETTERS, get_task, load_task, task_from_activations
from atm_sae.data.activations import ActivationSpec
from atm_sae.artefacts import provenance, write_json
from atm_sae.core import generator
from atm_sae.data.lm import load_lm
from atm_sae.report.tables import to_markdown
from atm_sae.stats import format_number
from atm_sae.sae.sae import SAE, SAEConfig
from atm_sae.train.runs import get_run, recipe

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
MODEL, LAYER, L0 = "nano-gemma2", 2, 32
WORDS = 5420  # all that the model's vocabulary has

# Fixed before the first run. A growth is 'at most linear' if its exponent rounds to 1.0 or less.
SETUP_SECONDS, SCORE_SECONDS, EXPONENT, MEMORY_MIB = 60, 15, 1.05, 3 * 1024

# The functions whose time is told apart; what is left is 'rest'.
SETUP = {
    "model": ["load_lm"],
    "prompts": ["word_vocabulary", "first_letter_prompts", "find_words"],
    "activations": ["read_after_prefix"],
    "probes": ["fit_letter_probes"],
}
SCORES = {
    "encode": ["encode_words"],
    "L1 ranking": ["rank_latents"],
    "main latents": ["main_latents"],
    "word scores": ["letter_words"],
    "third score": ["ablation_absorbed"],
}

# ---- clocks, and a process for each measurement


def home_of(function):
    "The module that calls this function: the task's or the scores'."
    return first_letter if function in sum(SETUP.values(), []) else absorption


@contextmanager
def stopwatch(steps):
    "Seconds in all and in each step, while this is open; a step is a list of functions."
    spent = dict.fromkeys(["total", *steps, "rest"], 0.0)
    home = {f: home_of(f) for names in steps.values() for f in names}
    real = {f: getattr(module, f) for f, module in home.items()}

    def timed(step, function):
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[step] += time.perf_counter() - start

        return call

    for step, names in steps.items():
        for f in names:
            setattr(home[f], f, timed(step, real[f]))
    start = time.perf_counter()
    try:
        yield spent
    finally:
        spent["total"] = time.perf_counter() - start
        spent["rest"] = 2 * spent["total"] - sum(spent.values())
        for f, function in real.items():
            setattr(home[f], f, function)


def repeated(f, steps, n):
    "What f() returns, and the seconds of n calls by step."
    seconds = []
    for _ in range(n):
        with stopwatch(steps) as spent:
            result = f()
        seconds.append(spent)
    return result, seconds


def _in_child(measure, args, threads):
    torch.set_num_threads(threads)
    found, seconds = measure(*args)
    machine = provenance()
    return found | dict(seconds=seconds, peak_mib=machine["peak_memory_mib"]), machine


def new_process():
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


class Bench:
    """Runs measurements one after the other, each in a fresh process (unless one is given), so
    that neither caches nor peaks of memory mix."""

    def __init__(self, threads, process=None):
        self.threads, self.process, self.records, self.machine = threads, process, [], None

    def prepare(self, function, *args):
        "What a function returns that makes something for the measurements; its time is no result."
        with nullcontext(self.process) if self.process else new_process() as process:
            return process.submit(function, *args).result()

    def __call__(self, part, measure, *args):
        with nullcontext(self.process) if self.process else new_process() as process:
            record, self.machine = process.submit(_in_child, measure, args, self.threads).result()
        self.records.append(dict(part=part) | record)
        print(
            f"{part}: {describe(record)}, {spread(totals(record), 2)} s, {record['peak_mib']} MiB",
            flush=True,
        )
        return record


# ---- what is measured


def measure_setup(cache, max_words):
    "The task from nothing, `cache` being an empty folder."
    os.environ["ATM_SAE_CACHE"] = str(cache)
    task, seconds = repeated(lambda: get_task(MODEL, LAYER, max_words=max_words), SETUP, 1)
    return dict(words=len(task.words)), seconds


def cached_task(cache):
    "The task that `measure_setup` left behind."
    (file,) = Path(cache).glob("tasks/*/task.json")
    return load_task(file.parent)


def word_sae(task, d_sae, seed=0, l0=L0):
    """An untrained TopK SAE whose latents carry words: rows of a word plus half of another one,
    and the 26 letters' directions."""
    sae, mean = SAE(SAEConfig(task.d_in, d_sae, "topk", k=l0, seed=seed)), task.x.mean(0)
    one, other = torch.randint(len(task.x), (2, d_sae), generator=generator(seed, "benchmark"))
    rows = F.normalize(task.x[one] - mean + (task.x[other] - mean) / 2, dim=1)
    rows[:26] = task.directions
    for parameter, value in {sae.W_dec: rows, sae.W_enc: rows.T, sae.b_dec: mean}.items():
        parameter.data.copy_(value)
    return sae


def measure_scores(sae, task, n, lm=None):
    """Scores of `sae`; few words leave few letters with a good probe, so every letter that has
    one counts."""
    config = AbsorptionConfig(min_f1=0, min_letters=1)

    def scores():
        # a copy of the task, since a task keeps what was computed from it once
        return evaluate_absorption(sae, replace(task), config, lm=lm)

    result, seconds = repeated(scores, SCORES, n)
    z, _ = encode_words(sae, task.x)
    asked = int((result.words.silent & ~result.words.detected).sum()) if lm else None
    return dict(
        words=len(task.words),
        letters=len(result.letters),
        d_sae=z.shape[1],
        l0=z.nnz / z.shape[0],
        asked=asked,
    ), seconds


def measure_growth(cache, d_sae, n, sae_cache=None):
    """Two scores of an SAE made from the words of one task (by default the same) on the words
    of another."""
    return measure_scores(word_sae(cached_task(sae_cache or cache), d_sae), cached_task(cache), n)


def measure_three(cache, sae_folder, d_sae, n):
    "Three scores, of a trained SAE or (without folder) an untrained one."
    task = cached_task(cache)
    return measure_scores(
        SAE.load(sae_folder) if sae_folder else word_sae(task, d_sae), task, n, load_lm(MODEL)
    )


def trained_folder(d_sae, steps):
    "The folder of a TopK SAE, trained if it is not in the cache; how long that takes is no result."
    spec = recipe("topk", ActivationSpec(MODEL, LAYER), 128, d_sae, l0=8, steps=steps)
    return str(get_run(spec, device="cpu").folder / "sae")


def large_task(n_words, d_in=128, seed=0):
    """A task of random words: the direction of its letter, of length 1, plus noise of its own
    with deviation 0.2."""
    g = generator(seed, "large")
    directions = torch.linalg.qr(torch.randn(d_in, d_in, generator=g)).Q[:26]
    letter = torch.randint(26, (n_words,), generator=g)
    words = pd.DataFrame(
        {
            "text": [f"{LETTERS[k].lower()}{i}" for i, k in enumerate(letter)],
            "letter": [LETTERS[k] for k in letter],
        }
    )
    return task_from_activations(
        directions[letter] + 0.2 * torch.randn(n_words, d_in, generator=g),
        words,
        model="random words",
    )


def measure_large(n_words, d_sae, n):
    "Two scores of a wide SAE on many words, and before that the task's probes."
    with stopwatch({}) as spent:
        task = large_task(n_words)
    found, seconds = measure_scores(word_sae(task, d_sae), task, n)
    return found | dict(task_seconds=spent["total"]), seconds


# ---- tables


def totals(record):
    return [s["total"] for s in record["seconds"]]


def median(record, step="total"):
    return statistics.median(s[step] for s in record["seconds"])


def describe(record):
    return ", ".join(
        f"{k} {format_number(record[k])}"
        for k in ("words", "letters", "d_sae", "l0", "asked")
        if record.get(k) is not None
    )


def exponent(records, size):
    """The slope of log(seconds) against log(size), over all sizes and over the three largest;
    the larger of the two is judged."""

    def slope(part):
        return float(
            np.polyfit(np.log([r[size] for r in part]), np.log([median(r) for r in part]), 1)[0]
        )

    return slope(records), slope(records[-3:])


def verdict(what, found, target, met):
    return {
        "what": what,
        "measured": found,
        "target": target,
        "verdict": "met" if met else "NOT met",
    }


def within_seconds(what, record, limit):
    if record.get("asked") == 0:
        return verdict(what, "the third score asked for no word", f"{limit} s", False)
    return verdict(what, f"{spread(totals(record), 2)} s", f"{limit} s", median(record) <= limit)


def linear(what, records, size):
    every, last = exponent(records, size)
    return verdict(
        what,
        f"{every:.2f}; three largest {last:.2f}",
        "at most linear",
        max(every, last) <= EXPONENT,
    )


def within_memory(what, record):
    return verdict(
        what,
        f"{record['peak_mib']} MiB",
        f"under {MEMORY_MIB} MiB",
        record["peak_mib"] < MEMORY_MIB,
    )


def step_table(records, *sizes):
    "One row for each record: sizes, median seconds of each step, range of the whole, peak memory."
    used = [step for step in records[0]["seconds"][0] if any(median(r, step) for r in records)]
    return to_markdown(
        pd.DataFrame(
            [
                {k: r[k] for k in sizes}
                | {"seconds" if s == "total" else s: round(median(r, s), 3) for s in used}
                | {
                    "range": f"{min(totals(r)):.2f} to {max(totals(r)):.2f}",
                    "peak MiB": r["peak_mib"],
                }
                for r in records
            ]
        )
    )


def machine_line(m, threads, repeats):
    "Where the numbers come from, without names of hosts or folders."
    versions = ", ".join(
        f"{p} {m['packages'][p]}" for p in ("torch", "numpy", "scipy", "transformers")
    )
    commit = (
        f"commit {m['git_sha'][:12]}{' with changes' if m['git_dirty'] else ''}"
        if m["git_sha"]
        else "no commit"
    )
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['platform']}; {threads_used(threads)}, "
        f"median of {repeats} [least, most]. "
        f"atm_sae {m['atm_sae']} ({commit}), Python {m['python']}, {versions}."
    )


# ---- the whole


def joined(setups):
    "Repetitions in several processes as one record."
    return setups[0] | dict(
        seconds=[s for r in setups for s in r["seconds"]],
        peak_mib=max(r["peak_mib"] for r in setups),
    )


def run(
    bench,  # a Bench
    repeats,  # of each measurement
    width,  # latents, where they do not grow
    sizes,  # latents, where they do
    word_counts,  # numbers of words, the largest last
    large,  # words and latents of the last measurement
    steps,  # of the trained SAE; 0 leaves it out
):
    "All measurements; verdicts and the report in Markdown."
    setups, three = [], {}
    with tempfile.TemporaryDirectory() as work:

        def cache(n, i=0):
            return Path(work) / f"{n}-{i}"

        for n in word_counts:
            records = [bench("set-up", measure_setup, cache(n, i), n) for i in range(repeats)]
            setups.append(joined(records))
        full = cache(word_counts[-1])
        three["untrained"] = bench("three scores", measure_three, full, None, width, repeats)
        if steps:
            folder = bench.prepare(trained_folder, width, steps)
            three["trained"] = bench(
                "three scores, trained", measure_three, full, folder, width, repeats
            )
        growth = [bench("latents", measure_growth, full, d, repeats) for d in sizes]
        by_words = [
            bench("words", measure_growth, cache(n), width, repeats, full) for n in word_counts
        ]
        big = bench("large", measure_large, *large, 1)
    verdicts = all_verdicts(setups, three, growth, by_words, big)
    above = machine_line(bench.machine, bench.threads, repeats)
    return verdicts, rendered(above, verdicts, setups, three, growth, by_words, big)


def all_verdicts(setups, three, growth, by_words, big):
    "Each measurement against its target."
    width = three["untrained"]["d_sae"]
    scored = [
        within_seconds(f"three scores of an SAE with {width} latents, {which}", r, SCORE_SECONDS)
        for which, r in three.items()
    ]
    setup, wide = setups[-1], growth[-1]
    return [
        within_seconds(f"task from nothing, {setup['words']} words", setup, SETUP_SECONDS),
        *scored,
        linear("two scores over latents, exponent", growth, "d_sae"),
        linear("task over words, exponent", setups, "words"),
        linear("two scores over words, exponent", by_words, "words"),
        within_memory(f"memory, {wide['d_sae']} latents, {wide['words']} words", wide),
        within_memory(f"memory, {big['d_sae']} latents, {big['words']} words", big),
    ]


def rendered(above, verdicts, setups, three, growth, by_words, big):
    "The report in Markdown."
    scored = [dict(sae=which) | r for which, r in three.items()]
    blocks = [
        above,
        "**Targets**",
        to_markdown(pd.DataFrame(verdicts)),
        "**The task from nothing**",
        step_table(setups, "words"),
        "**Three scores**",
        step_table(scored, "sae", "d_sae", "l0", "asked"),
        f"**Two scores over latents**, L0 = {L0}",
        step_table(growth, "d_sae", "l0"),
        f"**Two scores over words**, {three['untrained']['d_sae']} latents",
        step_table(by_words, "words", "letters"),
        "**A wide SAE on many words**, measured once",
        step_table([big], "words", "d_sae", "l0", "task_seconds"),
    ]
    return "\n\n".join(blocks).replace("\n\n\n", "\n\n")


def arguments():
    "The command line."
    command_line = parser(__doc__, repeat=3, threads=1)
    command_line.add_argument("--json", metavar="FILE", help="write every single number here")
    return parsed(command_line)


def main():
    args = arguments()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(args.threads)  # for the children
    bench = Bench(args.threads)
    if args.quick:
        with new_process() as bench.process:
            verdicts, report = run(bench, 1, 256, [128, 256], [150, 300], (500, 256), 0)
    else:
        verdicts, report = run(
            bench,
            args.repeat,
            2048,
            [2**i for i in range(10, 17)],
            [500, 1000, 2000, WORDS],
            (50_000, 2**16),
            500,
        )
    print(f"\n{report}")
    if args.json:
        write_json(
            args.json,
            dict(
                verdicts=verdicts,
                records=bench.records,
                machine=bench.machine,
                threads=args.threads,
            ),
        )
    if args.write:
        write_readme(report, BEGIN, END)


if __name__ == "__main__":
    main()
