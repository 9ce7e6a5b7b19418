"Text and activations that come as they are needed: the same rows as from a whole text, a place that can be saved, killed builds that go on, memory that stays."

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from atm_sae.data import activations as module
from atm_sae.data.activations import (
    ActivationCache,
    ActivationSpec,
    activation_key,
    build_cache,
    get_activations,
    read_ahead,
)
from atm_sae.data.batches import StreamBatches, held_out_activations, stream_activations
from atm_sae.artefacts import OutputError
from atm_sae.data.lm import save_lm, tiny_lm
from atm_sae.data.text import (
    PackedRows,
    TokenRows,
    documents_checksum,
    open_documents,
    pack_tokens,
    python_docs,
)
from atm_sae.methods import METHODS
from atm_sae.train.runs import get_run, is_complete, recipe, run_folder

DOCS = [d[:400] for d in python_docs()[:200] if d.strip()]
TRAINED = [d for i, d in enumerate(DOCS) if i % 20]  # the others are held out


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory):
    "A model and a text on disk."
    folder = tmp_path_factory.mktemp("files")
    save_lm(lm, folder / "model")
    (folder / "text.jsonl").write_text(
        "".join(json.dumps(dict(text=d)) + "\n" for d in DOCS), encoding="utf-8"
    )
    return folder


@pytest.fixture
def spec(folder):
    return ActivationSpec(
        model=str(folder / "model"),
        layer=1,
        n_tokens=3200,
        context=32,
        text=str(folder / "text.jsonl"),
    )


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "home"))
    return tmp_path / "home"


def packed(lm, docs=DOCS, context=32, chunk=7):
    return PackedRows(lm.tokenizer, lambda n: iter(docs[n:]), context, chunk)


# ---- text


@pytest.mark.parametrize("sizes", [[1] * 30, [30], [7, 23], [2, 28]])
def test_rows_are_those_of_the_whole_text(lm, sizes):
    rows = packed(lm)
    assert torch.equal(
        torch.cat([rows.take(n) for n in sizes]), pack_tokens(lm.tokenizer, DOCS, 32)[:30]
    )


@pytest.mark.parametrize("before", [0, 1, 9, 40])
def test_a_place_is_restored(lm, before):
    rows, again = packed(lm), packed(lm)
    rows.take(before)
    state = rows.state_dict()
    following = rows.take(60)
    again.load_state_dict(state)
    assert torch.equal(again.take(60), following)


def test_a_text_is_read_again(lm):
    rows, n = packed(lm, DOCS[:5]), len(pack_tokens(lm.tokenizer, DOCS[:5], 32))
    assert torch.equal(rows.take(3 * n), pack_tokens(lm.tokenizer, DOCS[:5] * 4, 32)[: 3 * n])


def test_a_text_without_documents(lm):
    with pytest.raises(ValueError, match="the text holds no documents"):
        packed(lm, []).take(1)


def test_documents_of_files(folder):
    assert list(open_documents(str(folder / "text.jsonl"), start=100)) == DOCS[100:]
    assert documents_checksum(str(folder / "text.jsonl")) == documents_checksum(
        str(folder / "text.jsonl")
    )


def test_a_changed_text_is_another(folder, spec, tmp_path):
    other = shutil.copy(folder / "text.jsonl", tmp_path / "text.jsonl")
    before = activation_key(replace(spec, text=str(other)))
    with open(other, "a") as f:
        f.write('{"text": "more"}\n')
    assert activation_key(replace(spec, text=str(other))) != before


def test_read_ahead_keeps_order_and_passes_errors_on():
    def items():
        yield 1
        yield 2
        raise ValueError("no more")

    got = []
    with pytest.raises(ValueError, match="no more"):
        for i in read_ahead(items(), 3):
            got.append(i)
    assert got == [1, 2] and [*read_ahead([])] == []


# ---- shards


@pytest.fixture
def shards(monkeypatch):
    monkeypatch.setattr(
        module, "SHARD_BYTES", 40_000
    )  # 9 token rows of 32 x 32 floats, 8 with batches of 4


