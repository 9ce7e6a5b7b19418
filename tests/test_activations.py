"The store on disk and its shuffled reader."

import errno
import json
import pickle
import shutil
import threading
import time
from pathlib import Path
from dataclasses import replace

import numpy as np
import pytest
import torch
from filelock import Timeout
from safetensors.torch import load_file

from atm_sae import core
from atm_sae.data import activations as module
from atm_sae.data.activations import (
    ActivationCache,
    ActivationSpec,
    activation_artefact,
    activation_key,
    build_cache,
    get_activations,
    token_activations,
)
from atm_sae.data.batches import (
    AheadBatches,
    CacheBatches,
    batches_for,
    held_out,
    planted_batches,
)
from atm_sae.artefacts import OutputError, file_lock, stable_hash
from atm_sae.core import to_plain
from atm_sae.data.lm import read_site, residual_stream, save_lm, tiny_lm
from atm_sae.data.letters import LineConfig
from atm_sae.data.planted import WorldConfig
from atm_sae.data.text import python_docs


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def tokens():
    t = torch.randint(3, 1024, (20, 16), generator=torch.Generator().manual_seed(0))
    t[:, 0] = 2  # BOS
    t[3, 5] = t[4, 9] = 1  # EOS
    t[7, 10:] = 0  # padding
    return t


@pytest.fixture(scope="module")
def cache(lm, tokens, tmp_path_factory):
    return build_cache(lm, tokens, 1, tmp_path_factory.mktemp("cache") / "c", progress=False)


@pytest.fixture
def fresh(lm, tokens, tmp_path):
    return build_cache(lm, tokens, 1, tmp_path / "c", progress=False)


class Count:
    "A stand-in for a store: row i is the number i."

    def __init__(self, n=10):
        self.n, self.d_in, self.meta = n, 1, {"sha256": "none"}

    def __len__(self):
        return self.n

    def rows(self, index):
        return torch.as_tensor(np.arange(self.n)[index]).float()[:, None]


# ---- building and opening


def test_rows_are_the_tokens_that_are_not_special(cache, lm, tokens):
    assert len(cache) == 20 * 15 - 2 - 6 and cache.d_in == 32
    expected = residual_stream(lm, tokens, 1)[tokens > 2]
    assert torch.allclose(cache.rows(slice(None)), expected, atol=1e-6)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_shards_are_mapped_not_read(cache):
    (shard,) = cache.shards
    assert shard.shape == (292, 32) and "activations-00000.safetensors" in (
        Path("/proc/self/maps").read_text()
    )


