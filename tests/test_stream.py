"""Text and activations that come as they are needed: the same rows as from a whole text, a place
that can be saved, killed builds that go on, memory that stays."""

import re
import itertools
import json
import os
import shutil
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from forks import forked
from small import asked_devices, documents, make_and_die, weights

from atm_sae.data import activations as module
from atm_sae.data import batches as reader
from atm_sae.data.activations import (
    ActivationCache,
    ActivationSpec,
    activation_key,
    build_cache,
    get_activations,
    read_ahead,
)
from atm_sae.data.batches import (
    AheadBatches,
    StreamBatches,
    held_out_activations,
    held_out_tokens,
    stream_activations,
)
from atm_sae.artefacts import OutputError
from atm_sae.data import letters
from atm_sae.data.letters import LineConfig
from atm_sae.data.lm import load_lm
from atm_sae.data.text import (
    PackedRows,
    documents_checksum,
    open_documents,
    pack_tokens,
)
from atm_sae.methods import METHODS, twin_method
from atm_sae.train import runs
from atm_sae.train.loop import state_hash
from atm_sae.train.runs import get_run, is_complete, recipe, run_folder, run_grid, train_many

DOCS = documents(200)
TRAINED = [d for i, d in enumerate(DOCS) if i % 20]  # the others are held out


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    "The documents in a file."
    path = tmp_path_factory.mktemp("files") / "text.jsonl"
    path.write_text("".join(json.dumps(dict(text=d)) + "\n" for d in DOCS), encoding="utf-8")
    return path


