"""A GPU gives the numbers of the CPU, up to rounding. These tests need a GPU: `pytest -m gpu`.

Sums have another order there, so weights may differ by 1e-3 of their size after some steps, and
scores by 1e-2."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import WORLD, small
from test_one_device import EVALUATIONS, sae, steps, words  # noqa: F401 (fixtures)

from atm_sae.data.planted import PlantedWorld, WorldBatches
from atm_sae.methods import METHODS
from atm_sae.train.runs import make_trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def close(a, b, bound):
    "AssertionError unless two results are equal within a share, and as much in absolute terms."
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            close(a[name], b[name], bound)
    elif isinstance(a, (tuple, list)):
        assert len(a) == len(b)
        for one, other in zip(a, b):
            close(one, other, bound)
    else:
        a, b = (v.cpu().numpy() if isinstance(v, torch.Tensor) else v for v in (a, b))
        np.testing.assert_allclose(b, a, rtol=bound, atol=bound)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
def test_training(method):
    expected, _ = steps(method, "cpu", 12)
    found, _ = steps(method, "cuda", 12, cpu_masks=True)
    close(dict(expected.sae.state_dict()), dict(found.sae.state_dict()), 1e-3)
    close([list(row) for row in expected.history.rows], [*map(list, found.history.rows)], 1e-2)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation(name, lm, sae, words):  # noqa: F811 (the fixtures)
    run = EVALUATIONS[name]
    on_gpu = replace(lm, model=copy.deepcopy(lm.model).to("cuda"))
    found = run(on_gpu, copy.deepcopy(sae).to("cuda"), words)
    close(run(lm, sae, words), found, 1e-2)


def test_a_run_is_resumed_to_the_last_bit(tmp_path):
    spec = small("topk+atm", precision="fp32")

    def trainer(folder, last):
        batches = WorldBatches(PlantedWorld(WORLD), spec.train.batch_size, spec.seed)
        made = make_trainer(spec, batches, None, torch.device("cuda"), folder)
        made.restore_batches()
        for step in range(made.steps, last):
            made.step(made.read_batch(step + 1))
        return made

    whole = trainer(tmp_path / "whole", 30)
    folder = tmp_path / "stopped"
    folder.mkdir()
    trainer(folder, 20).save()
    resumed = trainer(folder, 30)
    for name, weight in whole.sae.state_dict().items():
        assert torch.equal(weight, resumed.sae.state_dict()[name]), name
