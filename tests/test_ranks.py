"Two processes that share each batch train the dictionary that one trains alone; what they must not do differently is found."

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atm_sae.data.activations import ActivationSpec
from atm_sae.ranks import ALONE, Ranks
from atm_sae.data.lm import save_lm, tiny_lm
from atm_sae.sae.losses import batch_topk
from atm_sae.data.text import python_docs
from atm_sae.methods import METHODS
from atm_sae.train.runs import get_run, is_complete, recipe, run_folder, run_grid
from test_train import cache, small, training  # cache is a fixture of every test

BOUND = 1e-4  # on any weight after 40 steps: two ranks sum in another order, and Adam divides by small numbers


def torchrun(code, *args, ranks=2, fails=False):
    "Run Python code in several processes that talk through gloo; returns what they print."
    script = Path(os.environ["ATM_SAE_CACHE"]).parent / "ranks.py"
    script.write_text(code)
    env = os.environ | dict(
        OMP_NUM_THREADS="1",
        PYTHONPATH=os.pathsep.join([os.path.dirname(__file__), *sys.path]),
        CUDA_VISIBLE_DEVICES="",
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            script,
            *map(str, args),
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stdout + done.stderr


OPERATIONS = """
import json, torch
from atm_sae.core import Ranks
from atm_sae.sae import batch_topk
r = Ranks.join()
mine = torch.tensor([[1., 5.], [2., 8.]]) if r.rank == 0 else torch.tensor([[3., 0.], [7., 4.]])
whole = torch.arange(8.).view(4, 2)
out = dict(rank=r.rank, sum=r.sum(mine).tolist(), mean=r.mean(mine).tolist(), low=r.low(mine).tolist(), high=r.high(mine).tolist(),
           share=r.share(whole).tolist(), gather=r.gather(mine).tolist(), top=batch_topk(mine, 1, r).tolist(), kept=mine.tolist())
r.agree('the weather', 'fine')
print('OUT' + json.dumps(out) + 'END', flush=True)
r.wait()
r.agree('the weather', ['fine', 'bad'][r.rank])
"""


def test_operations_by_hand():
    said = torchrun(OPERATIONS, fails=True)
    a, b = sorted(
        (json.loads(p.partition("END")[0]) for p in said.split("OUT")[1:]), key=lambda o: o["rank"]
    )
    for name, value in dict(
        sum=[[4, 5], [9, 12]],
        mean=[[2, 2.5], [4.5, 6]],
        low=[[1, 0], [2, 4]],
        high=[[3, 5], [7, 8]],
    ).items():
        assert a[name] == b[name] == value
    assert a["gather"] == b["gather"] == [[1, 5], [2, 8], [3, 0], [7, 4]] and (
        a["share"],
        b["share"],
    ) == ([[0, 1], [2, 3]], [[4, 5], [6, 7]])
    assert (a["top"], b["top"]) == ([[0, 5], [0, 8]], [[0, 0], [7, 4]]) and a["kept"] == [
        [1, 5],
        [2, 8],
    ]  # 8, 7, 5, 4 are the four largest of all
    assert (
        "the ranks disagree about the weather: rank 0 has fine, rank 1 has bad. Start all with the same command"
        in said
    )


def test_alone_nothing_happens():
    x = torch.randn(4, 6)
    assert ALONE.sum(x) is x and ALONE.low(x) is x and ALONE.gather(x) is x and ALONE.share(x) is x
    assert torch.equal(batch_topk(x, 2, Ranks()), batch_topk(x, 2))


TRAIN = """
import sys
from atm_sae.train import get_run
from test_ranks import SPECS
for spec in SPECS: get_run(spec)
"""
SPECS = [small(m) for m in METHODS if m != "random"] + [
    small("atm", per="sample"),
    small("topk+atm", rescale=True),
    small("standard", penalty="tanh"),
]
# so sparse that a step skips the zeros; and at the very share where it ceases to, which one rank may reach and the other not
SPECS += [
    recipe(m, SPECS[0].data, d_in=8, d_sae=200, l0=l0, steps=40, batch_size=32)
    for m in ("topk", "batchtopk", "matryoshka", "jumprelu", "atm")
    for l0 in (4, 16)
]


def test_two_ranks_train_what_one_trains(cache, monkeypatch, tmp_path):
    torchrun(TRAIN)
    two = [get_run(s) for s in SPECS]  # made by the ranks, so only loaded here
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "alone"))
    for run in two:
        one = get_run(run.spec)
        for n, w in one.sae.state_dict().items():
            assert (run.sae.state_dict()[n] - w).abs().max() <= BOUND, (run.spec.name, n)
        assert (
            run.history.table.l0 - one.history.table.l0
        ).abs().max() <= 0.05 and run.history.table.tokens.equals(one.history.table.tokens)
        assert (run.history.table.fvu - one.history.table.fvu).abs().max() <= 1e-3


STREAM = """
import sys
from test_ranks import stream_specs, get_run
for spec in stream_specs(sys.argv[1]): get_run(spec)
"""


