"Two processes that share each batch train the dictionary that one trains alone; what they must not do differently is found."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from atm_sae.core import ALONE, Ranks
from atm_sae.sae import batch_topk
from atm_sae.train import METHODS, get_run
from test_train import cache, small   # cache is a fixture of every test  # noqa: F401

BOUND = 1e-4   # on any weight after 40 steps: two ranks sum in another order, and Adam divides by small numbers

def torchrun(code, *args, ranks=2, fails=False):
    "Run Python code in several processes that talk through gloo; returns what they print."
    script = Path(os.environ['ATM_SAE_CACHE']).parent/'ranks.py'
    script.write_text(code)
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([os.path.dirname(__file__), *sys.path]), CUDA_VISIBLE_DEVICES='')
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={ranks}', script, *map(str, args)],
                          env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stdout + done.stderr

OPERATIONS = '''
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
'''

def test_operations_by_hand():
    said = torchrun(OPERATIONS, fails=True)
    a, b = sorted((json.loads(p.partition('END')[0]) for p in said.split('OUT')[1:]), key=lambda o: o['rank'])
    for name, value in dict(sum=[[4, 5], [9, 12]], mean=[[2, 2.5], [4.5, 6]], low=[[1, 0], [2, 4]], high=[[3, 5], [7, 8]]).items(): assert a[name] == b[name] == value
    assert a['gather'] == b['gather'] == [[1, 5], [2, 8], [3, 0], [7, 4]] and (a['share'], b['share']) == ([[0, 1], [2, 3]], [[4, 5], [6, 7]])
    assert (a['top'], b['top']) == ([[0, 5], [0, 8]], [[0, 0], [7, 4]]) and a['kept'] == [[1, 5], [2, 8]]   # 8, 7, 5, 4 are the four largest of all
    assert 'the ranks disagree about the weather: rank 0 has fine, rank 1 has bad. Start all with the same command' in said

def test_alone_nothing_happens():
    x = torch.randn(4, 6)
    assert ALONE.sum(x) is x and ALONE.low(x) is x and ALONE.gather(x) is x and ALONE.share(x) is x
    assert torch.equal(batch_topk(x, 2, Ranks()), batch_topk(x, 2))

TRAIN = '''
import sys
from atm_sae.train import get_run
from test_ranks import SPECS
for spec in SPECS: get_run(spec)
'''
SPECS = [small(m) for m in METHODS if m != 'random'] + [small('atm', per='sample'), small('topk+atm', rescale=True), small('standard', penalty='tanh')]

def test_two_ranks_train_what_one_trains(cache, monkeypatch, tmp_path):
    torchrun(TRAIN)
    two = [get_run(s) for s in SPECS]                       # made by the ranks, so only loaded here
    monkeypatch.setenv('ATM_SAE_CACHE', str(tmp_path/'alone'))
    for run in two:
        one = get_run(run.spec)
        for n, w in one.sae.state_dict().items(): assert (run.sae.state_dict()[n] - w).abs().max() <= BOUND, (run.spec.name, n)
        assert (run.history.table.l0 - one.history.table.l0).abs().max() <= .05 and run.history.table.tokens.equals(one.history.table.tokens)
        assert (run.history.table.fvu - one.history.table.fvu).abs().max() <= 1e-3
