"Everything runs on the device of the SAE and the model, proved on a GPU without hardware."

import copy
import gc
import warnings
import weakref
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import fake_gpu as fake
import numpy as np
import pytest
import torch
from fake_gpu import GPUTensor, fake_gpu
from small import WORLD, small

from atm_sae.core import generator, with_float64
from atm_sae.data.activations import token_activations
from atm_sae.data.batches import StreamBatches
from atm_sae.data.lm import in_threads, next_token_losses, read_site, share_weights
from atm_sae.data.planted import PlantedWorld, WorldBatches
from atm_sae.data.text import TokenRows
from atm_sae.evals.absorption import (
    AbsorptionConfig,
    encode_words,
    evaluate_absorption,
    integrated_effects,
)
from atm_sae.evals.first_letter import TaskSpec, build_task, letter_indices, word_prompts
from atm_sae.evals.metrics import (
    activation_frequency,
    dictionary_agreement,
    planted_metrics,
    reconstruction_metrics,
    spliced_metrics,
    synthsaebench_metrics,
)
from atm_sae.evals.probing import ProbingTask, build_probing, score_probing
from atm_sae.evals.reading import word_activations
from atm_sae.evals.stability import frozen_movement, movement, read_without_learning
from atm_sae.evals.swap import swap_words
from atm_sae.methods import METHODS
from atm_sae.report import tables
from atm_sae.report.tables import score_runs
from atm_sae.sae.architectures import MaskedBatch, SAEConfig
from atm_sae.sae.atm import (
    EFFECTS,
    ATMConfig,
    contribution,
    frequency,
    magnitude,
    make_masker,
)
from atm_sae.sae.losses import step as step_of
from atm_sae.sae.sae import SAE, calibrate_l0, random_sae
from atm_sae.sae.sparse import ActiveSet, DenseSet
from atm_sae.train.loop import L0Control
from atm_sae.train.runs import Run, SAEFile, get_run, make_trainer, measure_l0, untrained_sae

TOKENS = torch.randint(5, 900, (6, 20), generator=torch.Generator().manual_seed(0))


def same(a, b):
    "True if two results are equal to the last bit, wherever they are."
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b.cpu())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return np.array_equal(a, b, equal_nan=True)


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


# --- the GPU without hardware


def test_the_fake_gpu_finds_what_a_gpu_forbids():
    with fake_gpu():
        x = torch.ones(4, 3).to("cuda")
        assert x.device.type == "cuda" and (x * 2 + 1).sum().cpu() == 36
        for mixed in (
            lambda: x + torch.ones(4, 3),
            lambda: x[torch.arange(2)],
            lambda: torch.zeros(3, device="cuda") @ torch.ones(3),
            lambda: torch.where(torch.ones(4, 3) > 0, x, 0),
        ):
            with pytest.raises(RuntimeError, match="on the host, others on the GPU"):
                mixed()
        with pytest.raises(RuntimeError, match="a generator of the host draws"):
            torch.rand(3, generator=torch.Generator(), device="cuda")
        with pytest.raises(TypeError, match="copy it to the host"):
            np.asarray(x)


def test_the_fake_gpu_counts_copies_and_reads():
    with fake_gpu() as counts:
        x = torch.ones(4).to("cuda")
        assert counts == dict(to_gpu=1)
        assert float(x.sum()) == 4 and counts["reads"] == 1
        assert x.tolist() == [1] * 4 and counts["to_host"] == 1
        assert len(x[x > 0]) == len(x.nonzero()) == 4 and counts["sizes"] == 2


# --- training


def steps(method, device, n, counts=None, cpu_masks=False, **more):
    "The trainer of a method after `n` steps, and what each step copied."
    spec = small(method, log_every=12, precision="fp32", fast=False, **more)
    batches = WorldBatches(PlantedWorld(WORLD), spec.train.batch_size, spec.seed)
    trainer = make_trainer(spec, batches, [0.1] * 40, torch.device(device))
    if cpu_masks:
        trainer.generator = generator(spec.train.seed, "mask")
    copied = []
    for step in range(n):
        before = Counter(counts)
        trainer.step(trainer.read_batch(step + 1))
        copied.append(Counter(counts) - before)
    return trainer, copied


