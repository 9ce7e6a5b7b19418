"Schedules and control by hand; resume bit for bit; runs, grids and their errors."

import errno
import gc
import os
import pickle
import re
import signal
import warnings
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import Fork, forked
from small import FOLLOWING, WORLD, make_and_die, small, steps_taken, weights

from atm_sae.sae.architectures import ARCHITECTURE_CLASSES
from atm_sae.sae.atm import ATMConfig, ATMMasker, make_masker
from atm_sae.artefacts import OutputError, read_json
from atm_sae.core import norm_limit
from atm_sae.sae.architectures import nested_share
from atm_sae.sae.losses import geometric_median
from atm_sae.sae.sae import SAE, SAEConfig
from atm_sae.data.activations import activation_artefact
from atm_sae.data.batches import CacheBatches
from atm_sae.data.planted import PlantedWorld, WorldBatches, WorldConfig
from atm_sae.methods import METHODS, method_parts, twin_method
from atm_sae.ranks import Ranks
from atm_sae.train import loop, runs
from atm_sae.train.loop import (
    COLUMNS,
    L0Control,
    TrainConfig,
    flatten,
    load_checkpoint,
    lr_factor,
    save_checkpoint,
    sparsity_factor,
    state_hash,
    train,
    unflatten,
)
from atm_sae.train.runs import (
    MissedL0,
    Pretrained,
    Run,
    FailedRun,
    default_lr,
    free_memory,
    fresh_activations,
    get_run,
    grid,
    group_runs,
    is_complete,
    measure_l0,
    missed_l0,
    recipe,
    run_folder,
    run_grid,
    train_many,
    twin_rates,
    twin_spec,
    world_grid,
)

pytestmark = pytest.mark.usefixtures("cache")  # every test has a cache of its own


def batches(spec, cls=WorldBatches):
    return cls(PlantedWorld(WORLD), spec.train.batch_size, spec.seed)


def make(spec, folder=None, data=None):
    "Train a spec by hand; returns SAE and history."
    rates, seed = twin_rates(spec), spec.train.seed
    sae = SAE(spec.sae)
    masker = make_masker(spec.atm, spec.sae.d_sae, spec.train.steps, rates=rates, seed=seed)
    return sae, train(sae, data or batches(spec), spec.train, masker, folder, progress=False)


class Fails(WorldBatches):
    "Batches that end in an error at the 28th."

    drawn = 0

    def __next__(self):
        self.drawn += 1
        if self.drawn == 28:
            raise OSError("stopped")
        return super().__next__()


class Spoilt(WorldBatches):
    "The third batch holds a NaN."

    drawn = 0

    def __next__(self):
        self.drawn += 1
        x = super().__next__()
        if self.drawn == 3:
            x[1, 2] = torch.nan
        return x


# ---- the L0 that a run reached


@pytest.mark.parametrize("method", ["jumprelu", "batchtopk", "random"])
def test_the_l0_of_a_run_is_measured_after_training_on_fresh_samples(method, recwarn):
    spec = small(method)
    run, data = get_run(spec), batches(spec)
    for _ in range(40 if spec.trained else 4):
        next(data)
    fresh = torch.cat([next(data) for _ in range(4096 // 32)])
    assert run.l0 == (run.sae.encode(fresh) > 0).sum(1).double().mean().item()
    assert run.l0 == get_run(spec).l0


class Rows:
    "A stand-in for a cache of width 1: rows are -1, the held-out tenth is 1."

    d_in, meta = 1, {"sha256": "none"}

    def __len__(self):
        return 100

    def rows(self, index):
        return torch.where(torch.as_tensor(index) < 90, -1.0, 1.0)[:, None]


def test_the_l0_of_a_cached_run_is_that_of_held_out_rows():
    sae, data = SAE(SAEConfig(1, 4)), CacheBatches(Rows(), 30, seed=0)
    sae.W_enc.data.fill_(1)
    assert (sae.encode(next(data)) > 0).sum() == 0
    assert measure_l0(sae, fresh_activations(data)) == 4


def test_a_run_that_missed_its_target_warns_each_time():
    spec = small("jumprelu", l0_coef=0.0)  # nothing brings the L0 to its target
    text = "jumprelu, L0 3.0, seed 0: reached L0 .* 5% from its target 3: .*raise l0_coef"
    for _ in range(2):
        with pytest.warns(MissedL0, match=text) as caught:
            run = get_run(spec)
        assert str(caught[0].message) == run.missed_l0


def test_a_grid_warns_once_of_all_that_missed():
    specs = [small("jumprelu", l0_coef=0.0, seed=seed) for seed in (0, 1)]
    with pytest.warns(MissedL0) as caught:
        runs = run_grid(specs, workers=1, progress=False)
    assert len(caught) == 1
    assert str(caught[0].message).splitlines() == [run.missed_l0 for run in runs]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_what_to_do(method):
    said = missed_l0("mine", method, 12.3, 8)
    start = "mine: reached L0 12.3, more than 5% from its target 8: "
    assert said.startswith(start) and len(said) > len(start)
    assert missed_l0("mine", method, 8.4, 8) == missed_l0("mine", method, 12.3, None) == ""


def test_no_target_is_no_miss():
    free = replace(small("standard"), sae=SAEConfig(8, 16, l1=0.1))
    for spec in (free, Pretrained("pretrained mine")):
        assert Run(spec, None, None, None, l0=5.0).missed_l0 == ""
    assert Run(small("topk"), None, None, None).missed_l0 == ""  # not known
    assert Run(small("topk"), None, None, None, l0=5.0).missed_l0


# ---- pieces


def test_schedules_by_hand():
    c = TrainConfig(steps=100)
    assert [lr_factor(i, c) for i in (0, 50, 90, 99)] == [0.2, 1, 0.5, 0.05]
    assert [sparsity_factor(i, c) for i in (0, 4, 50)] == [0.1, 0.5, 1]
    flat = TrainConfig(steps=10, lr_warmup=0, lr_decay=0, sparsity_warmup=0)
    assert [lr_factor(i, flat) for i in (0, 9)] == [1, 1] and sparsity_factor(0, flat) == 1


def test_control_by_hand():
    control = L0Control(10)
    control.observe(torch.tensor(20.0))
    assert control.coefficient.item() == pytest.approx(0.1035, abs=1e-4)
    control.observe(torch.tensor(10.0))
    assert control.error.item() == pytest.approx(
        0.9 * 0.6931, abs=1e-4
    ) and control.coefficient.item() == pytest.approx(
        0.05 * 2.71828 ** (0.0347 + 0.05 * 0.6238 + 0.6238), abs=1e-4
    )


def test_control_settles_on_a_toy():
    "An L0 that answers slowly to the coefficient, L0 -> 4 / coefficient, is brought to its target."
    control, l0 = L0Control(20), torch.tensor(200.0)
    for _ in range(600):
        control.observe(l0)
        l0 = 0.95 * l0 + 0.05 * 4 / control.coefficient
    assert l0.item() == pytest.approx(20, rel=0.01)


def test_default_lr():
    assert default_lr(2**14) == 8e-4 and default_lr(2**10, "standard") == pytest.approx(64e-4)


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(steps=0), "at least 1"),
        (dict(lr=0.0), "lr must be positive"),
        (dict(lr_warmup=1.5), "lr_warmup is a share of the steps, 0 to 1, not 1.5"),
        (dict(lr_decay=-0.1), "lr_decay is a share"),
        (dict(sparsity_warmup=float("nan")), "sparsity_warmup is a share"),
        (dict(dead_after=-1), "dead_after is a share of all samples, not -1"),
        (dict(snapshot_steps=(0, 3)), r"snapshot_steps: \[0\] do not lie between 1 and .* 5"),
        (dict(snapshot_steps=(5, 6)), r"snapshot_steps: \[6\]"),
        (dict(frozen=("b_dec", "W_dec")), "frozen: b_dec cannot be frozen: .* W_enc, W_dec"),
    ],
)
def test_config_refuses(settings, text):
    with pytest.raises(ValueError, match=text):
        TrainConfig(**dict(steps=5) | settings)


