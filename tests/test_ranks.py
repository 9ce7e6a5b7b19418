"""Two processes that share each batch train the dictionary that one trains alone; what they must
not do differently is found."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from forks import Fork, forked_ranks
from small import make, make_and_die, make_when, small, steps_beside

from atm_sae.data.activations import ActivationSpec
from atm_sae.data.planted import PlantedWorld, WorldBatches
from atm_sae.data.text import python_docs
from atm_sae.methods import METHODS
from atm_sae.ranks import ALONE, Ranks
from atm_sae.sae.architectures import ARCHITECTURE_CLASSES
from atm_sae.sae.losses import batch_topk
from atm_sae.sae.sae import SAE
from atm_sae.train import runs as module
from atm_sae.train.loop import train
from atm_sae.train.runs import get_run, is_complete, recipe, run_folder

pytestmark = pytest.mark.usefixtures("cache")
# On any weight after 40 steps: two ranks sum in another order, and Adam divides by small numbers.
BOUND = 1e-4


def together(function, *args):
    "What a function returns in each of two ranks."
    ended = forked_ranks(function, *args)
    assert not any(e.status for e in ended), "\n".join(e.said[-3000:] for e in ended)
    return [e.value for e in ended]


def failing(function, *args):
    "What two ranks print, of which one fails at least."
    ended = forked_ranks(function, *args)
    assert any(e.status for e in ended)
    return "\n".join(e.said for e in ended)


def operations():
    "Each operation on a small tensor."
    r = Ranks.join()
    mine = torch.tensor([[[1.0, 5.0], [2.0, 8.0]], [[3.0, 0.0], [7.0, 4.0]]])[r.rank]
    whole = torch.arange(8.0).view(4, 2)
    r.agree("the weather", "fine")
    r.wait()
    found = dict(sum=r.sum(mine), mean=r.mean(mine), low=r.low(mine), high=r.high(mine))
    found |= dict(share=r.share(whole), gather=r.gather(mine), top=batch_topk(mine, 1, r))
    return {name: t.tolist() for name, t in found.items()} | dict(kept=mine.tolist())


def test_operations_by_hand():
    a, b = together(operations)
    for name, value in dict(
        sum=[[4, 5], [9, 12]],
        mean=[[2, 2.5], [4.5, 6]],
        low=[[1, 0], [2, 4]],
        high=[[3, 5], [7, 8]],
        gather=[[1, 5], [2, 8], [3, 0], [7, 4]],
    ).items():
        assert a[name] == b[name] == value
    assert (a["share"], b["share"]) == ([[0, 1], [2, 3]], [[4, 5], [6, 7]])
    # 8, 7, 5, 4 are the four largest of all
    assert (a["top"], b["top"]) == ([[0, 5], [0, 8]], [[0, 0], [7, 4]])
    assert a["kept"] == [[1, 5], [2, 8]]


def disagree():
    ranks = Ranks.join()
    ranks.agree("the weather", ["fine", "bad"][ranks.rank])


def test_a_disagreement_is_told_by_every_rank():
    said = failing(disagree)
    why = (
        "the ranks disagree about the weather: rank 0 has fine, rank 1 has bad. Start all with the"
    )
    assert said.count(f"RuntimeError: {why} same command") == 2


def test_alone_nothing_happens():
    x = torch.randn(4, 6)
    assert ALONE.sum(x) is x and ALONE.low(x) is x and ALONE.gather(x) is x and ALONE.share(x) is x
    assert torch.equal(batch_topk(x, 2, Ranks()), batch_topk(x, 2))


STEPS = 24  # beyond the warm-ups, the first snapshot and a checkpoint
SPECS = [small(m, STEPS) for m in METHODS if m != "random"] + [
    small("atm", STEPS, per="sample"),
    small("topk+atm", STEPS, rescale=True),
    small("standard", STEPS, penalty="tanh"),
    small("ortsae", STEPS, chunk=4, ortho_every=1),
]
# So sparse that a step skips the zeros; and at the very share where it ceases to, which one rank
# may reach and the other not.
SPECS += [
    recipe(m, SPECS[0].data, d_in=8, d_sae=200, l0=l0, steps=40, batch_size=32)
    for m in (*ARCHITECTURE_CLASSES, "atm")
    for l0 in (4, 16)
]


class Loud(WorldBatches):
    "The longest row of every batch is 150 times as long."

    def __next__(self):
        x = super().__next__()
        x[x.norm(dim=1).argmax()] *= 150
        return x


def train_with_outliers():
    "Count, limit and weights of a run whose batches hold outliers."
    spec, ranks = small("topk"), Ranks.join()
    data = Loud(PlantedWorld(spec.data), spec.train.batch_size, spec.seed)
    sae = SAE(spec.sae)
    history = train(sae, data, spec.train, progress=False, ranks=ranks)
    return history.n_outliers, history.max_norm, sae.W_dec.detach().tolist()


def test_two_ranks_leave_out_the_same_outliers():
    a, b = together(train_with_outliers)
    n, limit, weights = train_with_outliers()
    assert a == b and a[:2] == (n, limit) and n == 40
    assert (torch.tensor(a[2]) - torch.tensor(weights)).abs().max() < BOUND


def largest_difference(one, two):
    "Between the weights of two runs."
    other = two.sae.state_dict()
    return max((other[n] - w).abs().max().item() for n, w in one.sae.state_dict().items())


def test_two_ranks_train_what_one_trains(monkeypatch, tmp_path):
    together(make, SPECS)
    assert all(is_complete(s) for s in SPECS)
    two = [get_run(s) for s in SPECS]  # made by the ranks, so only loaded here
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "alone"))
    for run in two:
        one = get_run(run.spec)
        assert largest_difference(one, run) <= BOUND, run.spec.name
        a, b = one.history.table, run.history.table
        assert a.tokens.equals(b.tokens)
        assert (a.l0 - b.l0).abs().max() <= 0.05 and (a.fvu - b.fvu).abs().max() <= 1e-3


def stream_specs(model, text):
    "A run on stored activations and two on a stream."
    data = ActivationSpec(model=str(model), layer=1, n_tokens=1600, context=32, text=str(text))
    settings = dict(l0=4, steps=20, batch_size=32, log_every=5)
    kinds = [(0, "float32"), (400, "float32"), (400, "bfloat16")]
    return [
        recipe("batchtopk+atm", replace(data, buffer=b, dtype=t), 32, 48, **settings)
        for b, t in kinds
    ]


def test_two_ranks_share_the_work_of_the_model(model_folder, monkeypatch, tmp_path):
    """The model's own numbers depend on how many rows run at once, in the last bits; so the bound
    is that of the weights."""
    lines = [json.dumps(dict(text=text)) for text in python_docs()[:200]]
    (tmp_path / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    specs = stream_specs(model_folder, tmp_path / "text.jsonl")
    together(make, specs)
    two = [get_run(s) for s in specs]
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "alone"))
    for run in two:
        assert largest_difference(get_run(run.spec), run) <= 10 * BOUND, run.spec.data.buffer


def harm(what, rank, step, sae, history):
    "After step 12, seen from the training loop."
    if step == 12 and what == "nan":
        sae.W_dec.data.fill_(torch.nan)
    if step == 12 and what == "weights" and rank:
        sae.W_dec.data[0, 0] += 1e-3


def apart(what):
    "Train with something that is not the same on both ranks, or is not a number on either."
    rank = Ranks.join().rank
    steps = 41 if what == "steps" and rank else 40
    module.train_together = partial(module.train_together, watch=partial(harm, what, rank))
    get_run(small("topk", seed=rank if what == "seed" else 0, steps=steps))


@pytest.mark.parametrize(
    "what, message",
    [
        ("steps", "the ranks disagree about the configuration"),
        ("seed", "the ranks disagree about the configuration"),
        (
            "weights",
            "the ranks disagree about the weights after step 15: start again from the last",
        ),
        (
            "nan",
            "FloatingPointError: step 1[34]: the loss is not finite although the activations are",
        ),
    ],
)
def test_ranks_that_disagree(what, message):
    assert re.search(message, failing(apart, what))


def test_a_batch_that_does_not_split():
    said = failing(make, [small("topk", batch_size=33)])
    assert "a batch of 33 does not split over 2 ranks: choose a multiple" in said


def test_killed_ranks_resume_to_the_bit(monkeypatch, tmp_path):
    spec = small("atm")
    failing(make_and_die, spec, 27)
    assert (run_folder(spec) / "checkpoint.safetensors").exists() and not is_complete(spec)
    together(make, [spec])
    resumed = get_run(spec)
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "straight"))
    together(make, [spec])
    assert largest_difference(get_run(spec), resumed) == 0


def test_ranks_wait_for_a_run_that_another_process_makes(cache):
    "Rank 0 waits for the lock, and the other rank for rank 0. Then both load the run."
    spec, go = small("topk"), cache / "go"
    alone = Fork(make_when, spec, go)
    while not (cache / "locks" / f"runs-{spec.key}.lock").exists():
        assert alone.process.exitcode is None, alone.said()
        time.sleep(0.01)
    assert together(steps_beside, spec, go) == [0, 0]
    assert alone.ended().status == 0, alone.said()


def test_the_command_under_torchrun_prints_once(tmp_path):
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 -m atm_sae.cli train topk"
    options = "--l0 4 --d-sae 64 --steps 10 --batch-size 32 --json --quiet --out"
    done = subprocess.run(
        [sys.executable, *command.split(), *options.split(), tmp_path / "out"],
        env=os.environ | dict(CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('"explained_variance"') == 1, done.stdout
    assert (tmp_path / "out" / "topk-l0_4-seed0" / "cfg.json").exists()


def test_a_rank_says_which_it_is():
    assert repr(ALONE) == "Ranks(0 of 1)"
