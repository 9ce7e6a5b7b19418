"""Several SAEs on one pass over their data, compared with one after the other: CPU seconds.

python benchmarks/many.py            # activations of SmolLM2, cached and streamed
python benchmarks/many.py --quick    # a toy language model
"""

import argparse
import time

import torch

from atm_sae.data.activations import ActivationSpec, get_activations
from atm_sae.data.batches import data_batches
from atm_sae.data.lm import model_width
from atm_sae.train.loop import train_together
from atm_sae.train.runs import make_trainer, recipe

FULL = dict(model="smollm2", layer=14, n_tokens=20_000, d_sae=1024, batch_size=512, steps=2)
FULL |= dict(targets=8)
QUICK = dict(model="nano-gemma2", layer=2, n_tokens=2_000, d_sae=64, batch_size=32, steps=2)
QUICK |= dict(targets=3)


def specs_of(task, data):
    "TopK SAEs that differ in k."
    sizes = (model_width(task["model"]), task["d_sae"])
    numbers = range(4, 4 + 4 * task["targets"], 4)
    return [
        recipe("topk", data, *sizes, k, task["steps"], batch_size=task["batch_size"])
        for k in numbers
    ]


def seconds_of(groups):
    "CPU seconds of training each group of runs on one pass."
    begin = time.process_time()
    for specs in groups:
        first = specs[0]
        batches = data_batches(first.data, first.train.batch_size, first.seed)
        trainers = [make_trainer(spec, batches, None, torch.device("cpu")) for spec in specs]
        for error in train_together(trainers, progress=False):
            if error is not None:
                raise error
    return time.process_time() - begin


def measure(task):
    "[(kind of data, seconds one after the other, seconds together)]"
    settings = {name: task[name] for name in ("model", "layer", "n_tokens")}
    kinds = dict(cached=0, streamed=2 * task["batch_size"])
    rows = []
    for kind, buffer in kinds.items():
        data = ActivationSpec(**settings, buffer=buffer)
        if not buffer:
            get_activations(data)  # made before the clock starts
        specs = specs_of(task, data)
        rows.append((kind, seconds_of([[spec] for spec in specs]), seconds_of([specs])))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a toy model, to test the script")
    task = QUICK if parser.parse_args().quick else FULL
    torch.set_num_threads(1)
    print(f"{task['targets']} TopK SAEs of {task['d_sae']:,} latents, {task['steps']} steps each\n")
    print("| activations | one after the other (CPU s) | one pass (CPU s) | times as fast |")
    print("|---|---|---|---|")
    for kind, alone, together in measure(task):
        print(f"| {kind} | {alone:.1f} | {together:.1f} | {alone / together:.1f} |")


if __name__ == "__main__":
    main()