@pytest.mark.parametrize("steps, moments", [(1, (1,)), (4, (1, 2, 3, 4)), (5, (1, 2, 4, 5))])
def test_snapshots_of_a_short_run_lie_within_it(steps, moments):
    assert recipe("topk", WORLD, 8, 16, l0=3, steps=steps).train.snapshot_steps == moments


# ---- training


def test_training_lowers_the_error_and_folds_the_scale():
    spec = small("topk", steps=200)
    sae, history = make(spec)
    t = history.table
    assert (
        list(t.columns) == list(COLUMNS)
        and t.step.tolist() == list(range(5, 201, 5))
        and t.tokens.iloc[-1] == 6400
    )
    assert t.fvu.iloc[-1] < 0.5 * t.fvu.iloc[0]
    x, _ = PlantedWorld(WORLD).sample(2000, torch.Generator().manual_seed(5))
    fvu = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert fvu.item() == pytest.approx(t.fvu.iloc[-4:].mean(), rel=0.5)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(16), atol=1e-5)


def test_scale_is_measured():
    spec = small("topk", steps=1)
    _, history = make(spec)
    x = next(batches(spec))
    assert history.scale == pytest.approx(x.square().sum(1).mean().item() ** -0.5)


def test_input_scale_does_not_matter():
    class Loud(WorldBatches):
        def __next__(self):
            return 64 * super().__next__()  # a power of two, so that it is exact

    spec = small("standard")
    a, ha = make(spec)
    b, hb = make(spec, data=batches(spec, Loud))
    assert hb.table.fvu.iloc[-1] == pytest.approx(
        ha.table.fvu.iloc[-1], rel=1e-3
    ) and torch.allclose(a.W_dec, b.W_dec, atol=1e-3)


def test_dead_latents_are_counted_and_woken():
    spec = small("topk", steps=60, dead_after=0.1)

    def run(aux):
        sae = SAE(replace(spec.sae, aux_coef=aux))
        sae.b_enc.data[:8] = -0.7  # these latents are rarely active
        history = train(sae, batches(spec), spec.train, progress=False)
        return history.table.dead, sae

    dead, _ = run(0.0)
    woken, _ = run(4.0)
    assert dead.iloc[0] == 0 and dead.max() >= 6
    assert woken.iloc[-1] < dead.iloc[-1]


def test_steered_l0_lands():
    "The planted world in small: asked for 3, within 5%."
    for method, steps in (("atm", 1500), ("jumprelu", 500)):
        spec = recipe(method, WorldConfig(), 64, 80, l0=6, steps=steps, batch_size=64)
        sae = SAE(spec.sae)
        train(
            sae,
            WorldBatches(PlantedWorld(WorldConfig()), 64, 0),
            spec.train,
            make_masker(spec.atm, 80, steps),
            progress=False,
        )
        x, _ = PlantedWorld(WorldConfig()).sample(8000, torch.Generator().manual_seed(1))
        assert (sae.encode(x) > 0).sum(1).float().mean().item() == pytest.approx(6, rel=0.05), (
            method
        )


def test_snapshots():
    _, history = make(small("atm"))
    assert set(history.snapshots) == {10, 30} and history.snapshots[30]["importance"].shape == (16,)


@pytest.mark.parametrize("mask", [{}, dict(draw="nested"), dict(per="sample", rescale=True)])
@pytest.mark.parametrize(
    "method", ["atm", "topk+atm", "batchtopk+atm", "matryoshka+atm", "jumprelu+atm"]
)
def test_a_mask_that_never_hides_learns_the_unmasked_dictionary(method, mask):
    masked, history = make(small(method, r=0.0, warmup=0.0, **mask))
    bare, _ = make(small("standard" if method == "atm" else method.removesuffix("+atm")))
    assert weights(masked) == weights(bare) and history.table.mask_rate.max() == 0
    assert weights(make(small(method, warmup=0.0, **mask))[0]) != weights(bare)  # as r = 1 does not


def test_an_annealed_mask_ends_at_nothing():
    "Of 40 steps the first 4 wait and the last 20 fade; half of the fading is over after 30."
    _, history = make(small("atm", anneal=0.5, snapshot_steps=(20, 30, 40)))
    hidden = {step: s["probability"].sum().item() for step, s in history.snapshots.items()}
    assert hidden[20] > hidden[30] > 0 == hidden[40]
    _, steady = make(small("atm", snapshot_steps=(20, 40)))
    assert (
        steady.snapshots[20]["probability"].sum() == hidden[20]
        and steady.snapshots[40]["probability"].sum() > 0
    )


class Spy(ATMMasker):
    "Notes what each step's training tells it."

    def observe(self, z, contribution, keep=None, active=None):
        self.seen = [*getattr(self, "seen", []), (z, contribution, keep, active)]
        super().observe(z, contribution, keep, active)


@pytest.mark.parametrize("fast", [False, True])
def test_the_masker_is_told_of_the_effect_that_was_asked_for(fast):
    """Rows of the dictionary have unit length, so the norm's part of the contribution is z^2, times
    the share of nested dictionaries."""
    sae = SAE(SAEConfig(8, 60, "matryoshka", k=2))
    masker = Spy(60, ATMConfig(effect="norm", warmup=1.0), 3)
    train(sae, batches(small("matryoshka")), TrainConfig(3, 32, fast=fast), masker, progress=False)
    for z, contribution, keep, active in masker.seen:
        assert (
            (z.ndim == 1) == fast
            and keep.all()
            and torch.allclose(
                contribution, z.square() * active.at(nested_share(sae.architecture)), atol=1e-6
            )
        )
        assert contribution.max() > 0


def test_the_masker_is_told_what_was_hidden_and_not_what_was_enlarged():
    sae, masker = SAE(small("atm").sae), Spy(16, ATMConfig(rescale=True, r=3.0, warmup=0), 10)
    history = train(
        sae, batches(small("atm")), TrainConfig(10, 32, log_every=1), masker, progress=False
    )
    assert {keep.dtype for *_, keep, _ in masker.seen} == {torch.bool}
    assert (
        history.table.mask_rate.tolist()
        == pytest.approx([1 - keep.float().mean().item() for *_, keep, _ in masker.seen])
        and history.table.mask_rate.max() > 0
    )


def test_the_beginning_of_a_matryoshka_does_better_alone():
    "The first quarter of its dictionary against that of a BatchTopK SAE, on the same batches."
    x, _ = PlantedWorld(WORLD).sample(2000, torch.Generator().manual_seed(5))

    def alone(method):
        sae, _ = make(small(method, steps=400))
        z = sae.encode(x) * (torch.arange(16) < 4)
        return ((x - sae.decode(z)).square().sum() / (x - x.mean(0)).square().sum()).item()

    assert alone("matryoshka") < 0.8 * alone("batchtopk")


