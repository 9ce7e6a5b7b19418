"Several measurements of one SAE encode its rows once, and give what each gives alone."

import pytest
import torch
from small import WORLD

from atm_sae.data.planted import PlantedWorld
from atm_sae.evals.absorption import AbsorptionConfig, word_latents
from atm_sae.evals.constructed import absorbing_sae, letter_world, word_task
from atm_sae.evals.controls import score_and_truth
from atm_sae.evals.metrics import (
    activation_frequency,
    planted_metrics,
    reconstruction_metrics,
    reconstruction_sums,
)
from atm_sae.report.explore import explore_letters
from atm_sae.sae.architectures import SAEConfig
from atm_sae.sae.sae import SAE


class Counting:
    "An SAE that counts the rows it encodes."

    def __init__(self, sae):
        self.sae, self.W_dec, self.decode, self.rows = sae, sae.W_dec, sae.decode, 0

    def encode(self, x):
        self.rows += len(x)
        return self.sae.encode(x)


@pytest.fixture(scope="module")
def letters():
    world = letter_world(4, 64)
    return Counting(absorbing_sae(world, 0.5)), word_task(world, n=20)


def small_sae(d_in=8, d_sae=16):
    return SAE(SAEConfig(d_in, d_sae, architecture="topk", k=3)).requires_grad_(False)


def test_planted_metrics_encode_each_sample_once():
    counted, world = Counting(small_sae()), PlantedWorld(WORLD)
    found = planted_metrics(counted, world, 300)
    assert counted.rows == 300 - found["n_outliers"]
    assert found == planted_metrics(counted.sae, world, 300)


def test_planted_metrics_are_averages_without_outliers():
    sae, world = small_sae(), PlantedWorld(WORLD)
    sae.metadata["max_norm"] = 1.5
    x, _ = world.sample(300, torch.Generator().manual_seed(0))
    assert 0 < reconstruction_metrics(sae, x)["n_outliers"] < 300
    found = planted_metrics(sae, world, 300)
    assert 0 < found["n_outliers"] < 300 and 0 < found["fvu"]


def test_one_pass_gives_averages_and_frequencies():
    counted = Counting(small_sae())
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    x[3] *= 1000
    sums = reconstruction_sums(counted, x, 30)
    assert counted.rows == 99 and sums.n_outliers == 1
    assert sums.metrics() == reconstruction_metrics(counted.sae, x, 30)
    assert torch.equal(sums.frequency(), activation_frequency(counted.sae, x, 30))


def test_words_are_encoded_once_beside_the_truth_and_on_the_page(letters):
    counted, task = letters
    for measure in (
        lambda: score_and_truth(counted, task),
        lambda: explore_letters(counted, task, "SAE", AbsorptionConfig(min_letters=1)),
    ):
        counted.rows = 0
        measure()
        assert counted.rows == len(task.x)


def test_the_page_shows_the_averages_of_the_words(letters):
    counted, task = letters
    explored = explore_letters(counted, task, "SAE", AbsorptionConfig(min_letters=1))
    usual = reconstruction_metrics(counted.sae, task.x)
    assert explored.scores["L0 on the words"] == usual["l0"]
    shown = explored.scores["explained variance on the words"]
    assert shown == pytest.approx(usual["explained_variance"], rel=1e-9)


def test_the_watcher_sees_the_latents_as_they_are_encoded(letters):
    counted, task = letters
    seen = []
    word_latents(counted, task, 7, watch=lambda x, z: seen.append((x, z)))
    x, z = (torch.cat(parts) for parts in zip(*seen))
    alone = [counted.sae.encode(part) for part in task.x.split(7)]
    assert torch.equal(x, task.x) and torch.equal(z, torch.cat(alone))