@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
def test_training_stays_on_the_device(method):
    "The numbers of the CPU's dense path; between readings the batch alone is copied."
    expected, _ = steps(method, "cpu", 12)
    with fake_gpu() as counts:
        trainer, copied = steps(method, "cuda", 12, counts)
        found = {name: weight.cpu() for name, weight in trainer.sae.state_dict().items()}
    assert same(dict(expected.sae.state_dict()), found)
    assert same([*map(list, expected.history.rows)], [*map(list, trainer.history.rows)])
    assert copied[1:9] == [dict(to_gpu=1)] * 8
    assert copied[10] == dict(to_gpu=1, sizes=1)  # the dead latents
    assert copied[11] == dict(to_gpu=1, to_host=2, reads=2)  # a row of the history


def test_chunks_of_rows_are_drawn_on_the_device():
    expected, _ = steps("ortsae", "cpu", 12, chunk=4)
    with fake_gpu() as counts:
        trainer, copied = steps("ortsae", "cuda", 12, counts, chunk=4)
        assert same(dict(expected.sae.state_dict()), dict(trainer.sae.state_dict()))
    assert copied[5]["to_gpu"] == 1  # the batch; step 5 compares rows


def test_a_checkpoint_of_another_device_is_refused(tmp_path):
    "A generator's state belongs to its kind of device."
    spec = small("topk+atm", precision="fp32", fast=False)

    def trainer(device):
        batches = WorldBatches(PlantedWorld(WORLD), spec.train.batch_size, spec.seed)
        return make_trainer(spec, batches, None, torch.device(device), tmp_path)

    with fake_gpu():
        made = trainer("cuda")
        made.step(made.read_batch(1))
        made.save()
    with pytest.raises(ValueError, match="checkpoint was made on cuda, and the SAE is on cpu"):
        trainer("cpu")


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "standard"])
def test_places_of_the_sparse_path_are_on_the_device(architecture):
    sae = SAE(SAEConfig(8, 16, architecture=architecture, k=3 if "k" in architecture[3:] else None))
    pre = torch.randn(5, 16)
    with fake_gpu() as counts:
        there = sae.to("cuda")
        places = there.architecture.places(pre.to("cuda"), there, SimpleNamespace(size=1))
        assert isinstance(places, GPUTensor) and not counts["to_host"]


def test_a_run_on_a_gpu_is_resumed(tmp_path):
    spec = small("topk+atm", precision="fp32", fast=False)

    def trainer(steps):
        batches = WorldBatches(PlantedWorld(WORLD), spec.train.batch_size, spec.seed)
        made = make_trainer(spec, batches, None, torch.device("cuda"), tmp_path)
        made.restore_batches()
        for step in range(made.steps, steps):
            made.step(made.read_batch(step + 1))
        return made

    with fake_gpu():
        whole = trainer(30)
        trainer(20).save()
        resumed = trainer(30)
        assert all(isinstance(v, GPUTensor) for v in resumed.sae.state_dict().values())
        state = {name: weight.cpu() for name, weight in whole.sae.state_dict().items()}
        assert same(state, dict(resumed.sae.state_dict()))


def test_the_untrained_control_is_made_on_the_device(lm):
    "Of batches of the host, and of a stream whose batches are on the GPU."

    def stream(model):
        return StreamBatches(model, TokenRows(TOKENS), 1, batch_size=20, seed=0, buffer=50)

    spec = small("random")
    wide = replace(spec, sae=replace(spec.sae, d_in=32))
    here = stream(lm)
    expected = [
        untrained_sae(spec, WorldBatches(PlantedWorld(WORLD), 32, 0)),
        untrained_sae(wide, here),
    ]
    fresh = [next(here)]
    with fake_gpu():
        there = stream(replace(lm, model=copy.deepcopy(lm.model).to("cuda")))
        planted = WorldBatches(PlantedWorld(WORLD), 32, 0)
        found = [untrained_sae(spec, planted, "cuda"), untrained_sae(wide, there, "cuda")]
        for a, b in zip(expected, found):
            assert isinstance(b.threshold, GPUTensor)
            assert same(dict(a.state_dict()), dict(b.state_dict()))
        assert measure_l0(expected[1], fresh) == measure_l0(found[1], [next(there)])