def test_watch_sees_every_step_and_changes_nothing():
    spec, seen = small("atm", steps=12), []
    bare, _ = make(spec)

    def watch(step, sae, history):
        seen.append((step, len(history.rows), sae, sae.W_dec.detach().clone(), history.scale))

    sae = SAE(spec.sae)
    history = train(
        sae, batches(spec), spec.train, make_masker(spec.atm, 16, 12), progress=False, watch=watch
    )
    steps, rows, saes, dictionaries, scales = zip(*seen)
    assert (
        steps == (*range(1, 13),)
        and rows == (0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 3)
        and {*map(id, saes)} == {id(sae)}
        and {*scales} == {history.scale}
    )
    assert len({d.numpy().tobytes() for d in dictionaries}) == 12 and torch.equal(
        dictionaries[-1], sae.W_dec
    )
    assert weights(sae) == weights(bare)


def test_watch_sees_an_sae_that_takes_scaled_activations():
    spec, seen, x = small("topk"), [], next(batches(small("topk")))
    sae = SAE(spec.sae)
    train(
        sae,
        batches(spec),
        spec.train,
        progress=False,
        watch=lambda step, sae, history: seen.append(
            sae(x * history.scale).detach() / history.scale
        ),
    )
    assert torch.allclose(seen[-1], sae(x), atol=1e-5) and not torch.allclose(
        seen[0], sae(x), atol=1e-2
    )


def test_watch_goes_on_where_a_checkpoint_was(tmp_path):
    spec, seen = small("topk"), []
    with pytest.raises(OSError):
        make(spec, tmp_path, batches(spec, Fails))
    train(
        SAE(spec.sae),
        batches(spec),
        spec.train,
        None,
        tmp_path,
        progress=False,
        watch=lambda step, *_: seen.append(step),
    )
    assert seen == [*range(21, 41)]


# ---- stop and resume


@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
def test_resume_is_bit_exact(method, tmp_path):
    spec = small(method)
    straight, whole = make(spec)
    with pytest.raises(OSError, match="stopped"):
        make(spec, tmp_path, batches(spec, Fails))
    resumed, rest = make(spec, tmp_path)
    assert weights(resumed) == weights(straight)
    assert rest.table.equals(whole.table) and rest.scale == whole.scale
    for step, s in whole.snapshots.items():
        for n, t in s.items():
            assert torch.equal(t, rest.snapshots[step][n])


@pytest.mark.parametrize(
    "settings",
    [
        dict(per="sample"),
        dict(draw="nested"),
        dict(rescale=True),
        dict(anneal=0.5),
        dict(effect="norm"),
        dict(penalty="tanh"),
        dict(method="ortsae", chunk=4, ortho_every=2),
    ],
)
def test_resume_with_other_settings(settings, tmp_path):
    spec = small(**dict(method="atm") | settings)
    straight, whole = make(spec)
    with pytest.raises(OSError):
        make(spec, tmp_path, batches(spec, Fails))
    resumed, rest = make(spec, tmp_path)
    assert weights(resumed) == weights(straight) and rest.table.equals(whole.table)


class Stateless:
    "Batches without a position: all are alike."

    drawn = 0

    def __init__(self, spec, last):
        self.x, self.last = next(batches(spec)), last

    def __iter__(self):
        return self

    def __next__(self):
        self.drawn += 1
        if self.drawn > self.last:
            raise OSError("stopped")
        return self.x.clone()

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}


def test_resume_with_batches_that_have_no_state(tmp_path):
    spec = small("atm")
    straight, whole = make(spec, data=Stateless(spec, 10**6))
    with pytest.raises(OSError, match="stopped"):
        make(spec, tmp_path, Stateless(spec, 27))
    resumed, rest = make(spec, tmp_path, Stateless(spec, spec.train.steps))
    assert weights(resumed) == weights(straight) and rest.table.equals(whole.table)


def test_empty_parts_of_a_state_are_kept():
    state = dict(a={}, b=dict(c={}, d=3))
    assert unflatten(flatten(state)[1]) == state and state_hash(state) != state_hash(
        dict(b=dict(d=3))
    )


def test_resume_after_a_kill():
    spec = small("atm", steps=100)
    killed = forked(make_and_die, spec, 67)
    checkpoint = run_folder(spec) / "checkpoint.safetensors"
    assert killed.status == -signal.SIGKILL and checkpoint.exists() and not is_complete(spec)
    resumed = get_run(spec)
    straight, whole = make(spec)
    assert weights(resumed.sae) == weights(straight) and resumed.history.table.equals(whole.table)
    assert not checkpoint.exists()


@pytest.mark.parametrize("keep", [False, True])
def test_a_finished_training_leaves_no_checkpoint_unless_it_is_to_be_kept(keep, tmp_path):
    spec = small("topk")
    data = batches(spec)
    train(SAE(spec.sae), data, spec.train, None, tmp_path, progress=False, keep_checkpoint=keep)
    assert (tmp_path / "checkpoint.safetensors").exists() == keep


def test_the_checkpoint_of_a_run_stays_until_its_folder_is_written(monkeypatch):
    spec = small("topk")

    def full_disk(*_):
        raise OSError("full")

    monkeypatch.setattr(runs, "_write_run", full_disk)
    with pytest.raises(OSError, match="full"):
        get_run(spec)
    assert (run_folder(spec) / "checkpoint.safetensors").exists()


def test_checkpoint_of_another_configuration(tmp_path):
    spec = small("atm")
    with pytest.raises(OSError):
        make(spec, tmp_path, batches(spec, Fails))
    masks = [
        dict(r=2.0),
        dict(effect="norm"),
        dict(draw="nested"),
        dict(rescale=True),
        dict(anneal=0.1),
    ]
    for other in (
        small("atm", lr=0.5),
        small("atm", penalty="tanh"),
        small("standard"),
        small("topk"),
        *(small("atm", **m) for m in masks),
    ):
        with pytest.raises(ValueError, match="checkpoint of another configuration"):
            make(other, tmp_path)


def test_checkpoint_of_a_dropout_control_with_other_rates(tmp_path):
    spec = small("dropout")

    def resume(rate, data):
        masker = make_masker(spec.atm, spec.sae.d_sae, spec.train.steps, rates=[rate] * 40)
        return train(SAE(spec.sae), data, spec.train, masker, tmp_path, progress=False)

    with pytest.raises(OSError, match="stopped"):
        resume(0.5, batches(spec, Fails))
    with pytest.raises(ValueError, match="checkpoint of another configuration"):
        resume(0.25, batches(spec))
    assert len(resume(0.5, batches(spec)).rows) == 8


def test_how_often_checkpoints_are_written_does_not_change_whose_they_are():
    spec = small("topk")

    def name(**changes):
        config = replace(spec.train, **changes)
        return loop.Trainer(SAE(spec.sae), batches(spec), config).name

    assert name() == name(checkpoint_every=7) == name(precision="fp32")
    assert name() != name(lr=0.5) and name() != name(precision="bf16")


class Pair(Ranks):
    "The first of two ranks, of which the other one always has the same numbers."

    def __init__(self):
        super().__init__(0, 2)
        self.calls = 0

    def _reduce(self, values, operation):
        self.calls += 1
        return values * 2 if "SUM" in str(operation) else values.clone()

    def gather(self, rows):
        self.calls += 1
        return torch.cat([rows, rows])

    def agree(self, what, value):
        pass