def test_shards_are_safetensors_files(cache):
    found = load_file(cache.folder / "activations-00000.safetensors")
    assert list(found) == ["activations"]
    assert torch.equal(found["activations"], cache.rows(slice(None)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pieces_of_a_shard(tmp_path, dtype):
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    one, some = tmp_path / "one", tmp_path / "some"
    assert module.write_shard(one, [x], 3, dtype) == module.write_shard(
        some, [x[:2], x[2:2], x[2:]], 3, dtype
    )
    assert one.read_bytes() == some.read_bytes() and torch.equal(module.read_shard(one), x)


def test_an_empty_shard(tmp_path):
    n, sha = module.write_shard(tmp_path / "x", [], 3, "float32")
    assert n == 0 and module.read_shard(tmp_path / "x").shape == (0, 3)
    assert sha == module.shard_sha256(tmp_path / "x")


def test_batch_size_does_not_matter(cache, lm, tokens, tmp_path):
    other = build_cache(lm, tokens, 1, tmp_path / "c", batch_size=3, progress=False)
    assert torch.allclose(other.rows(slice(None)), cache.rows(slice(None)), atol=1e-6)


def test_meta_says_what_it_is(lm, tokens, tmp_path):
    spec = ActivationSpec(n_tokens=320, context=16, layer=1)
    made = build_cache(lm, tokens, 1, tmp_path / "c", spec, progress=False)
    meta = json.loads((tmp_path / "c" / "meta.json").read_text())
    assert (
        meta == made.meta
        and meta["spec"] == to_plain(spec)
        and meta["model_checksum"] == lm.checksum
        and meta["layer"] == 1
    )
    assert ActivationCache.open(tmp_path / "c").meta == meta and "292 x 32" in repr(made)


def test_meta_names_the_packages_of_the_installed_text(lm, tokens, tmp_path):
    spec = ActivationSpec(n_tokens=320, context=16, layer=1, text="installed-docs")
    meta = build_cache(lm, tokens, 1, tmp_path / "c", spec, progress=False).meta
    assert meta["packages"]["torch"] == torch.__version__ and "python" in meta["packages"]


@pytest.mark.parametrize(
    "dtype, size, tolerance", [("bfloat16", 2, 2**-8), ("float16", 2, 2**-11), ("float32", 4, 0)]
)
def test_stored_dtypes(cache, lm, tokens, tmp_path, dtype, size, tolerance):
    made = build_cache(lm, tokens, 1, tmp_path / "c", dtype=dtype, progress=False)
    path = tmp_path / "c" / "activations-00000.safetensors"
    assert path.stat().st_size == 256 + 292 * 32 * size
    x, y = cache.rows(slice(None)), ActivationCache.open(tmp_path / "c").rows(slice(None))
    assert y.dtype == torch.float32 and ((x - y).abs() <= tolerance * x.abs() + 1e-7).all()
    assert torch.equal(made.rows(np.array([3, 1])), y[[3, 1]])


def test_rows_are_copies(cache):
    a = cache.rows(slice(0, 2))
    a.zero_()
    assert cache.rows(slice(0, 2)).abs().sum() > 0
    assert torch.equal(cache.rows(torch.tensor([5, 0])), cache.rows(np.array([5, 0])))


def test_rebuilding_replaces(fresh, lm, tokens, tmp_path):
    assert len(build_cache(lm, tokens[:2], 1, tmp_path / "c", progress=False)) == 30
    assert len(ActivationCache.open(tmp_path / "c")) == 30 and [
        p.name for p in tmp_path.iterdir()
    ] == ["c"]


def test_pickling_maps_the_file_anew(cache):
    again = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < 2000 and torch.equal(
        again.rows(slice(None)), cache.rows(slice(None))
    )


@pytest.mark.parametrize("seed", range(3))
def test_held_out_activations_have_the_letter_lines_of_the_rest(lm, tmp_path, monkeypatch, seed):
    """Rows of 8 tokens leave 7 activations each. The last 400 of 4,000 rows are held out. Their
    letter lines are less than one off their share (see the order of rows in test_text), and so
    are those of the other rows. Rows in random order would be 9 off."""
    texts = [
        " ".join(python_docs()[:400]).replace("\n", " ")
    ]  # one text, so that no row loses an EOS
    (newline,) = lm.tokenizer("\n")["input_ids"]

    def letters(lm, rows, layer, site):
        is_line = (rows[:, 1] == newline).float()
        return is_line[:, None, None].expand(*rows.shape, lm.d_model)

    monkeypatch.setattr(module, "read_site", letters)
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path))
    cache = get_activations(
        ActivationSpec(n_tokens=32_000, context=8, line_share=0.7, seed=seed),
        texts,
        lm,
        batch_size=1000,
    )
    assert len(cache) == 4000 * 7
    for rows, x in ((400, held_out(cache, 10**9)), (3600, cache.rows(slice(0, 3600 * 7)))):
        assert len(x) == 7 * rows and x[:, 0].mean().item() == pytest.approx(0.7, abs=1 / rows)


# ---- damage


def change(path, edit):
    path.write_bytes(edit(path.read_bytes()))


