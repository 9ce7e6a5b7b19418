"""What ATM's mask adds to the time of a training step, where it hides its usual share of latents:
a part of `training.py`. README.md beside this file explains the numbers."""

import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
from common import sparse_data, spread
from training_worker import Batches

from atm_sae.sae.atm import ATMConfig, ATMMasker
from atm_sae.sae.sae import SAE, SAEConfig
from atm_sae.train.loop import TrainConfig, Trainer, load_checkpoint, save_checkpoint

COST = 1.05  # time of a step with mask over one without; fixed before the first run
USUAL = 0.3, 0.5  # share of latents that ATM hides at a step of the reports' runs
WARM = 0.42  # share at which the warm-up ends; it falls while training goes on
WARM_STEPS, BLOCK = 3000, 10  # most steps of the warm-up, and steps between two looks


class RecordedMasker(ATMMasker):
    "ATM's masker, which also keeps the share of latents that each of its masks hides."

    def __init__(self, *args):
        super().__init__(*args)
        self.hidden = []

    def sample(self, generator, batch=None):
        keep = super().sample(generator, batch)
        self.hidden.append(1 - keep.float().mean())
        return keep

    def shares(self, steps):
        "The shares of the last steps."
        return [share.item() for share in self.hidden[-steps:]]


def make_trainer(task, x, masked):
    "A standard SAE in training, with ATM's mask or without."
    steps = WARM_STEPS + task["steps"] + 1
    sae = SAE(SAEConfig(task["d_in"], task["d_sae"], "standard", l1=task["l1"]))
    config = TrainConfig(
        steps,
        task["batch_size"],
        task["lr"],
        lr_warmup=0,
        lr_decay=0,
        sparsity_warmup=0,
        dead_after=2,
    )
    masker = RecordedMasker(task["d_sae"], ATMConfig(warmup=0), steps) if masked else None
    return Trainer(sae, Batches(x), config, masker)


def check_shares(shares):
    "SystemExit unless each of the masks hides a usual share of latents."
    low, high = USUAL
    if not all(low <= share <= high for share in shares):
        raise SystemExit(
            f"the masks hide {min(shares):.0%} to {max(shares):.0%} of the latents, which is not "
            f"the usual {low:.0%} to {high:.0%}: their cost is not measured. Change the data, the "
            "recipe or the length of the warm-up."
        )


def warm_up(task, x, path):
    "Train with the mask until it hides its usual share; writes the state, returns the steps."
    trainer = make_trainer(task, x, masked=True)
    shares = []
    while trainer.steps < WARM_STEPS:
        for _ in range(BLOCK):
            trainer.step(trainer.read_batch(trainer.steps + 1))
        shares = trainer.masker.shares(BLOCK)
        if all(USUAL[0] <= share <= WARM for share in shares):
            break
    check_shares(shares)
    save_checkpoint(path, trainer.state_dict(), "warm")
    return trainer.steps


def one_round(task, x, path):
    """Steps without and with the mask in turns, both from the state of the warm-up: seconds of
    each, the shares that the masks hid, and the L0 before the mask."""
    trainers = [make_trainer(task, x, masked) for masked in (False, True)]
    for trainer in trainers:
        trainer.load_state_dict(load_checkpoint(path, "warm"))
        trainer.step(trainer.read_batch(trainer.steps + 1))  # not timed
    seconds = [], []
    for i in range(task["steps"]):
        for which in (i % 2, 1 - i % 2):
            begin = time.perf_counter()
            trainers[which].step(trainers[which].read_batch(trainers[which].steps + 1))
            seconds[which].append(time.perf_counter() - begin)
    without, masked = trainers
    shares = masked.masker.shares(task["steps"])
    check_shares(shares)
    l0 = [trainer.sae.encode(x[0]).gt(0).sum(1).float().mean().item() for trainer in trainers]
    return dict(without=seconds[0], masked=seconds[1], shares=shares, l0=l0)


def ratio(found):
    "Median seconds of a step with the mask over those without."
    return statistics.median(found["masked"]) / statistics.median(found["without"])


def table(rounds):
    "The measured cost beside its goal."
    ratios = [ratio(found) for found in rounds]
    shares = [share for found in rounds for share in found["shares"]]
    middle = statistics.median(ratios)
    return pd.DataFrame(
        [
            {
                "what": "ATM: time of a step over standard",
                "measured": spread(ratios),
                "goal": f"at most {COST:g}",
                "verdict": "met" if middle <= COST else "NOT met",
                "seconds without": spread([statistics.median(r["without"]) for r in rounds]),
                "seconds with": spread([statistics.median(r["masked"]) for r in rounds]),
                "share hidden": spread(shares),
                "L0 without": spread([r["l0"][0] for r in rounds], 1),
                "L0 with": spread([r["l0"][1] for r in rounds], 1),
            }
        ]
    )


def alone(function, threads, *args):
    "Run a function of this file in a process of its own."
    with ProcessPoolExecutor(
        1,
        mp_context=get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(threads,),
    ) as pool:
        return pool.submit(function, *args).result()


def measure(task, threads, repeat):
    "(steps of the warm-up, rounds): each round a process of its own."
    x = sparse_data(task)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "warm.safetensors"
        steps = alone(warm_up, threads, task, x, path)
        return steps, [alone(one_round, threads, task, x, path) for _ in range(repeat)]