def stream_specs(folder):
    data = ActivationSpec(
        model=f"{folder}/model", layer=1, n_tokens=1600, context=32, text=f"{folder}/text.jsonl"
    )
    return [
        recipe(
            "batchtopk+atm",
            replace(data, buffer=b, dtype=t),
            32,
            48,
            l0=4,
            steps=20,
            batch_size=32,
            log_every=5,
        )
        for b, t in ((0, "float32"), (400, "float32"), (400, "bfloat16"))
    ]


def test_two_ranks_share_the_work_of_the_model(cache, monkeypatch, tmp_path):
    "The model's own numbers depend on how many rows run at once, in the last bits; so the bound is that of the weights."
    save_lm(tiny_lm(), tmp_path / "model")
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps(dict(text=d)) + "\n" for d in python_docs()[:200]), encoding="utf-8"
    )
    torchrun(STREAM, tmp_path)
    two = [get_run(s) for s in stream_specs(tmp_path)]
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "alone"))
    for run in two:
        one = get_run(run.spec)
        for n, w in one.sae.state_dict().items():
            assert (run.sae.state_dict()[n] - w).abs().max() <= 10 * BOUND, (
                run.spec.data.buffer,
                n,
            )


APART = """
import sys, torch
from atm_sae.core import Ranks
from test_ranks import small, training
ranks, what = Ranks.join(), sys.argv[1]
spec = small('topk', seed=ranks.rank if what == 'seed' else 0, steps=41 if what == 'steps' and ranks.rank else 40)
step = training._update
def wrong(t, factor):
    step(t, factor)
    if what == 'nan' and t.i == 12: t.sae.W_dec.data.fill_(torch.nan)
    if what == 'weights' and ranks.rank and t.i == 12: t.sae.W_dec.data[0, 0] += 1e-3
training._update = wrong
training.get_run(spec)
"""


@pytest.mark.parametrize(
    "what, message",
    [
        ("steps", "the ranks disagree about the configuration"),
        ("seed", "the ranks disagree about the configuration"),
        (
            "weights",
            "the ranks disagree about the weights after step 15: start again from the last checkpoint",
        ),
        (
            "nan",
            "FloatingPointError: step 1[34]: the loss is not finite although the activations are",
        ),
    ],
)
def test_ranks_that_disagree(what, message):
    assert re.search(message, torchrun(APART, what, fails=True))


def test_a_batch_that_does_not_split():
    said = torchrun(
        "from test_ranks import small, get_run\nget_run(small('topk', batch_size=33))", fails=True
    )
    assert "a batch of 33 does not split over 2 ranks: choose a multiple" in said


KILLED = """
import os, signal, sys
from test_ranks import small, training
from atm_sae.core import Ranks
step, left, ranks = training._train_step, 27, Ranks.join()
def step_and_die(t, x):
    global left
    left -= 1
    if left < 0: os.kill(os.getpid(), signal.SIGKILL)
    return step(t, x)
training._train_step = step_and_die
training.get_run(small('atm'))
"""


def test_killed_ranks_resume_to_the_bit(cache, monkeypatch, tmp_path):
    torchrun(KILLED, fails=True)
    assert (run_folder(small("atm")) / "checkpoint.safetensors").exists() and not is_complete(
        small("atm")
    )
    code = "from test_ranks import small, get_run\nget_run(small('atm'))"
    torchrun(code)
    resumed = get_run(small("atm"))
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "straight"))
    torchrun(code)
    straight = get_run(small("atm"))
    for n, w in straight.sae.state_dict().items():
        assert torch.equal(w, resumed.sae.state_dict()[n]), n


def test_the_command_under_torchrun_speaks_once(tmp_path):
    args = [
        "train",
        "topk",
        "--l0",
        "4",
        "--d-sae",
        "64",
        "--steps",
        "10",
        "--batch-size",
        "32",
        "--json",
        "--quiet",
        "--out",
        str(tmp_path / "out"),
    ]
    said = torchrun(f"import sys; from atm_sae.cli import main; sys.exit(main({args!r}))")
    assert said.count('"explained_variance"') == 1 and (tmp_path / "out" / "cfg.json").exists()


def test_the_executor_torchrun(cache, monkeypatch, tmp_path):
    specs = [small("topk"), small("atm")]
    two = run_grid(specs, progress=False, executor="torchrun:2")
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "alone"))
    for run in two:
        for n, w in get_run(run.spec).sae.state_dict().items():
            assert (run.sae.state_dict()[n] - w).abs().max() <= BOUND
    bad = recipe("topk", small("topk").data, d_in=9, d_sae=16, l0=3, steps=5)
    with pytest.raises(
        RuntimeError,
        match=r'run "topk, L0 3, seed 0" .* failed: RuntimeError: rank [01]: ValueError: the data are 8 wide, but the SAE has d_in = 9',
    ):
        run_grid([bad, small("standard")], progress=False, executor="torchrun:2")
    assert not is_complete(small("standard"))  # an error ends the grid
    for name in ("torchrun:two", "torchrun:0", "processes:2"):
        with pytest.raises(ValueError, match=f"unknown executor '{name}'"):
            run_grid(specs, progress=False, executor=name)