def test_a_trainer_is_freed_without_the_garbage_collector():
    "The memory of one pass is free before the next: nothing refers back to the trainer."
    steps("topk+atm", "cpu", 1)  # PyTorch's import of its compiler holds the first optimiser
    gc.collect()
    gc.disable()
    try:
        trainer, _ = steps("topk+atm", "cpu", 12)
        held = [trainer, trainer.optimiser, trainer.sae, trainer.sae.W_dec, trainer.batches]
        refs = [weakref.ref(thing) for thing in held]
        del trainer, held
        assert [ref() for ref in refs] == [None] * 5
    finally:
        gc.enable()


def test_training_takes_a_device_without_float64(monkeypatch):
    "Weights are compared, and the L0 is measured, where float64 numbers can be."
    spec = small("topk+atm", precision="fp32", fast=False)
    two = SimpleNamespace(size=2, low=lambda sums: sums, high=lambda sums: sums)
    with fake_gpu(float64=False):
        with pytest.raises(TypeError, match="no float64"):
            torch.ones(2).to("cuda").double()
        batches = WorldBatches(PlantedWorld(WORLD), spec.train.batch_size, spec.seed)
        trainer = make_trainer(spec, batches, None, torch.device("cuda"))
        for step in range(6):
            trainer.step(trainer.read_batch(step + 1))
        assert measure_l0(trainer.sae, [next(batches)]) > 0
        monkeypatch.setattr(GPUTensor, "device", property(lambda tensor: torch.device("mps")))
        trainer.ranks = two
        trainer.check_weights()


@pytest.mark.parametrize("sparse", [False, True])
def test_statistics_of_half_precision_are_added_up_in_single(sparse):
    "1,001 of 1,024 samples are active: bfloat16 has no such number."
    z = (torch.arange(1024) < 1001).bfloat16()[:, None] * torch.tensor([1.0, 3.0]).bfloat16()
    active, values = DenseSet(1024), z
    if sparse:
        rows, cols = z.nonzero().unbind(1)
        active, values = ActiveSet(rows, cols, 1024, 2), z[rows, cols]
    share = frequency(values, active)
    assert share.dtype == torch.float32 and share.tolist() == [1001 / 1024] * 2
    assert magnitude(values, active).tolist() == [1001 / 1024, 3003 / 1024]
    control = L0Control(2.0)
    control.observe(share.sum())
    assert control.error.dtype == torch.float32


@pytest.mark.parametrize("effect", EFFECTS)
def test_contributions_of_half_precision_are_in_single(effect):
    h, grad = torch.tensor([[1.0078125]]).bfloat16(), torch.tensor([[-1.0078125]]).bfloat16()
    found = contribution(h, grad, torch.tensor([[1.0]]), DenseSet(1), effect=effect)
    square = 1.0078125**2  # bfloat16 has no such number
    expected = {"exact": 2 * square, "first-order": square, "norm": square}[effect]
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected, rel=1e-6)


def test_the_l0_penalty_of_half_precision_counts_in_single():
    sae = SAE(SAEConfig(8, 16, architecture="jumprelu", target_l0=3))
    pre = torch.ones(1001, 1).bfloat16()
    count = step_of(pre, torch.zeros(1), 0.2)
    assert count.dtype == torch.bfloat16
    batch = MaskedBatch(pre, pre, DenseSet(1001), SimpleNamespace(threshold=torch.zeros(1)))
    single = MaskedBatch(pre.float(), pre, DenseSet(1001), batch.weights)
    assert sae.architecture.penalty(batch) == sae.architecture.penalty(single)


# --- model and evaluation


@pytest.fixture(scope="module")
def sae(lm):
    x = read_site(lm, TOKENS, 1).flatten(0, 1)
    config = SAEConfig(32, 64, architecture="jumprelu", target_l0=6)
    return calibrate_l0(random_sae(config), x, 6, centre=True)


