"What experiment notebooks share."

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from atm_sae.core import pick_device
from atm_sae.data.activations import ActivationSpec, get_activations
from atm_sae.data.batches import cached_batches, held_out_activations
from atm_sae.data.planted import PlantedWorld, WorldConfig
from atm_sae.evals.absorption import (
    SAEBENCH_THRESHOLDS,
    best_single_latent_f1,
    evaluate_absorption,
    word_latents,
)
from atm_sae.evals.metrics import planted_metrics, reconstruction_metrics
from atm_sae.report.experiment import (
    Experiment,
    bfloat16_gap,
    bfloat16_rounding,
    implied_l0,
    letter_scores,
    log_log_at,
    plain_log_ticks,
    planted_scores,
    published_scores,
    ranking_sentence,
    training_passes,
    training_rows,
)
from atm_sae.train.runs import get_run, recipe


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "cache"))
    return Experiment("nano-gemma2", 1, 4000, dict(dtype="float32"), str(tmp_path / "out"))


def test_folder_and_data(experiment, tmp_path):
    assert (tmp_path / "out" / "tables").is_dir() is False
    assert experiment.folder == tmp_path / "out" and (tmp_path / "out" / "tables").is_dir()
    spec = ActivationSpec(model="nano-gemma2", layer=1, n_tokens=4000, dtype="float32")
    assert experiment.data == spec


def test_held_out_rows_tokens_and_model(experiment):
    assert experiment.held_out(30).equal(held_out_activations(experiment.data, 30))
    context = experiment.data.context
    assert experiment.fresh_tokens(context + 1).shape == (2, context)
    assert experiment.lm().device.type == pick_device().type


def test_passes_are_those_of_the_reader(experiment):
    "A batch is more than a quarter of the rows, so a pass has three batches and leaves rows out."
    rows, steps, batch_size = training_rows(experiment.data), 10, 1000
    reader = cached_batches(get_activations(experiment.data), batch_size, seed=0)
    for _ in range(steps):
        next(reader)
    assert training_passes(rows, steps, batch_size) == pytest.approx(10 / 3) and reader.epoch == 3
    assert steps * batch_size < 3 * rows
    with pytest.raises(ValueError, match="batch_size 4000 does not fit"):
        training_passes(rows, steps, 4000)
    with pytest.raises(ValueError, match="buffer is 64, and a stream has no passes"):
        training_rows(ActivationSpec(model="nano-gemma2", layer=1, n_tokens=4000, buffer=64))


def test_runs_have_the_methods_targets_and_seeds(experiment):
    settings = dict(d_sae=16, steps=2, batch_size=32)
    runs = experiment.runs(["random"], [2, 4], [0, 1], **settings)
    assert [(run.spec.l0, run.spec.seed) for run in runs] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    runs[0].sae.save(experiment.folder / "sae")
    with pytest.raises(ValueError, match="'random' was not trained in a planted world"):
        planted_scores(runs[0], 100)
    own, foreign = experiment.runs(
        ["random"], [2], [0], pretrained=[str(experiment.folder / "sae")], **settings
    )
    assert own.folder == runs[0].folder and foreign.folder is None


def test_planted_scores_are_those_of_the_runs_own_world(tmp_path, monkeypatch):
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path))
    data = WorldConfig(seed=3)
    run = get_run(recipe("topk", data, data.d_in, 256, l0=4, steps=3, seed=3, batch_size=64))
    expected = planted_metrics(run.sae, PlantedWorld(data), n=500, seed=10_003)
    assert expected.pop("n_outliers") == 0
    assert planted_scores(run, 500) == pytest.approx(expected, nan_ok=True)


@pytest.mark.filterwarnings("ignore")  # after a few steps the scores mean nothing
def test_letter_scores_are_those_of_the_evaluators(experiment):
    "The numbers of both protocols, reconstruction, and the mask rate of the run."
    (run,) = experiment.runs(["topk+atm"], [8], [0], d_sae=128, steps=20, batch_size=256)
    task, x = experiment.task(600), experiment.held_out(200)
    words = word_latents(run.sae, task)
    exact = evaluate_absorption(run.sae, words, SAEBENCH_THRESHOLDS)
    scores = letter_scores(run, [words], exact, x)
    released = evaluate_absorption(run.sae, words, protocol="saebench").metrics
    assert exact.metrics.items() | released.items() <= scores.items()
    core = reconstruction_metrics(run.sae, x)
    for name in ("explained_variance", "dead_share", "l0"):
        assert scores[name] == core[name]
    assert scores["letter_f1"] == best_single_latent_f1(run.sae, words).f1.mean()
    assert 0 < scores["mask_rate"] == run.history.table.mask_rate.mean()