def test_after_an_error_an_sae_is_alone_again():
    spec, ranks = small("batchtopk"), Pair()
    sae, x = SAE(spec.sae), next(batches(spec))
    with pytest.raises(OSError, match="stopped"):
        train(sae, batches(spec, Fails), spec.train, progress=False, ranks=ranks)
    calls = ranks.calls
    sae.loss(x).total.backward()
    assert ranks.calls == calls > 0


def test_damaged_checkpoint(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="no readable checkpoint"):
        make(small("topk"), tmp_path)


def test_checkpoint_holds_no_pickle(tmp_path):
    save_checkpoint(
        tmp_path / "c", {"a": {"x": torch.arange(3)}, "n": 1, "s": "text", "none": None}, "me"
    )
    assert load_checkpoint(tmp_path / "c", "me")["n"] == 1 and load_checkpoint(
        tmp_path / "c", "me"
    )["a"]["x"].tolist() == [0, 1, 2]
    assert b"pickle" not in (tmp_path / "c").read_bytes() and not (
        tmp_path / "c"
    ).read_bytes().startswith(b"PK")


def test_read_only_folder(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(loop, "save_file", refuse)
    with pytest.raises(OutputError, match="checkpoint.safetensors"):
        make(small("topk"), tmp_path)
    assert list(tmp_path.glob("*.part*")) == []


# ---- bad data


def test_nan_names_the_step():
    spec = small("topk")
    with pytest.raises(FloatingPointError, match="step 3: the batch holds NaN"):
        make(spec, data=batches(spec, Spoilt))


def test_nan_in_the_first_batch():
    class First(Spoilt):
        drawn = 2

    spec = small("topk")
    with pytest.raises(ValueError, match="the batch of step 1: 1 NaN"):
        make(spec, data=batches(spec, First))


def test_all_zero_batch():
    class Zero(WorldBatches):
        def __next__(self):
            return 0 * super().__next__()

    with pytest.raises(ValueError, match="all zero"):
        make(small("topk"), data=batches(small("topk"), Zero))


def test_wrong_width():
    with pytest.raises(
        ValueError, match=r"the batch of step 1: expected shape \(batch, 9\), got \(32, 8\)"
    ):
        train(SAE(SAEConfig(9, 16)), batches(small("topk")), small("topk").train, progress=False)


def as_batches(change):
    "A class of batches that passes each batch, and its number from 1, through `change`."

    class Changed(WorldBatches):
        drawn = 0

        def __next__(self):
            self.drawn += 1
            return change(super().__next__(), self.drawn)

    return Changed


def test_batches_of_another_width_or_kind_name_their_step():
    def wrong_at_3(wrong):
        return as_batches(lambda x, i: wrong(x) if i == 3 else x)

    spec = small("topk")
    for wrong, error, text in (
        (lambda x: x[:, :5], ValueError, r"expected shape \(batch, 8\), got \(32, 5\)"),
        (lambda x: x.long(), TypeError, "got torch.int64"),
        (lambda x: x.numpy(), TypeError, "got ndarray"),
        (lambda x: x.tolist(), TypeError, "got list"),
    ):
        with pytest.raises(error, match=f"the batch of step 3: .*{text}"):
            make(spec, data=batches(spec, wrong_at_3(wrong)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_batches_of_any_precision(dtype):
    spec = small("atm")
    half = as_batches(lambda x, _: x.to(dtype))
    single = as_batches(lambda x, _: x.to(dtype).float())
    (a, history), (b, _) = (make(spec, data=batches(spec, cls)) for cls in (half, single))
    assert weights(a) == weights(b) and history.table.l0.iloc[-1] > 0


def test_a_frozen_decoder():
    spec = small("topk")
    with pytest.raises(ValueError, match=r"W_dec is frozen.*requires_grad_\(True\)"):
        train(SAE(spec.sae).requires_grad_(False), batches(spec), spec.train, progress=False)


FROZEN = [("frozen decoder", "W_dec"), ("frozen encoder", "W_enc")]


@pytest.mark.parametrize("d_sae", [48, 200])  # the dense code path and the sparse one
@pytest.mark.parametrize("method, name", FROZEN)
def test_a_frozen_weight_keeps_its_bits_and_the_others_are_trained(method, name, d_sae):
    spec = recipe(method, WORLD, d_in=8, d_sae=d_sae, l0=3, steps=100, batch_size=32)
    first = weights(SAE(spec.sae))
    sae, history = make(spec)
    found = weights(sae)
    assert {name for name in first if first[name] == found[name]} == {name}
    assert history.table.l0.iloc[-1] == 3 and not getattr(sae, name).requires_grad
    assert history.table.fvu.iloc[-1] < 0.9 * history.table.fvu.iloc[0]
    plain = recipe("topk", WORLD, d_in=8, d_sae=d_sae, l0=3, steps=100, batch_size=32)
    assert spec.key != plain.key and replace(spec.train, frozen=()) == plain.train


def test_an_sae_is_trained_further_with_the_same_weight_frozen():
    spec = small("frozen decoder")
    sae, _ = make(spec)
    train(sae, batches(spec), spec.train, progress=False)
    with pytest.raises(ValueError, match="W_dec is frozen.*or name it in `frozen`"):
        train(sae, batches(spec), small("topk").train, progress=False)


# ---- outliers


@torch.no_grad()
def unexplained(sae, x):
    return float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum())


def loud_rows(x, i):
    "The longest row of every fourth batch is 150 times as long."
    if i % 4 == 2:
        x[x.norm(dim=1).argmax()] *= 150
    return x


LOUD = as_batches(loud_rows)


@pytest.mark.parametrize("method", ARCHITECTURE_CLASSES)
def test_outliers_do_not_change_what_is_learnt(method):
    spec = small(method, steps=100)
    x = PlantedWorld(WORLD).sample(2000, torch.Generator().manual_seed(5))[0]
    clean, _ = make(spec)
    loud, history = make(spec, data=batches(spec, LOUD))
    assert history.n_outliers == 25
    assert unexplained(loud, x) < 1.1 * unexplained(clean, x)


def test_outliers_are_counted_and_the_limit_is_stored(tmp_path):
    first = as_batches(lambda x, i: torch.cat([150 * x[:2], x[2:]]) if i == 1 else loud_rows(x, i))
    spec = small("topk")
    sae, history = make(spec, data=batches(spec, first))
    x = next(batches(spec))
    norms = x[x.norm(dim=1) > 0].norm(dim=1)
    assert history.max_norm == pytest.approx(10 * float(norms.median()), rel=0.2)
    assert history.scale == pytest.approx(float(x[2:].square().sum(1).mean()) ** -0.5)
    counts = history.table.set_index("step").outliers
    assert counts[5] == 3 and counts[40] == history.n_outliers == 12
    assert counts.is_monotonic_increasing and counts.dtype == int
    assert SAE.load(sae.save(tmp_path / "sae")).max_norm == pytest.approx(history.max_norm)


def test_without_outliers_the_rule_changes_nothing():
    spec = small("atm")
    without, history = make(replace(spec, sae=replace(spec.sae, outlier_ratio=None)))
    ruled, ruled_history = make(spec)
    assert weights(ruled) == weights(without) and ruled_history.table.equals(history.table)
    assert history.max_norm == without.max_norm == np.inf and "max_norm" not in without.metadata


def test_no_rule_leaves_outliers_in():
    spec = small("topk", outlier_ratio=None)
    _, history = make(spec, data=batches(spec, LOUD))
    assert history.n_outliers == 0 and history.table.reconstruction.max() > 10


def test_resume_with_outliers(tmp_path):
    spec = small("atm")
    straight, whole = make(spec, data=batches(spec, LOUD))

    def stops(x, i):
        if i == 28:
            raise OSError("stopped")
        return loud_rows(x, i)

    with pytest.raises(OSError):
        make(spec, tmp_path, batches(spec, as_batches(stops)))
    data = batches(spec, LOUD)
    data.drawn = 20  # the checkpoint is that of step 20
    resumed, rest = make(spec, tmp_path, data)
    assert weights(resumed) == weights(straight) and rest.table.equals(whole.table)
    assert rest.n_outliers == 10 and rest.max_norm == whole.max_norm
    assert resumed.max_norm == straight.max_norm


def test_a_batch_of_nothing_but_outliers():
    spec = small("topk")
    with pytest.raises(ValueError, match="step 7: every activation of the batch is an outlier"):
        make(spec, data=batches(spec, as_batches(lambda x, i: x + 1e4 if i == 7 else x)))


def test_an_infinite_activation_is_no_outlier():
    def spoil(x, i):
        if i == 3:
            x[1, 2] = torch.inf
        return x

    spec = small("topk")
    with pytest.raises(FloatingPointError, match="step 3: the batch holds NaN or infinite"):
        make(spec, data=batches(spec, as_batches(spoil)))


def test_the_run_cache_keeps_limit_and_count(monkeypatch):
    monkeypatch.setattr(runs, "data_batches", lambda *_: batches(small("topk"), LOUD))
    made, control = get_run(small("topk")), get_run(small("random"))
    again = get_run(small("topk"))
    assert again.history.max_norm == made.history.max_norm < np.inf
    assert again.sae.max_norm == pytest.approx(again.history.max_norm)
    assert again.history.n_outliers == 10
    assert control.sae.max_norm < 100 and control.sae.is_trained
    assert control.history.max_norm == np.inf and control.history.n_outliers == 0


# ---- fine-tuning


def times(factor):
    return as_batches(lambda x, _: factor * x)


def one_step(sae, spec, cls, **more):
    "A step that moves nothing."
    config = TrainConfig(1, spec.train.batch_size, lr=1e-12)
    return train(sae, batches(spec, cls), config, progress=False, **more)


@pytest.mark.parametrize("method", ARCHITECTURE_CLASSES)
def test_a_trained_sae_is_trained_further(method, tmp_path):
    "The outputs are the same before the first step, whatever was folded and whatever the data."
    spec = small(method, steps=100)
    sae, _ = make(spec, data=batches(spec, times(10)))
    assert sae.is_trained
    x = 10 * PlantedWorld(WORLD).sample(2000, torch.Generator().manual_seed(5))[0]
    before = unexplained(sae, x)
    follows = method in FOLLOWING  # 1% of the way to the batch's own threshold
    for factor in (10, 1):
        again = SAE.load(sae.save(tmp_path / f"{factor}"))
        one_step(again, spec, times(factor))
        if follows:
            assert torch.allclose(again.threshold, sae.threshold, rtol=0.011)
            again.threshold.copy_(sae.threshold)
        assert unexplained(again, x) == pytest.approx(before, abs=1e-4)
    one_step(sae.fold_decoder_norm(), spec, times(10))
    assert unexplained(sae, x) == pytest.approx(before, abs=1e-3 if follows else 1e-4)


@pytest.mark.parametrize("method", ["standard", "jumprelu"])
def test_decoder_rows_of_other_lengths_are_folded_first(method):
    spec = small(method)
    sae, _ = make(spec)
    sae.W_dec.data *= torch.linspace(0.5, 2, 16)[:, None]
    x = PlantedWorld(WORLD).sample(2000, torch.Generator().manual_seed(5))[0]
    before = unexplained(sae, x)
    one_step(sae, spec, WorldBatches)
    assert unexplained(sae, x) == pytest.approx(before, abs=1e-4)
    topk, _ = make(small("topk"))
    topk.W_dec.data[0] *= 2
    with pytest.raises(ValueError, match="topk compares latents with each other"):
        one_step(topk, spec, WorldBatches)


def test_thresholds_that_were_never_set_survive():
    sae = SAE(small("batchtopk").sae).fold_input_scale(1.0)
    one_step(sae, small("batchtopk"), WorldBatches)
    assert sae.is_trained and sae.threshold > 0  # the first batch set it at once


def test_training_further_improves():
    spec = small("topk", steps=60)
    sae, first = make(spec)
    more = train(sae, batches(spec), spec.train, progress=False)
    assert more.table.fvu.iloc[0] < 0.7 * first.table.fvu.iloc[0]
    assert more.table.fvu.iloc[-1] < first.table.fvu.iloc[-1]


def test_a_stopped_fine_tuning(tmp_path):
    "The SAE takes raw activations again; from the same start it resumes, from another it does not."
    spec = small("topk")
    start = make(spec)[0].save(tmp_path / "start")
    x = PlantedWorld(WORLD).sample(2000, torch.Generator().manual_seed(5))[0]

    def further(sae, data, folder=tmp_path / "checkpoint"):
        return train(sae, data, spec.train, folder=folder, progress=False)

    straight, stopped, resumed = (SAE.load(start) for _ in range(3))
    further(straight, batches(spec), None)
    with pytest.raises(OSError):
        further(stopped, batches(spec, Fails))
    assert unexplained(stopped, x) == pytest.approx(unexplained(straight, x), rel=0.3)
    with pytest.raises(ValueError, match="checkpoint of another configuration"):
        further(stopped, batches(spec))
    further(resumed, batches(spec))
    assert weights(resumed) == weights(straight)


# ---- runs


def test_methods_and_recipes():
    assert method_parts("matryoshka+dropout r=2 v2") == ("matryoshka", "dropout") and method_parts(
        "atm trial 1"
    ) == ("standard", "atm")
    assert (
        small("matryoshka").sae.k == 3
        and small("matryoshka").atm is None
        and small("matryoshka+atm").sae.architecture == "matryoshka"
    )
    assert (
        method_parts("atm") == ("standard", "atm")
        and method_parts("frozen decoder v2") == ("topk", "")
        and method_parts("jumprelu+atm") == ("jumprelu", "atm")
        and method_parts("random") == ("jumprelu", "")
    )
    assert (
        small("topk").sae.k == 3
        and small("atm").sae.target_l0 == 3
        and small("dropout").atm.control == "dropout"
        and small("topk+activity").atm.control == "activity"
        and small("standard+shuffled").atm.control == "shuffled"
        and small("atm").atm.control == ""
        and small("topk+off").atm is None
        and small("standard").atm is None
    )
    spec = small("atm", r=0.5, lr=0.25, bandwidth=0.7)
    assert (spec.atm.r, spec.train.lr, spec.sae.bandwidth) == (0.5, 0.25, 0.7)


def test_lr_scale_is_in_units_of_the_default():
    assert [small(m, lr_scale=0.5).train.lr / small(m).train.lr for m in ("atm", "topk")] == [
        0.5,
        0.5,
    ] and small("topk").train.lr == default_lr(16)


def test_recipe_refuses():
    with pytest.raises(ValueError, match="unknown method 'atn': choose one of atm, standard"):
        small("atn")
    with pytest.raises(ValueError, match="unknown method 'atn r=2'"):
        small("atn r=2")
    with pytest.raises(TypeError, match="rr: no field"):
        small("atm", rr=2)
    with pytest.raises(TypeError, match="topk has a mask"):
        small("topk", combine="sum")


def test_a_rounded_l0_is_said():
    with pytest.warns(UserWarning, match=r"topk: k is a whole number, so L0 8.5 becomes k = 8"):
        spec = recipe("topk", WORLD, d_in=8, d_sae=16, l0=8.5, steps=5)
    assert spec.l0 == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe("topk", WORLD, d_in=8, d_sae=16, l0=8.0, steps=5)
        recipe("standard", WORLD, d_in=8, d_sae=16, l0=8.5, steps=5)


def test_keys_tell_specs_apart():
    # a run without a mask is that of its base, see below
    specs = [small(m) for m in METHODS if method_parts(m)[1] != "off"] + [
        small("atm", seed=1),
        small("atm", steps=41),
        small("atm", r=2.0),
    ]
    specs += [
        small("atm", **s)
        for s in (
            dict(effect="norm"),
            dict(draw="nested"),
            dict(rescale=True),
            dict(anneal=0.1),
            dict(penalty="tanh"),
            dict(lr_scale=2.0),
        )
    ]
    specs += [small("matryoshka", prefixes=(0.5, 1))]
    assert len({s.key for s in specs}) == len(specs) and small("atm").key == small("atm").key


def test_settings_that_do_not_change_a_run_do_not_change_its_key():
    topk = small("topk")
    assert small("topk", bandwidth=0.7).key == topk.key  # of jumprelu
    assert small("topk", checkpoint_every=7).key == topk.key
    assert small("topk", precision="fp32").key == topk.key  # what 'auto' means on a CPU
    assert small("topk", precision="bf16").key != topk.key
    assert small("random", lr=0.1).key == small("random").key


def test_runs_on_equal_activations_are_the_same_run(monkeypatch):
    content = {"a": "0", "b": "0", "c": "1"}
    monkeypatch.setattr(
        runs,
        "activation_artefact",
        lambda s, device: SimpleNamespace(content=lambda: content[s.model], sources={}),
    )
    a, b, c = (recipe("topk", runs.ActivationSpec(model=m), 8, 16, 3, 5) for m in "abc")
    assert a.key == b.key != c.key


def test_a_run_depends_on_the_code_of_its_own_architecture_and_data():
    topk, jumprelu = (runs.run_artefact(small(m)).closure.definitions for m in ("topk", "jumprelu"))
    assert {"sae.architectures.TopK", "data.planted.WorldBatches"} <= topk.keys()
    assert not {"sae.architectures.JumpReLU", "data.batches.StreamBatches"} & topk.keys()
    assert "sae.architectures.JumpReLU" in jumprelu
    untrained = runs.run_artefact(small("random")).closure.definitions
    assert "train.loop.Trainer" in topk and "train.loop.Trainer" not in untrained


def test_the_artefact_of_a_run_makes_that_of_its_activations_once(monkeypatch):
    made = []

    def counted(data, device):
        made.append(activation_artefact(data, device=device))
        return made[-1]

    monkeypatch.setattr(runs, "activation_artefact", counted)
    data = runs.ActivationSpec(buffer=512)
    artefact = runs.run_artefact(recipe("topk", data, 8, 16, 3, 5))
    assert len(made) == 1 and artefact.sources == {"model": "nano-gemma2", "text": ""}


def test_a_variants_name_is_only_a_name():
    assert (
        small("atm r=2", r=2.0).key == small("atm", r=2.0).key
        and small("atm r=2", r=2.0).name == "atm r=2, L0 3.0, seed 0"
    )


def tuned_grid(methods, tuned, **settings):
    return grid(
        methods,
        WORLD,
        targets=[3, 4],
        seeds=[0, 1],
        d_sae=16,
        steps=5,
        tuned=tuned,
        batch_size=32,
        **settings,
    )


def test_grid_gives_each_method_its_own_settings():
    specs = tuned_grid(
        ["topk", "atm", "atm r=2"],
        {"atm": dict(r=0.5), "atm r=2": dict(r=2.0, lr_scale=4.0)},
        lr_scale=2.0,
    )
    assert [(s.method, s.l0, s.seed) for s in specs] == [
        (m, l0, seed) for m in ("topk", "atm", "atm r=2") for l0 in (3, 4) for seed in (0, 1)
    ]
    assert [s.train.lr / default_lr(16, s.sae.architecture) for s in specs[::4]] == [2, 2, 4] and [
        s.atm.r for s in specs[4::4]
    ] == [0.5, 2]
    assert {s.train.batch_size for s in specs} == {32}


@pytest.mark.parametrize(
    "blind, twin",
    [
        ("dropout", "atm"),
        ("matryoshka+dropout", "matryoshka+atm"),
        ("standard+activity", "atm"),
        ("topk+activity", "topk+atm"),
    ],
)
def test_a_dropout_control_takes_the_settings_of_its_twin(blind, twin):
    specs = tuned_grid(
        [blind, twin], {twin: dict(r=2.0, lr_scale=0.5, anneal=0.3), "topk": dict(lr_scale=3.0)}
    )
    assert specs[0].atm.control and [twin_spec(s) for s in specs[:4]] == specs[4:]
    assert specs[0].atm.r == 2 and specs[0].train.lr == 0.5 * default_lr(
        16, specs[0].sae.architecture
    )


@pytest.mark.parametrize("blind", ["dropout", "topk+off", "dropout r=2"])
def test_a_dropout_control_has_no_settings_of_its_own(blind):
    twin = twin_method(blind)
    why = f"{blind!r} takes the settings of its twin: give them to {twin!r}"
    with pytest.raises(ValueError, match=re.escape(why)):
        tuned_grid([blind], {blind: dict(r=2.0)})


def test_the_shuffled_control_takes_settings_but_no_run_of_its_twin():
    shuffled, atm = tuned_grid(["topk+shuffled", "topk+atm"], {"topk+atm": dict(r=2.0)})[::4]
    assert shuffled.atm == replace(atm.atm, control="shuffled") and twin_spec(shuffled) is None


def test_a_twin_without_a_mask_has_the_other_settings():
    "It shares its run with the base of the same settings, and with no other."
    tuned = {"topk+atm": dict(lr_scale=0.5, r=2.0), "topk slow": dict(lr_scale=0.5)}
    off, atm, slow, topk = tuned_grid(["topk+off", "topk+atm", "topk slow", "topk"], tuned)[::4]
    assert off.atm is None and twin_spec(off) is None
    assert (off.train, off.sae) == (atm.train, atm.sae)
    assert off.key == slow.key and off.key not in (topk.key, atm.key)
    assert small("standard+off").key == small("standard").key
    with pytest.raises(TypeError, match="rr: no field"):
        small("topk+off", rr=2)


def test_a_variant_of_the_untrained_control_is_untrained():
    plain, variant = tuned_grid(["random", "random v2"], {"random v2": {}})[::4]
    assert plain.key == variant.key and plain.method != variant.method


def test_only_a_variant_of_a_frozen_method_needs_settings():
    spec = tuned_grid(["frozen encoder"], {})[0]
    assert (spec.train.frozen, spec.sae.k, spec.method) == (("W_enc",), 3, "frozen encoder")
    with pytest.raises(ValueError, match="the variant 'frozen encoder v2' needs an entry"):
        tuned_grid(["frozen encoder v2"], {})


def test_one_learning_rate():
    with pytest.raises(
        TypeError, match="lr and lr_scale both set the learning rate: give one of them"
    ):
        tuned_grid(["atm"], dict(atm=dict(lr=0.1, lr_scale=2.0)))
    assert tuned_grid(["atm"], dict(atm=dict(lr=0.1)))[0].train.lr == 0.1


def test_a_world_for_each_seed():
    specs = world_grid(
        ["topk", "atm"], [3, 5], targets=[3, 4], d_sae=160, steps=5, tuned=dict(atm=dict(r=2.0))
    )
    assert [(s.data.seed, s.seed, s.method, s.l0) for s in specs] == [
        (s, s, m, l0) for s in (3, 5) for m in ("topk", "atm") for l0 in (3, 4)
    ]
    assert {s.atm.r for s in specs if s.atm} == {2.0}


def test_a_variant_needs_its_settings():
    with pytest.raises(ValueError, match="the variant 'atm r=2' needs an entry in `tuned`"):
        tuned_grid(["atm", "atm r=2"], {"atm": {}})
    with pytest.raises(ValueError, match="'atm r=2' needs"):
        tuned_grid(["atm r=2"], None)
    with pytest.raises(TypeError, match="rr: no field"):
        tuned_grid(["atm"], dict(atm=dict(rr=2)))


def test_get_run_makes_once(monkeypatch):
    spec = small("atm")
    made = get_run(spec)
    assert is_complete(spec) and sorted(p.name for p in made.folder.iterdir()) == [
        "artefact.json",
        "history.csv",
        "run.json",
        "sae",
        "snapshots.safetensors",
    ]
    monkeypatch.setattr(runs, "train_together", None)  # a second call cannot train
    again = get_run(spec)
    assert weights(again.sae) == weights(made.sae) and again.history.table.equals(
        made.history.table
    )
    assert again.history.scale == made.history.scale and set(again.history.snapshots) == {10, 30}


def test_two_processes_that_want_one_run_train_it_once():
    processes = [Fork(steps_taken, small("topk", steps=300)) for _ in range(2)]
    ended = [p.ended() for p in processes]
    assert sorted(e.value for e in ended) == [0, 300], [e.said for e in ended]


def test_a_run_says_how_long_it_took(monkeypatch):
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=iter([10.0, 12.3456]).__next__))
    assert read_json(get_run(small("topk")).folder / "run.json")["seconds"] == 2.35