@pytest.fixture(scope="module")
def words(lm):
    "A task in which every letter counts, though the model's weights are random."
    task = build_task(lm, 1, max_words=300)
    return replace(task, f1=torch.ones(26), b=task.b + 100)


def absorption(lm, sae, words, protocol):
    config = AbsorptionConfig(min_letters=1, max_candidates=8, min_f1=-1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = evaluate_absorption(sae, words, config, lm, protocol=protocol)
    numbers = (t.select_dtypes("number").to_numpy() for t in (result.letters, result.words))
    return list(numbers)


def task(lm, sae, words):
    made = build_task(lm, 1, max_words=150)
    return [made.x, made.W, made.b, made.f1, made.swap.n, made.swap.n_pairs]


def swaps(lm, sae, words):
    table, tokens, at = word_prompts(lm, TaskSpec(1, max_words=100))
    found = swap_words(lm, tokens, int(at[0]), letter_indices(table.letter), [0, 1], n_pairs=16)
    return [[r.n, r.right, r.n_pairs] for r in found]


def reading(lm, sae, words):
    _, tokens, at = word_prompts(lm, TaskSpec(1, max_words=100))
    return word_activations(lm, tokens, int(at[0]), [0, 1])


def probing(lm, sae, words):
    "Half of the texts say one thing, the others another."
    texts = [f"file {i} is {'closed' if i % 2 else 'opened'} again" for i in range(24)]
    odd = [bool(i % 2) for i in range(24)]
    parts = (tuple(texts[:16]), tuple(odd[:16]), tuple(texts[16:]), tuple(odd[16:]))
    return score_probing(sae, build_probing(lm, 1, [ProbingTask("a", "g", *parts)])).summary


def activations(lm):
    return read_site(lm, TOKENS, 1).flatten(0, 1)


EVALUATIONS = dict(
    extraction=lambda lm, sae, words: read_site(lm, TOKENS, 1, batch_size=4),
    extraction_at=lambda lm, sae, words: read_site(lm, TOKENS, 1, at=torch.arange(6), batch_size=4),
    losses=lambda lm, sae, words: next_token_losses(lm, TOKENS, 4),
    spliced=lambda lm, sae, words: spliced_metrics(sae, lm, 1, TOKENS, 4),
    reconstruction=lambda lm, sae, words: reconstruction_metrics(sae, activations(lm), 50),
    reconstruction_of_host=lambda lm, sae, words: reconstruction_metrics(
        sae, activations(lm).cpu(), 50
    ),
    frequency=lambda lm, sae, words: activation_frequency(sae, activations(lm), 50),
    agreement=lambda lm, sae, words: dictionary_agreement(sae, sae),
    task=task,
    swaps=swaps,
    reading=reading,
    probing=probing,
    absorption=lambda lm, sae, words: absorption(lm, sae, words, "exact"),
    absorption_as_published=lambda lm, sae, words: absorption(lm, sae, words, "saebench"),
    effects=lambda lm, sae, words: integrated_effects(sae, lm, words, torch.arange(4)),
)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation_stays_on_the_device(name, lm, sae, words):
    "It gives the numbers of the CPU, and no tensor of the host meets one of the GPU."
    run = EVALUATIONS[name]
    expected = run(lm, sae, words)
    with fake_gpu():
        on_gpu = replace(lm, model=copy.deepcopy(lm.model).to("cuda"))
        found = run(on_gpu, copy.deepcopy(sae).to("cuda"), words)
        assert same(expected, found)


def test_planted_scores_stay_on_the_device():
    sae = SAE(SAEConfig(8, 16, architecture="topk", k=3))
    for measure in (planted_metrics, synthsaebench_metrics):
        expected = measure(sae, PlantedWorld(WORLD), 300)
        with fake_gpu():
            on_gpu = copy.deepcopy(sae).to("cuda")
            assert same(expected, measure(on_gpu, PlantedWorld(WORLD), 300))


def file_run(tmp_path):
    "A run whose SAE is read from its file each time that nothing holds it."
    spec = small("topk")
    SAE(spec.sae).requires_grad_(False).save(tmp_path / "sae")
    return Run(spec, SAEFile(spec, tmp_path), None, tmp_path)


def test_runs_are_scored_on_the_default_device(tmp_path, monkeypatch):
    "The SAE is moved once, held while it is scored, and the caller's SAE stays where it is."
    held, places = file_run(tmp_path), []

    def score(run):
        places.append((run.sae.W_dec.device.type, run.sae is run.sae))
        return planted_metrics(run.sae, PlantedWorld(WORLD), 300)

    own = held.sae
    expected = score_runs(score, [held], "planted", progress=False)
    monkeypatch.setattr(tables, "pick_device", lambda name: torch.device("cuda"))
    with fake_gpu():
        found = score_runs(score, [held] * 8, "planted", progress=False)
    assert places == [("cpu", True)] + [("cuda", True)] * 8
    assert own.W_dec.device.type == "cpu" and held.sae is own
    (row,) = expected.select_dtypes("number").to_dict("records")
    assert all(same(row, line) for line in found[[*row]].to_dict("records"))


def test_frozen_movement_is_measured_on_the_device(cache):
    run = get_run(small("atm"), progress=False)
    expected = frozen_movement(run, (4, 8), 2)
    with fake_gpu():
        there = replace(run, source=copy.deepcopy(run.sae).to("cuda"))
        assert same(expected, frozen_movement(there, (4, 8), 2))


def copies(lm, batch_size, run):
    with fake_gpu() as counts:
        on_gpu = replace(lm, model=copy.deepcopy(lm.model).to("cuda"))
        on_gpu.returns_tuple  # noqa: B018 (runs the model once)
        counts.clear()
        run(on_gpu, batch_size)
        return Counter(counts)


def test_a_batch_of_the_spliced_model_waits_for_the_gpu_a_few_times(lm, sae):
    def run(on_gpu, batch_size):
        spliced_metrics(copy.deepcopy(sae).to("cuda"), on_gpu, 1, TOKENS, batch_size)

    two, six = copies(lm, 3, run), copies(lm, 1, run)
    assert six["to_host"] == two["to_host"]
    assert six["sizes"] - two["sizes"] <= 4 * 4  # for each of four more batches
    one = copies(lm, 1, lambda lm, n: plain_pass(lm, TOKENS[:1]))
    passes = 4  # read the inputs, untouched, zeros, SAE
    assert six["reads"] - two["reads"] <= 4 * (passes * one["reads"] + 2)


def test_a_batch_of_words_waits_for_the_gpu_four_times(sae, words):
    "For the number of its entries, and for their values, columns and rows."
    expected, _ = encode_words(sae, words.x, 100)
    with fake_gpu() as counts:
        found, _ = encode_words(copy.deepcopy(sae).to("cuda"), words.x, 100)
        batches = -(-len(words.x) // 100)
        assert counts["sizes"] == batches and counts["to_host"] == 3 * batches
    assert (expected != found).nnz == 0 and (expected.indptr == found.indptr).all()


def plain_pass(lm, rows):
    with torch.no_grad():
        lm.model(input_ids=rows.to(lm.device), use_cache=False)


def test_extraction_waits_no_more_than_the_model_itself(lm):
    ours = copies(lm, 2, lambda lm, n: read_site(lm, TOKENS, 1, batch_size=n))
    rows = TOKENS.split(2)
    plain = copies(lm, 2, lambda lm, n: [plain_pass(lm, r) for r in rows])
    assert ours["to_host"] == 0 and ours["reads"] <= plain["reads"]
    assert ours["to_gpu"] <= plain["to_gpu"]


def test_ordinary_tokens_are_found_without_a_wait(lm):
    expected = token_activations(lm, TOKENS, 1, "bfloat16")
    with fake_gpu() as counts:
        on_gpu = replace(lm, model=copy.deepcopy(lm.model).to("cuda"))
        counts.clear()
        found = token_activations(on_gpu, TOKENS, 1, "bfloat16")
        assert counts["sizes"] == counts["to_host"] == 0
        assert same(expected, found)


def test_the_buffer_of_a_stream_is_on_the_device(lm):
    def batches(model):
        return StreamBatches(model, TokenRows(TOKENS), 1, batch_size=8, seed=0, buffer=50)

    here = batches(lm)
    expected = [next(here) for _ in range(8)]
    with fake_gpu() as counts:
        on_gpu = replace(lm, model=copy.deepcopy(lm.model).to("cuda"))
        there = batches(on_gpu)
        counts.clear()
        assert same(expected[:4], [next(there) for _ in range(4)])
        assert counts["to_host"] == 4  # by `same`
        state, resumed = there.state_dict(), batches(on_gpu)
        state |= {name: state[name].cpu() for name in ("buffer", "rest")}
        resumed.load_state_dict(state)
        assert isinstance(resumed.buffer, GPUTensor) and isinstance(resumed.rest, GPUTensor)
        assert same(expected[4:], [next(resumed) for _ in range(4)])


def test_importance_is_read_on_the_device(lm):
    def importance(device):
        batches = WorldBatches(PlantedWorld(WORLD), 32, 0)
        sae = SAE(SAEConfig(8, 16, architecture="topk", k=3)).to(device)
        masker = make_masker(ATMConfig(), 16, 10, device)
        return read_without_learning(sae, masker, batches, 3, generator(0))

    expected = importance("cpu")
    with fake_gpu():
        assert same(expected, importance("cuda"))


def test_one_thread_runs_the_batches_of_a_gpu(lm):
    assert [*in_threads(lambda lm, i: (i, torch.get_num_threads()), lm, range(5), 2)] == [
        (i, 1) for i in range(5)
    ]
    with fake_gpu():
        on_gpu = replace(lm, model=copy.deepcopy(lm.model).to("cuda"))
        assert share_weights(on_gpu, 4) == [on_gpu]
        assert [*in_threads(lambda lm, i: lm is on_gpu, on_gpu, range(3), 4)] == [True] * 3


def test_numbers_move_from_a_device_without_float64():
    x = torch.ones(2)
    assert with_float64(x) is x
    mps = SimpleNamespace(device=SimpleNamespace(type="mps"), cpu=lambda: x)
    assert with_float64(mps) is x


# --- a device without float64


@pytest.fixture
def mps(monkeypatch):
    "The fake GPU calls itself 'mps', and a float64 tensor there is an error."
    make = GPUTensor.__new__

    def checked(cls, held, requires_grad=False):
        if held.dtype == torch.float64:
            raise TypeError("MPS has no float64")
        return make(cls, held, requires_grad)

    def is_mps(device):
        return device is not None and torch.device(device).type in ("cuda", "mps", "meta")

    def as_meta(device):
        return torch.device("meta") if is_mps(device) else device

    monkeypatch.setattr(fake, "GPU", torch.device("mps", 0))
    monkeypatch.setattr(fake, "_is_gpu", is_mps)
    monkeypatch.setattr(fake, "_as_meta", as_meta)
    monkeypatch.setattr(GPUTensor, "__new__", checked)


def moves(x):
    return movement(x[0], x[1])


def test_float64_is_used_on_the_cpu_alone(mps):
    sae = SAE(SAEConfig(8, 16, architecture="topk", k=3)).requires_grad_(False)
    x = torch.rand(2, 16, generator=generator(0)) + 0.1
    rows = torch.randn(50, 8, generator=generator(1))
    world = PlantedWorld(WORLD)
    expected = moves(x), reconstruction_metrics(sae, rows), planted_metrics(sae, world, 300)
    expected += (synthsaebench_metrics(sae, world, 300),)
    with fake_gpu():
        with pytest.raises(TypeError, match="no float64"):
            x.to("cuda").double()
        there = copy.deepcopy(sae).to("cuda")
        found = moves(x.to("cuda")), reconstruction_metrics(there, rows)
        found += planted_metrics(there, world, 300), synthsaebench_metrics(there, world, 300)
        assert same(expected, found)