def test_shards_hold_what_one_file_holds(lm, tmp_path, monkeypatch):
    whole = build_cache(
        lm, packed(lm), 1, tmp_path / "one", n_rows=30, batch_size=4, progress=False
    )
    monkeypatch.setattr(module, "SHARD_BYTES", 40_000)
    many = build_cache(
        lm, packed(lm), 1, tmp_path / "many", n_rows=30, batch_size=4, progress=False
    )
    assert (
        len(whole.shards) == 1
        and len(many.shards) == 4
        and torch.equal(many.rows(slice(None)), whole.rows(slice(None)))
    )
    at = np.random.default_rng(0).permutation(len(many))[:200]
    assert torch.equal(many.rows(at), whole.rows(at)) and torch.equal(
        many.rows(slice(100, 400, 7)), whole.rows(slice(100, 400, 7))
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["many", "one"]


KILLED = """
import os, signal, sys
from atm_sae.data import activations as module
from atm_sae.activations import ActivationSpec, get_activations
module.SHARD_BYTES, run, left = 40_000, module._activations, int(sys.argv[1])
def run_and_die(*args):
    global left
    left -= 1
    if left < 0: os.kill(os.getpid(), signal.SIGKILL)
    return run(*args)
module._activations = run_and_die
get_activations(ActivationSpec(**__import__('json').loads(sys.argv[2])), batch_size=4)
"""


def killed(code, *args):
    "Run code in a process that kills itself."
    env = os.environ | dict(
        OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([os.path.dirname(__file__), *sys.path])
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def plain(spec):
    return json.dumps({k: v for k, v in vars(spec).items() if k != "lines"})


def test_a_killed_build_goes_on_where_it_was(spec, shards, home, monkeypatch):
    straight = get_activations(spec, batch_size=4)
    kept = straight.meta
    shutil.rmtree(home)
    killed(KILLED, 7, plain(spec))  # in the fourth shard of two batches each
    assert not straight.folder.exists()
    ran, run = [], module._activations
    monkeypatch.setattr(module, "_activations", lambda *a: ran.append(a[4]) or run(*a))
    assert get_activations(spec, batch_size=4).meta == kept and ran[0] == 24 and len(ran) == 25 - 6


def test_a_build_of_another_text_is_begun_anew(spec, shards, home, lm, tmp_path):
    killed(KILLED, 7, plain(spec))
    (building,) = (home / "activations").iterdir()
    building.rename(
        home / "activations" / f".{activation_key(replace(spec, n_tokens=1600))}.building"
    )  # as if it were this one's
    made = get_activations(replace(spec, n_tokens=1600), batch_size=4)
    assert torch.equal(
        made.rows(slice(None)),
        build_cache(
            lm, packed(lm, TRAINED), 1, tmp_path / "x", n_rows=50, batch_size=4, progress=False
        ).rows(slice(None)),
    )


def test_a_model_that_changes_while_it_is_loaded(spec, monkeypatch):
    monkeypatch.setattr(module, "model_checksum", lambda name: "google/gemma-2-2b@abc")
    with pytest.raises(
        ValueError,
        match="has changed: google/gemma-2-2b@abc was to be run, .* was loaded. Run again",
    ):
        get_activations(spec)


def test_a_text_needs_a_number_of_rows(lm, tmp_path):
    with pytest.raises(ValueError, match="say how many rows of it to take"):
        build_cache(lm, packed(lm), 1, tmp_path / "x", progress=False)


def test_two_that_want_the_same_store_build_it_once(spec, shards, monkeypatch):
    rows, run = [], module._activations
    monkeypatch.setattr(
        module,
        "_activations",
        lambda lm, tokens, *a: rows.append(len(tokens)) or run(lm, tokens, *a),
    )
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: get_activations(spec, batch_size=4), range(2))
    assert (
        one.folder == two.folder
        and torch.equal(one.rows(slice(None)), two.rows(slice(None)))
        and sum(rows) == -(-spec.n_tokens // spec.context)
    )


def test_a_truncated_shard(spec, shards):
    made = get_activations(spec, batch_size=4)
    path = made.folder / "activations-00002.bin"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        ValueError,
        match="activations-00002.bin is truncated or not its own: .* bytes, expected .*: delete .* and run again",
    ):
        ActivationCache.open(made.folder)


def test_a_disk_that_is_too_small(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(
        module.shutil,
        "disk_usage",
        lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 50_000, 50_000),
    )
    with pytest.raises(
        OutputError,
        match=r"x needs 0.0 GB and its disk has 0.0 GB free. What to do: free some space, set ATM_SAE_CACHE",
    ):
        build_cache(lm, packed(lm), 1, tmp_path / "x", n_rows=30, progress=False)
    assert list(tmp_path.iterdir()) == []


# ---- without a store


def test_a_buffer_gives_what_the_text_holds(lm, tmp_path):
    stream = StreamBatches(lm, packed(lm), 1, 16, seed=0, buffer=200, lm_batch=4)
    out = torch.cat(
        [*[next(stream) for _ in range(20)], stream.buffer, stream.state_dict()["rest"]]
    )
    whole = build_cache(
        lm, packed(lm), 1, tmp_path / "x", n_rows=40, batch_size=4, progress=False
    ).rows(slice(0, len(out)))
    key = lambda x: x[x[:, 0].argsort()]
    assert (
        torch.allclose(key(out), key(whole), atol=1e-6)
        and len(stream.buffer) == 200
        and len(stream.state_dict()["rest"]) < 4 * 32
    )


def test_batches_are_mixed_over_the_buffer(lm, monkeypatch):
    """Activations that are their own number. Of 16 that come in together, 16 * 16 / 320 = 0.8 are drawn with the next batch on average; a row is drawn after 20 batches on average,
    and 400 draws bring that mean to within 20 / 20 = 1 (one standard deviation)."""
    count = itertools.count()
    monkeypatch.setattr(
        module,
        "_activations",
        lambda lm, tokens, *a: torch.tensor([float(next(count)) for _ in range(tokens.numel())])[
            :, None
        ].expand(-1, lm.d_model),
    )
    stream = StreamBatches(lm, packed(lm), 1, 16, seed=0, buffer=320, lm_batch=4)
    drawn = [next(stream)[:, 0] for _ in range(80)]
    late = torch.cat(
        [i - (d[d >= 320] - 320).div(16, rounding_mode="floor") for i, d in enumerate(drawn)]
    )
    assert (
        len(torch.cat(drawn).unique()) == 80 * 16
        and late.min() >= 1
        and 15 < late[-400:].mean() < 25
    )
    monkeypatch.undo()
    a, b = (
        StreamBatches(lm, packed(lm), 1, 16, seed=0, buffer=320, lm_batch=4),
        StreamBatches(lm, packed(lm), 1, 16, seed=1, buffer=320, lm_batch=4),
    )
    assert not torch.equal(next(a), next(b))


def test_held_out_documents_are_those_that_training_leaves_out(lm, spec, monkeypatch):
    read = []
    monkeypatch.setattr(
        module, "PackedRows", lambda tokenizer, documents, context: read.append(documents)
    )
    for s in (spec, replace(spec, buffer=100), replace(spec, held_out=True)):
        module.token_rows(s, lm)
    stored, streamed, kept = read
    assert list(stored(0)) == list(streamed(0)) == TRAINED and list(kept(0)) == DOCS[::20]
    for n in (1, 18, 19, 20, 100):
        assert list(streamed(n)) == TRAINED[n:]
    assert list(kept(3)) == DOCS[60::20]


def test_held_out_activations_of_a_stream(spec, lm, tmp_path):
    x = held_out_activations(replace(spec, buffer=100), 50)
    whole = build_cache(
        lm, packed(lm, DOCS[::20]), 1, tmp_path / "x", n_rows=13, progress=False
    )  # 8 x 50 tokens, 32 a row
    assert x.shape == (50, 32) and all(
        (whole.rows(slice(None)) - v).abs().sum(1).min() < 1e-4 for v in x[:5]
    )


MEMORY = """
import json, resource, sys
from atm_sae.activations import ActivationSpec, get_activations
spec = ActivationSpec(**json.loads(sys.argv[1]))
get_activations(spec)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_text(spec):
    "Ten times the tokens, 13 MB more of activations: the peak (some 700 MB, of PyTorch) moves by less than 8 MB."
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path))
    few, many = (
        int(
            subprocess.run(
                [sys.executable, "-c", MEMORY, plain(replace(spec, n_tokens=n))],
                env=env,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for n in (12_800, 128_000)
    )
    assert many - few < 8, (few, many)


def test_a_buffer_that_is_too_small(lm):
    with pytest.raises(
        ValueError, match="a buffer of 8 cannot give batches of 16: choose a larger one"
    ):
        StreamBatches(lm, packed(lm), 1, 16, seed=0, buffer=8)


def test_a_state_of_another_stream(spec, folder):
    state = stream_activations(replace(spec, buffer=100), 16, 0).state_dict()
    with pytest.raises(
        ValueError, match="name is .*, not .*; resume with the model, text and settings"
    ):
        stream_activations(replace(spec, buffer=100, layer=2), 16, 0).load_state_dict(state)
    with pytest.raises(ValueError, match="seed is 0, not 1"):
        stream_activations(replace(spec, buffer=100), 16, 1).load_state_dict(state)


training = sys.modules["atm_sae.train.loop"]


def run_spec(method, folder, buffer):
    data = ActivationSpec(
        model=f"{folder}/model",
        layer=1,
        n_tokens=3200,
        context=32,
        text=f"{folder}/text.jsonl",
        buffer=buffer,
    )
    return recipe(
        method, data, 32, 48, l0=4, steps=30, batch_size=32, log_every=5, checkpoint_every=6
    )


def run_and_die(spec, left, cache):
    "Make a run, in a process of its own, that kills itself before a step."
    os.environ["ATM_SAE_CACHE"], step = cache, training._train_step

    def step_and_die(t, x):
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(t, x)

    training._train_step = step_and_die
    get_run(spec)


@pytest.fixture(scope="module")
def processes():
    "Quick to start, and without this process's threads."
    context = get_context("forkserver")
    context.set_forkserver_preload(["atm_sae.train.runs", __name__])
    return context


@pytest.mark.parametrize("buffer", [0, 400])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "random"])
def test_killed_at_a_random_step_and_resumed_to_the_bit(
    method, buffer, folder, home, monkeypatch, tmp_path, processes
):
    spec, left = (
        run_spec(method, folder, buffer),
        6 + sum(map(ord, method + str(buffer))) % 24,
    )  # any step with a checkpoint behind it
    if spec.data.buffer == 0:
        get_activations(spec.data)
    training._twin_rates(spec)  # a blind control's twin is made before
    child = processes.Process(target=run_and_die, args=(spec, left, os.environ["ATM_SAE_CACHE"]))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not is_complete(spec) and (run_folder(spec) / "checkpoint.safetensors").exists()
    resumed = get_run(spec)
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "straight"))
    straight = get_run(spec)
    for n, w in straight.sae.state_dict().items():
        assert torch.equal(w, resumed.sae.state_dict()[n]), n
    assert straight.history.table.equals(resumed.history.table)