@pytest.fixture
def spec(model_folder, text):
    return ActivationSpec(
        model=str(model_folder), layer=1, n_tokens=3200, context=32, text=str(text)
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


def test_documents_of_files(text):
    assert list(open_documents(str(text), start=100)) == DOCS[100:]


def test_a_changed_text_is_another(text, spec, tmp_path):
    other = shutil.copy(text, tmp_path / "text.jsonl")
    assert documents_checksum(str(other)) == documents_checksum(str(text))
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


def build_and_die(spec, left):
    "Build a store in small shards, and kill this process after some batches."
    run = module.token_activations

    def run_and_die(*args):
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(*args)

    module.SHARD_BYTES, module.token_activations = 40_000, run_and_die
    get_activations(spec, batch_size=4)


def test_a_killed_build_goes_on_where_it_was(spec, shards, home, monkeypatch):
    straight = get_activations(spec, batch_size=4)
    kept = straight.meta
    shutil.rmtree(home)
    ended = forked(build_and_die, spec, 7)  # in the fourth shard of two batches each
    assert ended.status == -signal.SIGKILL, ended.said
    assert not straight.folder.exists()
    ran, run = [], module.token_activations
    monkeypatch.setattr(module, "token_activations", lambda *a: ran.append(a[4]) or run(*a))
    assert get_activations(spec, batch_size=4).meta == kept and ran[0] == 24 and len(ran) == 25 - 6


def test_a_build_of_another_text_is_begun_anew(spec, shards, home, lm, tmp_path):
    assert forked(build_and_die, spec, 7).status == -signal.SIGKILL
    (building,) = (home / "activations").glob(".*.building")
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
    rows, run = [], module.token_activations
    monkeypatch.setattr(
        module,
        "token_activations",
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
    path = made.folder / "activations-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        ValueError,
        match="activations-00002.safetensors is truncated or not its own: .* bytes, expected .*:"
        " delete .* and run again",
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
        match=r"x needs \d+ kB, \d+ kB more than the 50 kB that its disk has free. What to do: ",
    ):
        build_cache(lm, packed(lm), 1, tmp_path / "x", n_rows=30, progress=False)
    assert list(tmp_path.iterdir()) == []


# ---- without a cache


def test_a_state_with_nothing_left_over_has_a_hash():
    "Ranks compare hashes; NumPy gives an empty array a stride of 0, which PyTorch cannot view."
    empty = np.arange(3)[3:].copy()
    state = dict(place=dict(read=1, rest=empty), n=torch.tensor(3))
    assert state_hash(state) != state_hash(state | dict(n=torch.tensor(4)))


def test_a_buffer_gives_what_the_text_holds(lm, tmp_path):
    stream = StreamBatches(lm, packed(lm), 1, 16, seed=0, buffer=200, lm_batch=4)
    out = torch.cat(
        [*[next(stream) for _ in range(20)], stream.buffer, stream.state_dict()["rest"]]
    )
    whole = build_cache(
        lm, packed(lm), 1, tmp_path / "x", n_rows=40, batch_size=4, progress=False
    ).rows(slice(0, len(out)))
    out, whole = (x[x[:, 0].argsort()] for x in (out, whole))
    assert torch.allclose(out, whole, atol=1e-6)
    assert len(stream.buffer) == 200 and len(stream.state_dict()["rest"]) < 4 * 32


def test_batches_are_mixed_over_the_buffer(lm, monkeypatch):
    """Activations that are their own number. Of 16 that come in together, 16 * 16 / 320 = 0.8 are
    drawn with the next batch on average; a row is drawn after 20 batches on average, and 400 draws
    bring that mean to within 20 / 20 = 1 (one standard deviation)."""
    count = itertools.count()
    monkeypatch.setattr(
        reader,
        "token_activations",
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
    # 20 batches take each place once: all that was in the buffer at first, and none of it later
    first = torch.cat(drawn[:20])
    assert (first < 320).sum() == 320 and (torch.cat(drawn[20:]) >= 320).all()
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


def seen_documents(lm, rows, marks):
    "The marks that occur in rows of tokens."
    said = lm.tokenizer.decode(rows.flatten().tolist())
    return {mark for mark in marks if f"<{mark}>" in said}


def test_a_stream_of_the_default_text_leaves_documents_out(lm, monkeypatch):
    "Documents by number: 0, 20, 40, ... are in the held-out rows alone."
    monkeypatch.setattr(module, "python_docs", lambda: [f" document <{i}>" for i in range(400)])
    spec = ActivationSpec(n_tokens=6400, context=32, line_share=0.3, buffer=100)
    trained, kept = (
        seen_documents(lm, module.token_rows(s, lm).take(200), range(400))
        for s in (spec, replace(spec, held_out=True))
    )
    assert len(trained) > 300 and all(i % 20 for i in trained)
    assert len(kept) > 15 and not any(i % 20 for i in kept)


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_letter_lines_of_a_stream_are_of_no_training_stream(lm, seed, monkeypatch):
    monkeypatch.setattr(module, "python_docs", lambda: DOCS)
    spec = ActivationSpec(n_tokens=3200, context=32, line_share=1.0, buffer=100, seed=seed)
    kept = {
        tuple(r) for r in module.token_rows(replace(spec, held_out=True), lm).take(100).tolist()
    }
    for other in range(3):
        trained = module.token_rows(replace(spec, seed=other), lm).take(100).tolist()
        assert not kept & {tuple(r) for r in trained}


def test_held_out_activations_of_a_stream_of_the_default_text(lm, spec, monkeypatch):
    "They are those of the held-out documents."
    docs = [f"The {i}th text says what a short test needs." for i in range(200)]
    monkeypatch.setattr(module, "python_docs", lambda: docs)
    spec = replace(spec, text="", buffer=100, line_share=0.0, seed=1)
    read, rows = [], module.token_rows
    monkeypatch.setattr(module, "token_rows", lambda s, *a: read.append(s) or rows(s, *a))
    assert held_out_activations(spec, 50).shape == (50, 32)
    (held,) = read
    assert held.held_out and held.buffer == 100
    said = lm.tokenizer.decode(rows(held, lm).take(13).flatten().tolist())
    numbers = {int(n) for n in re.findall(r" (\d+)th text", said)}
    assert len(numbers) > 2 and all(n % 20 == 0 for n in numbers)


def test_given_texts_are_not_split(lm, spec):
    with pytest.raises(ValueError, match="give the held-out documents as texts"):
        module.token_rows(replace(spec, held_out=True), lm, ["one", "two"])


def test_rows_of_the_cached_default_text(monkeypatch):
    "Training reads the first nine tenths of the cache; held-out tokens lie behind them."
    monkeypatch.setattr(letters, "python_docs", lambda: DOCS)
    nano, spec = load_lm("nano-gemma2"), ActivationSpec(n_tokens=4096)
    rows = module.token_rows(spec, nano).take(32)
    lines = LineConfig(uniform=0.05)
    assert torch.equal(rows, letters.mixed_tokens(nano.tokenizer, 4096, 128, 0.7, lines, 0, DOCS))
    kept = held_out_tokens(spec, nano, 10_000)
    special = torch.tensor(nano.tokenizer.all_special_ids, dtype=rows.dtype)
    lengths = (~torch.isin(rows, special)).sum(1)
    first = len(rows) - len(kept)
    assert torch.equal(kept, rows[first:]) and len(kept) in (2, 3)
    assert lengths[:first].sum() >= int(0.9 * lengths.sum())  # CacheBatches ends before
    assert torch.equal(held_out_tokens(spec, nano, 128), kept[:1])
    with pytest.raises(ValueError, match="held out by rows.*use held_out_tokens"):
        module.token_rows(replace(spec, held_out=True), nano)
    with pytest.raises(ValueError, match="n_tokens=1000 holds no whole row.* at least 1280"):
        held_out_tokens(replace(spec, n_tokens=1000), nano, 128)


def test_held_out_activations_of_a_stream(spec, lm, tmp_path):
    x = held_out_activations(replace(spec, buffer=100), 50)
    whole = build_cache(
        lm, packed(lm, DOCS[::20]), 1, tmp_path / "x", n_rows=13, progress=False
    )  # 8 x 50 tokens, 32 a row
    assert x.shape == (50, 32) and all(
        (whole.rows(slice(None)) - v).abs().sum(1).min() < 1e-4 for v in x[:5]
    )


def peak_memory(spec):
    "The most that this process had in memory while it built a store, in MiB."
    get_activations(spec)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def test_memory_does_not_grow_with_the_text(spec):
    "Ten times the tokens, 13 MB more of activations: the peak moves by less than 8 MB."
    few, many = (forked(peak_memory, replace(spec, n_tokens=n)).value for n in (12_800, 128_000))
    assert many - few < 8, (few, many)


def test_a_buffer_that_is_too_small(lm):
    with pytest.raises(
        ValueError, match="a buffer of 8 cannot give batches of 16: choose a larger one"
    ):
        StreamBatches(lm, packed(lm), 1, 16, seed=0, buffer=8)


def test_a_state_of_another_stream(spec):
    state = stream_activations(replace(spec, buffer=100), 16, 0).state_dict()
    with pytest.raises(ValueError, match="name is .*, not .*; resume with the data and settings"):
        stream_activations(replace(spec, buffer=100, layer=2), 16, 0).load_state_dict(state)
    with pytest.raises(ValueError, match="seed is 0, not 1"):
        stream_activations(replace(spec, buffer=100), 16, 1).load_state_dict(state)


# ---- killed


def run_spec(data, method, buffer):
    "Few steps and few latents, and a checkpoint every fourth step."
    settings = dict(l0=4, steps=16, batch_size=32, log_every=3, checkpoint_every=4)
    return recipe(method, replace(data, buffer=buffer), 32, 48, **settings)


TRAINABLE = [m for m in METHODS if m != "random"]
# the state of a stream is the same for all methods
CASES = [(m, 0) for m in TRAINABLE] + [(m, 400) for m in ("topk", "matryoshka+atm", "dropout")]


@pytest.mark.parametrize("method, buffer", CASES)
def test_killed_at_a_random_step_and_resumed_to_the_bit(
    method, buffer, spec, monkeypatch, tmp_path
):
    spec = run_spec(spec, method, buffer)
    if buffer == 0:
        get_activations(spec.data)
    if twin_method(method) != method:  # the twin of a control is made before
        get_run(run_spec(spec.data, twin_method(method), buffer))
    last = 5 + sum(map(ord, method)) % 10  # any step with a checkpoint behind it
    ended = forked(make_and_die, spec, last)
    assert ended.status == -signal.SIGKILL, ended.said
    assert not is_complete(spec) and (run_folder(spec) / "checkpoint.safetensors").exists()
    resumed = get_run(spec)
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "straight"))
    straight = get_run(spec)
    assert weights(straight.sae) == weights(resumed.sae)
    assert straight.history.table.equals(resumed.history.table)