@pytest.mark.parametrize(
    "name, edit, message",
    [
        (
            "activations-00000.safetensors",
            lambda b: b[:-4],
            "activations-00000.safetensors is truncated .* 37,628 bytes, expected 37,632: delete",
        ),
        ("activations-00000.safetensors", lambda b: b + b"0", "truncated or not its own"),
        (
            "activations-00000.safetensors",
            lambda b: b[:900] + bytes([b[900] ^ 1]) + b[901:],
            "activations-00000.safetensors fails its checksum",
        ),
        (
            "activations-00000.safetensors",
            lambda b: b.replace(b"292", b"291"),
            "activations-00000.safetensors fails its checksum",
        ),
        ("meta.json", lambda b: b[:20], "meta.json is not valid JSON"),
        ("meta.json", lambda b: b'{"n": 292}', "meta.json lacks d_in, dtype, sha256, shards"),
        ("meta.json", lambda b: b.replace(b'"float32"', b'"int4"'), "unknown dtype 'int4'"),
    ],
)
def test_damage_is_named(fresh, name, edit, message):
    change(fresh.folder / name, edit)
    with pytest.raises(ValueError, match=message) as e:
        ActivationCache.open(fresh.folder)
    assert "run again" in str(e.value) and "delete" in str(e.value)


@pytest.mark.parametrize(
    "name, message",
    [
        ("activations-00000.safetensors", "truncated .* 0 bytes"),
        ("meta.json", "meta.json is missing"),
    ],
)
def test_missing_files_are_named(fresh, name, message):
    (fresh.folder / name).unlink()
    with pytest.raises(ValueError, match=message + ".*delete .* and run again"):
        ActivationCache.open(fresh.folder)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no activation cache .*nothing"):
        ActivationCache.open(tmp_path / "nothing")


def test_verify_false_skips_the_checksum_only(fresh):
    change(fresh.folder / "activations-00000.safetensors", lambda b: b[:-1] + b"\x00")
    ActivationCache.open(fresh.folder, verify=False)
    change(fresh.folder / "activations-00000.safetensors", lambda b: b[:-1])
    with pytest.raises(ValueError, match="truncated"):
        ActivationCache.open(fresh.folder, verify=False)


# ---- bad input while building