def test_a_folder_without_its_record_is_not_complete():
    spec = small("topk")
    made = get_run(spec)
    (made.folder / "artefact.json").unlink()
    assert not is_complete(spec)
    assert weights(get_run(spec).sae) == weights(made.sae) and is_complete(spec)


def test_random_run_has_its_l0():
    run = get_run(small("random", batch_size=512))
    x, _ = PlantedWorld(WORLD).sample(8000, torch.Generator().manual_seed(1))
    assert (run.sae.encode(x) > 0).sum(1).float().mean().item() == pytest.approx(
        3, rel=0.05
    ) and len(run.history.table) == 0


def test_grid_in_processes_equals_grid_in_turn(monkeypatch, tmp_path):
    specs = [small("topk"), small("atm"), small("topk")]
    many = run_grid(specs, workers=2, progress=False)
    assert [r.spec for r in many] == specs
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "other"))
    one = run_grid(specs, workers=1, progress=False)
    for a, b in zip(many, one):
        assert weights(a.sae) == weights(b.sae) and a.history.table.equals(b.history.table)
    monkeypatch.setattr(runs, "train_together", None)
    assert len(run_grid(specs, progress=False)) == 3  # a second call only loads


@pytest.mark.parametrize("workers", [1, 2])
def test_grid_names_the_run_that_failed(workers):
    bad = [recipe("topk", WORLD, d_in=9, d_sae=16, l0=3, steps=5, seed=s) for s in range(workers)]
    with pytest.raises(
        RuntimeError, match=r'run "topk, L0 3, seed \d" .* failed: ValueError: the data are 8 wide'
    ):
        run_grid(bad, workers, progress=False)