# ---- many SAEs on one pass


@pytest.mark.parametrize("buffer, make_all", [(0, train_many), (400, train_many), (400, run_grid)])
def test_many_saes_on_one_pass(buffer, make_all, spec, monkeypatch, tmp_path):
    "The same runs as each alone; the language model runs as often as for one of them."
    specs = [run_spec(spec, method, buffer) for method in ("topk", "atm", "matryoshka")]
    if buffer == 0:
        get_activations(specs[0].data)
    calls, real = [], reader.token_activations
    monkeypatch.setattr(reader, "token_activations", lambda *a: (calls.append(1), real(*a))[1])
    options = dict(workers=1, progress=False) if make_all is run_grid else {}
    many, together = make_all(specs, **options), len(calls)
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "alone"))
    alone = [get_run(spec) for spec in specs]
    assert len(calls) - together == together * len(alone) and (together > 0) == (buffer > 0)
    for a, b in zip(many, alone):
        assert weights(a.sae) == weights(b.sae) and a.history.table.equals(b.history.table)
        assert a.l0 == b.l0


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("buffer", [0, 400])
def test_readers_are_closed_when_training_ends(buffer, fails, spec, monkeypatch):
    "After success and after an error: of a stream, and of a cache that is read ahead."
    readers, make = [], runs.data_batches

    def remember(reader):
        readers.append(reader)
        return reader

    def ahead(batches, device):
        return remember(AheadBatches(batches, device)) if buffer == 0 else batches

    def fail(*args, **more):
        raise OSError("no disk")

    monkeypatch.setattr(runs, "batches_for", ahead)
    monkeypatch.setattr(runs, "data_batches", lambda *a: remember(make(*a)) if buffer else make(*a))
    if fails:
        monkeypatch.setattr(runs, "train_together", fail)
    with pytest.raises(OSError, match="no disk") if fails else nullcontext():
        get_run(run_spec(spec, "topk", buffer))
    (used,) = readers
    with pytest.raises(RuntimeError, match="these batches are closed"):
        next(used)