@pytest.mark.parametrize(
    "bad, counted", [(float("nan"), "1 NaN and 0 infinite"), (float("inf"), "0 NaN and 1 infinite")]
)
def test_activations_that_are_not_finite(lm, tokens, tmp_path, monkeypatch, bad, counted):
    def spoiled(lm, rows, layer, site):
        x = read_site(lm, rows, layer, site)
        if torch.equal(rows[0], tokens[8]):
            x[2, 4, 7] = bad
        return x

    monkeypatch.setattr(module, "read_site", spoiled)
    with pytest.raises(
        ValueError, match=f"layer 1 of tiny-3x32-seed0 as float32, token rows 8 to 15: {counted}"
    ):
        build_cache(lm, tokens, 1, tmp_path / "c", batch_size=8, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_overflow_in_float16_is_found(lm, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "read_site", lambda *a: read_site(*a) * 1e6)
    with pytest.raises(ValueError, match="as float16, .* infinite"):
        build_cache(lm, tokens, 1, tmp_path / "c", dtype="float16", progress=False)
    build_cache(lm, tokens, 1, tmp_path / "c", dtype="bfloat16", progress=False)


def test_bad_arguments(lm, tokens, tmp_path):
    with pytest.raises(ValueError, match="no layer 9; its layers are 0 to 2"):
        build_cache(lm, tokens, 9, tmp_path / "c", progress=False)
    with pytest.raises(ValueError, match="dtype 'int8' is unknown"):
        build_cache(lm, tokens, 1, tmp_path / "c", dtype="int8", progress=False)
    with pytest.raises(ValueError, match="nothing but special tokens"):
        build_cache(lm, tokens[:, :1], 1, tmp_path / "c", progress=False)
    assert list(tmp_path.iterdir()) == []


class FullDisk:
    "A file on a disk with room for so many bytes."

    def __init__(self, path, mode, room=20_000):
        self.f, self.room = open(path, mode), room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.f.write(data)

    def __getattr__(self, name):
        return getattr(self.f, name)

    def __enter__(self):
        return self

    def __exit__(self, *a):
        self.f.close()


def test_full_disk(lm, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "open", FullDisk, raising=False)
    with pytest.raises(OutputError, match="cannot write .*c: the disk is full.*free some space"):
        build_cache(lm, tokens, 1, tmp_path / "c", batch_size=4, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_old_store(fresh, lm, tokens, monkeypatch):
    monkeypatch.setattr(module, "open", FullDisk, raising=False)
    with pytest.raises(OutputError):
        build_cache(lm, tokens, 2, fresh.folder, batch_size=4, progress=False)
    assert len(ActivationCache.open(fresh.folder)) == 292


@pytest.mark.parametrize(
    "number, message",
    [(errno.EROFS, "the disk is read-only"), (errno.EACCES, "permission was denied")],
)
def test_folder_that_cannot_be_written(lm, tokens, tmp_path, monkeypatch, number, message):
    def mkdir(self, *a, **k):
        raise OSError(number, "no")

    monkeypatch.setattr(core.Path, "mkdir", mkdir)
    with pytest.raises(OutputError, match=f"cannot write .*c: {message}"):
        build_cache(lm, tokens, 1, tmp_path / "c", progress=False)


# ---- get_activations


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def spec(lm, tmp_path_factory):
    return ActivationSpec(
        model=str(save_lm(lm, tmp_path_factory.mktemp("model") / "tiny")),
        layer=1,
        n_tokens=600,
        context=32,
    )


TEXTS = [f"The {i}th text says what a short test needs." for i in range(60)]


def test_built_once_then_opened(home, spec, monkeypatch):
    made = get_activations(spec, texts=TEXTS)
    assert made.folder == home / "activations" / activation_key(spec, TEXTS) and made.meta[
        "spec"
    ] == to_plain(spec)
    monkeypatch.setattr(module, "build_cache", None)
    monkeypatch.setattr(module, "load_lm", None)
    assert torch.equal(get_activations(spec, texts=TEXTS).rows(slice(None)), made.rows(slice(None)))


def test_same_spec_same_bytes(home, spec):
    first = get_activations(spec, texts=TEXTS).meta["sha256"]
    for p in (home / "activations").rglob("*.*"):
        p.unlink()
    for p in (home / "activations").iterdir():
        p.rmdir()
    threads = torch.get_num_threads()
    assert (
        get_activations(spec, texts=TEXTS).meta["sha256"] == first
        and torch.get_num_threads() == threads
    )


@pytest.mark.parametrize(
    "other",
    [
        dict(layer=2),
        dict(n_tokens=700),
        dict(context=64),
        dict(line_share=0.4),
        dict(lines=LineConfig(alpha=0.5)),
        dict(seed=1),
        dict(dtype="bfloat16"),
    ],
)
def test_every_field_makes_another_store(spec, other):
    assert activation_key(replace(spec, **other), TEXTS) != activation_key(spec, TEXTS)


def test_key_follows_text_and_weights_but_not_the_place(spec, lm, tmp_path):
    assert activation_key(spec, TEXTS) != activation_key(spec, TEXTS[1:]) != activation_key(spec)
    elsewhere = replace(spec, model=str(save_lm(lm, tmp_path / "elsewhere")))
    assert activation_key(elsewhere, TEXTS) == activation_key(spec, TEXTS)
    other = replace(spec, model=str(save_lm(tiny_lm(seed=1), tmp_path / "other")))
    assert activation_key(other, TEXTS) != activation_key(spec, TEXTS)


def test_a_damaged_store_is_not_used(home, spec, monkeypatch):
    made = get_activations(spec, texts=TEXTS)
    change(
        made.folder / "activations-00000.safetensors",
        lambda b: b[:-8] + bytes([b[-8] ^ 1]) + b[-7:],
    )
    with pytest.raises(ValueError, match="fails its checksum.*delete .* and run again"):
        get_activations(spec, texts=TEXTS)


def test_verified_once_in_a_process(home, spec, monkeypatch):
    get_activations(spec, texts=TEXTS)
    seen = []
    real = module.shard_sha256
    monkeypatch.setattr(module, "shard_sha256", lambda p: seen.append(p) or real(p))
    for _ in range(3):
        get_activations(spec, texts=TEXTS)
    assert len(seen) == 1


def test_the_content_is_known_after_the_folder_is_deleted(home, spec):
    made = get_activations(spec, texts=TEXTS)
    artefact = activation_artefact(spec, TEXTS)
    assert artefact.content() == made.meta["sha256"]
    shutil.rmtree(made.folder)
    assert not artefact.exists() and artefact.content() == made.meta["sha256"]
    assert get_activations(spec, texts=TEXTS).meta == made.meta


def test_the_content_does_not_depend_on_where_model_and_text_lie(home, spec, lm, tmp_path):
    elsewhere = replace(spec, model=str(save_lm(lm, tmp_path / "elsewhere")))
    first = get_activations(spec, texts=TEXTS)
    shutil.rmtree(first.folder)
    assert get_activations(elsewhere, texts=TEXTS).meta["sha256"] == first.meta["sha256"]


def test_the_site_is_read_and_named(lm, spec, cache):
    "Each site has a cache of its own, with what is read there."
    tokens = module.token_rows(spec, lm, TEXTS).take(module.row_count(spec))
    kept = tokens > 2
    for site in ("mlp_out", "attn_out"):
        found = get_activations(replace(spec, site=site), texts=TEXTS, lm=lm)
        expected = read_site(lm, tokens, spec.layer, site)[kept]
        assert torch.allclose(found.rows(slice(0, len(found))), expected, atol=1e-5)
        assert found.meta["site"] == site and len(found) == len(expected)


def test_reading_is_recorded(home, spec, tmp_path, monkeypatch):
    monkeypatch.setenv("ATM_SAE_OPENED", str(tmp_path / "opened"))
    for _ in range(2):
        made = get_activations(spec, texts=TEXTS)
    lines = [json.loads(line) for line in (tmp_path / "opened").read_text().splitlines()]
    assert [(o["kind"], o["key"], o["content"]) for o in lines] == 2 * [
        ("activations", made.folder.name, made.meta["sha256"])
    ]


def test_makers_of_activations(home, spec):
    "Code that changes numbers is part of the key, how a cache is built too; batches are not."
    found = activation_artefact(spec, TEXTS).closure.definitions
    assert {
        "data.activations.build_cache",
        "data.activations.default_batch_size",
        "data.activations.row_count",
        "data.activations.token_activations",
        "data.letters.mixed_tokens",
        "data.lm.read_site",
        "data.text.PackedRows",
    } <= found.keys()
    assert not [name for name in found if "Batches" in name]


class Turns:
    "Stands for two ranks: what rank 0 says in each exchange, for one of the two."

    def __init__(self, rank, words):
        self.rank, self.size, self.words = rank, 2, iter(words)

    def high(self, t):
        return torch.maximum(t, torch.tensor(next(self.words)))


def test_ranks_exchange_a_word_while_rank_0_waits_for_the_lock(tmp_path):
    "Rank 0 tries three times, and says so each time; then it holds the lock."
    path = tmp_path / "lock"
    other = file_lock(path)
    other.acquire()
    said = []

    class Rank0(Turns):
        def high(self, t):
            said.append(int(t))
            if len(said) == 2:
                other.release()
            return t

    with module.one_maker(file_lock(path), Rank0(0, []), patience=0.05):
        assert said == [0, 0, 1]
        with pytest.raises(Timeout):
            other.acquire(timeout=0)
    with other.acquire(timeout=0):
        pass


def test_other_ranks_follow_rank_0_without_the_lock(tmp_path):
    path = tmp_path / "lock"
    ranks = Turns(1, [0, 0, 1])
    with file_lock(path), module.one_maker(file_lock(path), ranks, patience=0.05):
        assert next(ranks.words, None) is None


def test_spec_is_plain_data():
    a = ActivationSpec(n_tokens=1000)
    assert stable_hash(a) == stable_hash(ActivationSpec(n_tokens=1000)) and a.lines == LineConfig(
        uniform=0.05
    )


# ---- the reader


def test_epochs_by_hand():
    reader = CacheBatches(Count(10), 4, seed=0)
    epochs = [[int(v) for _ in range(2) for v in next(reader)] for _ in range(20)]
    assert (
        all(len(set(e)) == 8 and max(e) < 9 for e in epochs)
        and len({tuple(e) for e in epochs}) == 20
    )
    assert set(sum(epochs, [])) == set(range(9)) and reader.epoch == 19


def test_seeds_and_iteration():
    def take(seed):
        reader = CacheBatches(Count(50), 8, seed)
        return [b.flatten().tolist() for b, _ in zip(reader, range(12))]

    assert take(0) == take(0) != take(1)


def test_reading_and_held_out_do_not_meet(cache):
    seen = {int(v) for b, _ in zip(CacheBatches(Count(1000), 100, 0), range(18)) for v in b}
    kept = {int(v) for v in held_out(Count(1000), 1000)}
    assert len(seen) == 900 and kept == set(range(900, 1000)) and not seen & kept
    assert held_out(cache, 5).shape == (5, 32)


def test_held_out_is_spread_evenly():
    assert held_out(Count(10), 2, start=0.5).flatten().tolist() == [5, 7]
    assert held_out(Count(1000), 4).flatten().tolist() == [900, 925, 950, 975]
    assert len(held_out(Count(1000), 10**6)) == 100


@pytest.mark.parametrize("steps", [0, 1, 3, 7, 11])
def test_state_is_restored_mid_epoch(cache, steps):
    reader = CacheBatches(cache, 50, seed=3)  # 262 rows: five batches an epoch
    for _ in range(steps):
        next(reader)
    state = json.loads(json.dumps(reader.state_dict()))
    following = [next(reader) for _ in range(12)]
    fresh = CacheBatches(cache, 50, seed=3)
    fresh.load_state_dict(state)
    assert (
        all(torch.equal(a, next(fresh)) for a in following)
        and fresh.state_dict() == reader.state_dict()
    )


@pytest.mark.parametrize("steps", [0, 1, 4, 9])
def test_batches_read_ahead_are_those_of_the_reader(cache, steps):
    "Over epochs of five batches; a state of either can be loaded by the other."
    plain = CacheBatches(cache, 50, seed=3)
    ahead = AheadBatches(CacheBatches(cache, 50, seed=3), torch.device("cpu"))
    for _ in range(steps):
        assert torch.equal(next(plain), next(ahead))
    state = json.loads(json.dumps(ahead.state_dict()))
    assert state == plain.state_dict() and (ahead.d_in, ahead.batch_size) == (32, 50)
    following = [next(plain) for _ in range(7)]
    resumed = CacheBatches(cache, 50, seed=3)
    resumed.load_state_dict(state)
    next(ahead), next(ahead)
    ahead.load_state_dict(state)
    for reader in (ahead, resumed):
        assert all(torch.equal(a, next(reader)) for a in following)
    with pytest.raises(ValueError, match="seed is 3, not 4"):
        AheadBatches(CacheBatches(cache, 50, seed=4), torch.device("cpu")).load_state_dict(state)


def test_an_error_of_reading_ahead_reaches_the_training(cache, monkeypatch):
    ahead = AheadBatches(CacheBatches(cache, 50, seed=3), torch.device("cpu"))
    next(ahead)
    monkeypatch.setattr(cache, "rows", lambda index: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        [next(ahead) for _ in range(4)]


def test_a_closed_reader_gives_no_batch(cache):
    ahead = AheadBatches(CacheBatches(cache, 50, seed=3), torch.device("cpu"))
    next(ahead)
    ahead.close()
    with pytest.raises(RuntimeError, match="these batches are closed, .*: make a new reader"):
        next(ahead)


@pytest.mark.parametrize("asked", ["cuda", "cuda:1"])
def test_the_reading_thread_uses_the_gpu_of_its_sae(asked, cache, monkeypatch):
    "Also where 'cuda' means the current device of the thread that trains."
    used, here = [], threading.get_ident()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: used.append((threading.get_ident(), device))
    )
    monkeypatch.setattr(AheadBatches, "_copy", lambda reader, x: (x, None))
    ahead = AheadBatches(CacheBatches(cache, 50, seed=3), torch.device(asked))
    next(ahead)
    ahead.close()
    ((thread, device),) = used
    assert thread != here and device == ahead.device == torch.device("cuda", 1)


def test_only_a_cache_is_read_ahead_and_only_for_a_gpu(cache):
    reader, world = CacheBatches(cache, 50, seed=3), planted_batches(WorldConfig(), 8, 0)
    assert batches_for(reader, torch.device("cpu")) is reader
    assert batches_for(world, torch.device("cuda")) is world
    ahead = batches_for(reader, torch.device("cuda", 0))
    assert isinstance(ahead, AheadBatches) and ahead.batches is reader


def test_state_does_not_change_afterwards(cache):
    reader = CacheBatches(cache, 50, seed=3)
    state = reader.state_dict()
    next(reader)
    assert state["position"] == 0 and reader.state_dict()["position"] == 50


@pytest.mark.parametrize(
    "other, message",
    [
        (dict(batch_size=40), "batch_size is 50, not 40"),
        (dict(seed=1), "seed is 0, not 1"),
        (dict(stop=0.5), "end is 262, not 146"),
    ],
)
def test_state_of_another_reader(cache, other, message):
    state = CacheBatches(cache, 50, seed=0).state_dict()
    with pytest.raises(ValueError, match=message):
        CacheBatches(cache, **{"batch_size": 50, "seed": 0, **other}).load_state_dict(state)


def test_state_of_another_store(cache):
    state = CacheBatches(Count(292), 50, seed=0).state_dict()
    with pytest.raises(ValueError, match="cache is 'none'"):
        CacheBatches(cache, 50, seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match="epoch is None"):
        CacheBatches(Count(292), 50, seed=0).load_state_dict(
            {k: v for k, v in state.items() if k != "epoch"}
        )


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(batch_size=263), "does not fit 262 rows"),
        (dict(batch_size=0), "batch_size 0"),
        (dict(start=0.9), "shares of the rows"),
        (dict(stop=1.5), "shares of the rows"),
    ],
)
def test_bad_readers(cache, bad, message):
    with pytest.raises(ValueError, match=message):
        CacheBatches(cache, **{"batch_size": 10, "seed": 0, **bad})
    assert CacheBatches(cache, 262, 0).d_in == 32