# ---- many SAEs on one pass


MANY = ("topk", "atm", "jumprelu", "matryoshka+atm", "standard", "batchtopk")


def passes(monkeypatch):
    "A list that grows by the number of SAEs of each pass over the data."
    sizes, real = [], runs.train_together
    monkeypatch.setattr(
        runs, "train_together", lambda t, *more: (sizes.append(len(t)), real(t, *more))[1]
    )
    return sizes


def assert_same(many, alone):
    for a, b in zip(many, alone, strict=True):
        assert a.spec == b.spec and a.l0 == b.l0
        assert weights(a.sae) == weights(b.sae) and a.history.table.equals(b.history.table)
        assert flatten(dict(s=a.history.snapshots))[0].keys() == (
            flatten(dict(s=b.history.snapshots))[0].keys()
        )


def test_many_on_one_pass_are_each_alone(monkeypatch, tmp_path):
    specs, sizes = [small(method) for method in MANY], passes(monkeypatch)
    many = train_many(specs)
    assert sizes == [len(MANY)]
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "alone"))
    assert_same(many, [get_run(spec) for spec in specs])


def test_a_dropout_control_is_trained_after_its_twin_and_others_apart(monkeypatch):
    specs = [small(m) for m in ("dropout", "topk+dropout", "random", "topk")]
    sizes = passes(monkeypatch)
    assert [run.spec for run in train_many(specs)] == specs
    assert sizes == [3, 2]  # atm, topk+atm and topk; then the controls; random is not trained
    train_many(specs)
    assert sizes == [3, 2]  # a second call only loads