def test_published_scores_without_an_l0():
    published = published_scores("saebench_full_absorption")
    assert published.metric.nunique() == 1
    assert np.isnan(published.l0[published.method == "atm"]).all()


def values(**of_methods):
    "Published values of one metric; a pair is a value and its L0."
    pairs = [v if isinstance(v, tuple) else (v, np.nan) for v in of_methods.values()]
    value, l0 = zip(*pairs)
    return pd.DataFrame(dict(method=list(of_methods), metric="mse", value=value, l0=l0))


def test_which_published_values_are_bfloat16_numbers():
    assert [bfloat16_gap(v) for v in (0.5, 0.99, 1, 0.0898)] == [2**-8, 2**-8, 2**-7, 2**-11]
    rounding = bfloat16_rounding(values(atm=0.5508, topk=0.5526, jumprelu=1.671875))
    assert rounding.fits.tolist() == [True, False, True]
    assert rounding.nearest.tolist() == [141 / 256, 141 / 256, 1.671875]
    assert rounding.chance.tolist() == pytest.approx([256e-4, 256e-4, 128e-6])


def test_published_reconstruction_fits_bfloat16():
    for metric in ("mse_saebench", "cosine"):
        assert bfloat16_rounding(published_scores(metric, "reconstruction")).fits.all()
    probing = published_scores("sae_top_1_test_accuracy", "probing")
    assert not bfloat16_rounding(probing).fits.any()


def test_lines_on_log_axes():
    "From 1 at 10 to 0.01 at 1,000: 0.1 at 100, the square root of 0.001 at 316."
    points = [0.01, 1], [1000, 10]
    assert log_log_at(0.1, *points) == pytest.approx(100)
    assert log_log_at(10**-1.5, *points) == pytest.approx(10**2.5)
    assert log_log_at(1, *points) == pytest.approx(10)
    assert np.isnan(log_log_at(1.1, *points)) and np.isnan(log_log_at(0.009, *points))


def test_the_l0_that_an_error_implies():
    "Errors 2, 0.5 and 0.125 at L0 16, 64 and 256; rounding moves each by 1 in 256."
    published = values(standard=(0.125, 256.0), atm=0.5, jumprelu=(2.0, 16.0))
    l0, low, high = implied_l0(published)
    assert l0 == pytest.approx(64)
    assert (low, high) == pytest.approx((63.5, 64.5), abs=0.01)
    cosines = values(standard=(0.875, 256.0), atm=0.75, jumprelu=(0.5, 16.0))
    assert implied_l0(cosines, perfect=1)[0] == pytest.approx(64)
    between = "standard", "jumprelu"
    assert implied_l0(published, between=between) == pytest.approx((l0, low, high))
    assert np.isnan(
        implied_l0(values(standard=(0.125, 256.0), atm=3.0, jumprelu=(2.0, 16.0)))
    ).all()
    edge = implied_l0(values(standard=(0.125, 256.0), atm=2.0, jumprelu=(2.0, 16.0)))
    assert edge[0] == pytest.approx(16) and np.isnan(edge[1:]).all()


def test_the_l0_of_the_published_atm():
    squared = implied_l0(published_scores("mse_saebench", "reconstruction"))
    cosine = implied_l0(published_scores("cosine", "reconstruction"), perfect=1)
    assert squared[0] == pytest.approx(4180, rel=0.002)
    assert cosine[0] == pytest.approx(3930, rel=0.002)
    assert cosine[1] < squared[1] < squared[0] < squared[2] < cosine[2]


def test_ranking_puts_the_highest_first():
    summary = pd.DataFrame(
        dict(method=["atm", "topk", "topk"], sparsity=[4, 4, 8], mean=[0.1, 0.2, 0.3])
    ).assign(metric="fvu", low=np.nan, high=np.nan, n=1, l0=4.0)
    line = ranking_sentence(summary, "fvu", 4)
    assert line == "- at L0 4: TopK 0.200 (n = 1) (L0 4), ATM 0.100 (n = 1) (L0 4)."


def test_ticks_lie_near_the_values():
    fig, ax = plt.subplots()
    ax.set_yscale("log")
    plain_log_ticks(ax.yaxis, (0.1, 0.2, 0.4, 0.8), [0.21, 0.3], slack=1.1)
    assert ax.get_yticks().tolist() == [0.2]
    ax.set_xscale("log")
    plain_log_ticks(ax.xaxis, (0.001, 0.1, 10, 10_000), (0.001, 10_000))
    fig.canvas.draw()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.001", "0.1", "10", "10,000"]
    plt.close(fig)