@pytest.mark.parametrize("buffer, make_all", [(0, run_grid), (400, run_grid), (400, train_many)])
def test_one_device_for_models_activations_and_runs(buffer, make_all, spec, monkeypatch):
    "Models run and SAEs are trained on the device that is asked for; nothing else chooses one."
    asked = asked_devices(monkeypatch, module, runs)
    specs = [run_spec(spec, method, buffer) for method in ("topk", "topk+dropout", "random")]
    options = dict(workers=1, progress=False) if make_all is run_grid else {}
    make_all(specs, device="cuda:1", **options)
    held_out_activations(specs[0].data, 20, device="cuda:1")
    assert {*asked} == {"cuda:1"}


def test_two_saes_killed_on_one_stream_resume_to_the_bit(spec, monkeypatch, tmp_path):
    specs = [run_spec(spec, method, 400) for method in ("topk", "atm")]
    ended = forked(make_and_die, specs, 10)
    assert ended.status == -signal.SIGKILL, ended.said
    resumed = run_grid(specs, workers=1, progress=False)
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "straight"))
    for run in resumed:
        straight = get_run(run.spec)
        assert weights(straight.sae) == weights(run.sae)
        assert straight.history.table.equals(run.history.table)


def test_data_of_another_kind_are_named():
    with pytest.raises(TypeError, match="must be a WorldConfig or an ActivationSpec, not dict"):
        reader.data_batches({}, 4, 0)


def test_a_stream_is_its_own_iterator():
    stream = object.__new__(reader.StreamBatches)
    assert iter(stream) is stream


def test_tokens_are_replaced_in_training_and_not_in_held_out_text(spec, lm):
    plain = replace(spec, buffer=400)
    masked = replace(plain, replaced=0.3)
    own, other = (reader.token_rows(s, lm).take(20) for s in (plain, masked))
    assert own.shape == other.shape and 0.1 < (own != other).float().mean() < 0.35
    held = [reader.held_out_tokens(s, lm, 500) for s in (plain, masked)]
    assert torch.equal(*held)
    with pytest.raises(ValueError, match="replaced: the cached default text is held out by rows"):
        reader.token_rows(replace(masked, buffer=0, text=""), lm)