def test_many_resume_after_a_kill(monkeypatch, tmp_path):
    specs = [small(m, checkpoint_every=n) for m, n in (("topk", 10), ("atm", 20), ("jumprelu", 25))]
    ended = forked(make_and_die, specs, 23)
    assert ended.status == -signal.SIGKILL, ended.said
    found = [load_checkpoint(run_folder(s) / loop.CHECKPOINT, name_of(s)) for s in specs[:2]]
    assert [state["steps"] for state in found] == [20, 20]
    assert not (run_folder(specs[2]) / loop.CHECKPOINT).exists()  # it starts again
    many = train_many(specs)
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "straight"))
    assert_same(many, [get_run(spec) for spec in specs])


def name_of(spec):
    masker = make_masker(spec.atm, spec.sae.d_sae, spec.train.steps, rates=twin_rates(spec))
    return loop.Trainer(SAE(spec.sae), batches(spec), spec.train, masker).name


def test_checkpoints_at_other_steps_are_kept_up_with(tmp_path):
    "The first SAE stands at step 20, the second at 10, the third at 0."
    specs = [small("topk"), small("jumprelu", checkpoint_every=10), small("standard")]
    for spec, stop in zip(specs[:2], (28, 18)):
        with pytest.raises(OSError, match="stopped"):
            make(spec, tmp_path / spec.method, stopping(spec, stop))
    data, read = batches(specs[0]), []
    real = data.world.sample
    data.world.sample = lambda *more: (read.append(1), real(*more))[1]
    trainers = [loop.Trainer(SAE(s.sae), data, s.train, folder=tmp_path / s.method) for s in specs]
    for trainer in trainers:
        trainer.resume()
    assert [trainer.steps for trainer in trainers] == [20, 10, 0]
    assert loop.train_together(trainers, progress=False) == [None] * 3
    assert len(read) == 40  # one pass
    for spec, trainer in zip(specs, trainers):
        sae, history = make(spec)
        assert weights(sae) == weights(trainer.sae)
        assert history.table.equals(trainer.history.table)