# ---- several threads


@pytest.fixture
def threads():
    "Set the number of PyTorch's threads; it is put back afterwards."
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_byte(lm, tokens, tmp_path, threads, monkeypatch):
    used = set()

    def noted(model, *args):
        used.add((id(model.model), torch.get_num_threads()))
        return token_activations(model, *args)

    monkeypatch.setattr(module, "token_activations", noted)
    made = []
    for n in (1, 3):
        used.clear()
        threads(n)
        folder = tmp_path / str(n)
        made.append(build_cache(lm, tokens, 1, folder, batch_size=2, progress=False).meta)
        assert torch.get_num_threads() == n and {k for _, k in used} == {1}
        assert 1 <= len(used) <= n
    assert made[0] == made[1]


def test_batches_run_at_the_same_time(lm, tokens, tmp_path, threads, monkeypatch):
    both = threading.Barrier(2, timeout=20)  # broken if one thread alone runs all batches

    def together(*args):
        both.wait()
        return token_activations(*args)

    monkeypatch.setattr(module, "token_activations", together)
    threads(2)
    build_cache(lm, tokens, 1, tmp_path / "c", batch_size=5, progress=False)


def test_copies_share_weights_and_not_hooks(lm):
    one, other = module.share_weights(lm, 2)
    assert one is lm and other.checksum == lm.checksum
    pairs = zip(one.model.state_dict().items(), other.model.state_dict().items(), strict=True)
    assert all(a == b and x.data_ptr() == y.data_ptr() for (a, x), (b, y) in pairs)
    with_hook = one.model.get_input_embeddings().register_forward_hook(lambda *args: 1 / 0)
    assert residual_stream(other, torch.tensor([[2, 5]]), 1).isfinite().all()
    with_hook.remove()


def test_a_gpu_runs_one_model(lm, monkeypatch):
    monkeypatch.setattr(type(lm), "device", torch.device("meta"))
    assert module.share_weights(lm, 4) == [lm]


def test_in_order_keeps_the_order_and_passes_errors_on():
    def inverse(model, i):
        time.sleep(0.01 * (i == 1))
        return 1 / (3 - i)

    got = []
    with pytest.raises(ZeroDivisionError):
        for x in module.in_order(inverse, [None] * 3, range(9)):
            got.append(x)
    assert got == [1 / 3, 1 / 2, 1]