def stopping(spec, last):
    data = batches(spec, Fails)
    data.drawn = 28 - last
    return data


def diverges(spec):
    "The same run with a learning rate at which the loss is infinite."
    return replace(spec, train=replace(spec.train, lr=1e30, grad_clip=1e30))


@pytest.mark.parametrize("make_all", [train_many, partial(run_grid, workers=1, progress=False)])
def test_an_sae_that_diverges_stops_alone(make_all):
    good = [small("topk"), small("jumprelu")]
    with pytest.raises(FailedRun, match='run "standard, L0 3.0, seed 0" .*FloatingPointError: ste'):
        make_all([good[0], diverges(small("standard")), good[1]])
    assert make_all == train_many and all(map(is_complete, good)) or is_complete(good[0])


def test_a_damaged_checkpoint_stops_one_of_many():
    good, bad = small("topk"), small("jumprelu")
    run_folder(bad).mkdir(parents=True)
    (run_folder(bad) / loop.CHECKPOINT).write_bytes(b"damaged")
    with pytest.raises(FailedRun, match='^run "jumprelu, L0 3.0, .*no readable checkpoint'):
        train_many([bad, good])
    assert is_complete(good) and not is_complete(bad)


def test_an_error_of_the_data_names_all_runs_of_the_pass(monkeypatch):
    monkeypatch.setattr(runs, "data_batches", lambda *a: Fails(PlantedWorld(WORLD), 32, 0))
    with pytest.raises(FailedRun, match="topk, .* or .*jumprelu, .* failed: OSError: stopped"):
        train_many([small("topk"), small("jumprelu")])


def test_groups_by_hand():
    k = [small("topk", k=k) for k in (1, 2, 3, 4, 5)]
    others = [small("topk", seed=1), small("topk", steps=41), small("topk", batch_size=16)]
    for memory, workers, sizes in ((10**9, 1, [5, 1, 1, 1]), (10**9, 9, [2, 2, 1, 1, 1, 1])):
        groups = group_runs([*k, *others], workers, share=True, memory=memory)
        assert [len(group) for group in groups] == sizes, (memory, workers)
    one = 16 * 2 * 8 * 16  # bytes: weights, gradients and moments of an encoder and a decoder
    assert [len(g) for g in group_runs(k, share=True, memory=2 * one)] == [2, 2, 1]
    assert [len(g) for g in group_runs(k, 2, share=True, memory=2 * one)] == [1] * 5
    assert [len(g) for g in group_runs(k, share=True, memory=0)] == [1] * 5
    assert group_runs([], share=True) == []


def test_a_grid_shares_the_samples_of_a_planted_world_but_not_cached_activations(monkeypatch):
    monkeypatch.setattr(runs, "run_artefact", lambda spec, device: SimpleNamespace(key=spec.name))
    world = [small("topk", k=k) for k in range(1, 12)]
    assert [len(group) for group in group_runs(world)] == [6, 5]
    assert [len(group) for group in group_runs(world, share=True)] == [11]
    assert [len(group) for group in group_runs(world[:5], workers=2)] == [3, 2]
    data = runs.ActivationSpec("nano-gemma2")
    cached = [replace(spec, data=data) for spec in world]
    assert group_runs(cached) == [[spec] for spec in cached]


@pytest.mark.parametrize("kind, sizes", [("cpu", [1] * 5), ("cuda", [2, 2, 1])])
def test_workers_share_the_memory_of_a_cpu_and_each_has_that_of_its_gpu(monkeypatch, kind, sizes):
    specs = [recipe("topk", WORLD, 16, 64, k, steps=30) for k in (1, 2, 3, 4, 5)]
    monkeypatch.setattr(runs, "pick_device", lambda device: torch.device(kind))
    monkeypatch.setattr(runs, "free_memory", lambda device: 4 * runs.training_bytes(specs[0]))
    assert [len(group) for group in group_runs(specs, workers=2, share=True)] == sizes


def test_free_memory_is_some_of_the_machines():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_memory() <= total


def test_a_run_holds_no_sae_that_is_not_in_use():
    run = get_run(small("topk"))
    sae = run.sae
    assert run.sae is sae and pickle.loads(pickle.dumps(run)).sae is not sae
    before, held = weights(sae), weakref.ref(sae)
    del sae
    gc.collect()
    assert held() is None and weights(run.sae) == before


def test_unknown_data():
    with pytest.raises(TypeError, match="WorldConfig or an ActivationSpec, not str"):
        get_run(recipe("topk", "pile", 8, 16, 3, 5))


def test_blind_control_hides_as_many_as_its_twin_at_each_step():
    spec = small("dropout", steps=60)
    twin = small("atm", steps=60)
    assert twin_spec(spec) == twin and twin_spec(twin) is None and twin_spec(small("topk")) is None
    (blind,) = run_grid([spec], workers=1, progress=False)
    assert is_complete(twin)  # made first, though nobody asked for it
    rates, log = twin_rates(spec), get_run(twin).history.table
    assert (
        rates == pytest.approx(np.interp(range(60), log.step, log.mask_rate)) and len(rates) == 60
    )
    assert rates[0] == 0 < rates[-1]  # nothing is hidden during the warm-up
    assert blind.history.table.mask_rate.mean() == pytest.approx(log.mask_rate.mean(), abs=0.1)


def test_the_activity_control_removes_the_mass_that_its_twin_removes():
    spec, twin = small("topk+activity", steps=60), small("topk+atm", steps=60)
    (control,) = run_grid([spec], workers=1, progress=False)
    log = get_run(twin).history.table
    rates = twin_rates(spec)
    assert rates == pytest.approx(np.interp(range(60), log.step, log.masked_activity))
    assert rates != pytest.approx(twin_rates(small("topk+dropout", steps=60)))
    # a uniform mask removes its rate of the mass
    own = control.history.table
    inside = own.step < 60
    assert own.masked_activity[inside].to_numpy() == pytest.approx(
        np.array(rates)[own.step[inside]], abs=1e-6
    )
    assert 0 < log.masked_activity.iloc[-2] < log.mask_rate.iloc[-2]


def test_the_untrained_control_needs_a_target(cache):
    spec = recipe("random", WORLD, d_in=8, d_sae=16, l0=3, steps=5)
    without = replace(spec, sae=replace(spec.sae, target_l0=None))
    batches = WorldBatches(PlantedWorld(WORLD), 32, 0)
    with pytest.raises(ValueError, match="the untrained control needs a target L0"):
        runs.untrained_sae(without, batches)


def test_the_untrained_control_has_the_limit_of_all_its_samples():
    spec = recipe("random", WORLD, d_in=8, d_sae=16, l0=3, steps=5)
    ordinary = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    x = torch.cat([ordinary, torch.full((20, 8), 1e4)])
    sae = runs.untrained_sae(spec, iter([x] * 4))
    assert sae.max_norm == norm_limit(torch.cat([x] * 4), spec.sae.outlier_ratio)
    assert (sae.encode(ordinary) > 0).sum() == 3 * 60
    assert torch.allclose(sae.b_dec, geometric_median(ordinary), atol=1e-4)


def test_other_activations_than_those_of_the_key_are_refused():
    batches = object.__new__(CacheBatches)
    batches.cache = SimpleNamespace(meta=dict(sha256="new"))
    runs._check_content(batches, SimpleNamespace(inputs=dict(activations="new")))
    with pytest.raises(RuntimeError, match="run the same command again"):
        runs._check_content(batches, SimpleNamespace(inputs=dict(activations="old")))
