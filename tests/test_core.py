"Where files lie, random streams, devices, plain data, and checks of activations."

import dataclasses
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from atm_sae import core
from atm_sae.core import (
    as_weights,
    cache_dir,
    check_activations,
    data_dir,
    generator,
    is_outlier,
    norm_limit,
    one_thread,
    pick_device,
    project_root,
    read_lines,
    read_text,
    replace_outliers,
    seed_everything,
    to_plain,
)

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Inner:
    a: float = 1
    b: tuple = (1, 2)


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    path: Path = Path("x/y")
    none: object = None


# ---- places


def fake_root(folder, line="lib_path = atm_sae"):
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "settings.ini").write_text(f"[DEFAULT]\n{line}\nother = 5%\n")
    return folder


def test_root_from_below(tmp_path):
    fake_root(tmp_path)
    assert project_root(tmp_path / "deep" / "er") == tmp_path.resolve()


def test_root_prefers_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(fake_root(tmp_path) / "deep")
    assert project_root() == tmp_path.resolve() and data_dir() == tmp_path.resolve() / "data"


@pytest.mark.parametrize("line", ["lib_path = another", "no key at all", ""])
def test_root_ignores_settings_of_others(tmp_path, monkeypatch, line):
    fake_root(tmp_path, line)
    with pytest.raises(
        FileNotFoundError, match="no settings.ini with `lib_path = atm_sae`.*pass the clone"
    ):
        project_root(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert project_root() == ROOT  # found from the package's own folder


def test_cache_dir(tmp_path, monkeypatch):
    monkeypatch.delenv("ATM_SAE_CACHE", raising=False)
    monkeypatch.chdir(fake_root(tmp_path))
    assert cache_dir() == tmp_path.resolve() / "data" / "cache"
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "c"))
    assert cache_dir() == (tmp_path / "c").resolve() and not (tmp_path / "c").exists()


def test_cache_dir_without_a_clone(tmp_path, monkeypatch):
    monkeypatch.delenv("ATM_SAE_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(core, "_PACKAGE", tmp_path)
    assert cache_dir() == Path.home() / ".cache" / "atm-sae"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and passwd
    with pytest.raises(RuntimeError, match="no home folder: set ATM_SAE_CACHE to a folder"):
        cache_dir()


# ---- randomness, device, threads


def test_seed_everything_seeds_all_three():
    def draw():
        seed_everything(3)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()
    assert torch.equal(
        torch.rand(3, generator=seed_everything(5)),
        torch.rand(3, generator=torch.Generator().manual_seed(5)),
    )


def test_generators_are_named_streams():
    def first(*key):
        return torch.rand(4, generator=generator(*key)).tolist()

    assert first(0, "data") == first(0, "data") == first(np.int64(0), "data")
    keys = [(s, *n) for s in range(5) for n in ((), ("a",), ("b",), ("a", "b"), ("ab",), (1,))]
    assert len({tuple(first(*k)) for k in keys}) == len(keys)


def test_generator_leaves_the_global_stream_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    torch.rand(5, generator=generator(1, "x"))
    assert torch.equal(torch.rand(1), expected)


def test_pick_device():
    assert pick_device("cpu").type == "cpu" and pick_device().type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="unknown device 'abacus'"):
        pick_device("abacus")
    with pytest.raises(ValueError, match="not available here"):
        pick_device("cuda:99")


def test_one_thread_restores_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


# ---- names by content


def test_to_plain():
    assert to_plain(Outer()) == {"inner": {"a": 1, "b": [1, 2]}, "path": "x/y", "none": None}
    assert to_plain(
        {1: np.float32(0.5), "d": torch.float32, "s": {2, 1}, "t": torch.tensor([1, 2])}
    ) == {"1": 0.5, "d": "torch.float32", "s": [1, 2], "t": [1, 2]}
    with pytest.raises(TypeError, match="function has no plain form"):
        to_plain([fake_root])
    with pytest.raises(TypeError, match="type has no plain form"):
        to_plain(Outer)


# ---- activations


def test_good_activations_come_back_themselves():
    for x in (
        torch.zeros(2, 3),
        torch.zeros(0, 3),
        torch.full((2, 3), 6e4, dtype=torch.float16),
        torch.zeros(2, 3, dtype=torch.bfloat16),
    ):
        assert check_activations(x, 3) is x


@pytest.mark.parametrize(
    "x, error, words",
    [
        (np.zeros((2, 3)), TypeError, "torch.Tensor, got ndarray"),
        ([[0.0] * 3] * 2, TypeError, "torch.Tensor, got list"),
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.zeros(2, 3, dtype=torch.bool), TypeError, "got torch.bool"),
        (torch.zeros(3), ValueError, r"expected shape \(batch, 3\), got \(3,\)"),
        (torch.zeros(2, 4), ValueError, r"expected shape \(batch, 3\), got \(2, 4\)"),
    ],
)
def test_wrong_activations(x, error, words):
    with pytest.raises(error, match=f"^layer 2: .*{words}"):
        check_activations(x, 3, "layer 2")
    with pytest.raises(error, match=f"^layer 2: .*{words}"):
        as_weights(x, torch.zeros(3, 5), 3, "layer 2")


def test_nan_message_counts():
    x = torch.zeros(4, 2)
    x[1, 0], x[3, 0], x[3, 1] = math.nan, math.inf, -math.inf
    with pytest.raises(
        ValueError, match="1 NaN and 2 infinite of 8 entries, in 2 of 4 rows, first in row 1"
    ):
        check_activations(x)


# ---- text files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_is_read_without_its_byte_order_mark(tmp_path, encoding):
    text = "déjà 🙂\nvu\n\nend"
    (tmp_path / "a.txt").write_text(text, encoding=encoding)
    assert read_text(tmp_path / "a.txt") == text
    assert [*read_lines(tmp_path / "a.txt")] == ["déjà 🙂\n", "vu\n", "\n", "end"]


@pytest.mark.parametrize("mark, encoding", [(b"\xfe\xff", "utf-16-be"), (b"\xff\xfe", "utf-16-le")])
def test_both_byte_orders_are_read(tmp_path, mark, encoding):
    (tmp_path / "a.txt").write_bytes(mark + "one\r\ntwo".encode(encoding))
    assert read_text(tmp_path / "a.txt") == "one\ntwo"


@pytest.mark.parametrize(
    "content, message",
    [
        ("a\nbé".encode("latin-1"), r"a\.txt, line 2: byte 0xe9 \(character 2\) is not UTF-8"),
        ("one\ntwo".encode("utf-16-le"), r"a\.txt, line 1: a NUL byte.*UTF-16 without"),
        (b"PAR1\x15\x00", r"a\.txt, line 1: a NUL byte, so this is a binary file"),
        (b"\xff\xfea\x00\n\x00b", r"a\.txt, after line \d: not utf-16 \(truncated data\)"),
        (b"\xef\xbb\xbfa\n\xff", r"a\.txt, line 2: byte 0xff"),
    ],
)
def test_what_is_no_text_is_named_with_file_and_line(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / "a.txt")


def test_a_byte_far_into_a_file_is_named_with_its_own_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a line\n" * 4000 + b"\xe9\n" + b"a line\n" * 4000)
    lines = read_lines(tmp_path / "a.txt")
    assert [next(lines) for _ in range(4000)] == ["a line\n"] * 4000
    with pytest.raises(ValueError, match="line 4001: byte 0xe9"):
        next(lines)


def test_an_empty_file_is_an_empty_text(tmp_path):
    (tmp_path / "a.txt").touch()
    assert read_text(tmp_path / "a.txt") == ""


# ---- activations of any precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_as_weights_converts_and_does_not_move(dtype):
    x = torch.ones(2, 3, dtype=dtype)
    for other in (torch.float32, torch.bfloat16):
        assert as_weights(x, torch.zeros(3, 5, dtype=other)).dtype == other
    with pytest.raises(ValueError, match="on device cpu, but the weights are on meta"):
        as_weights(x, torch.zeros(3, 5, device="meta"))


# ---- outliers


def column(*values):
    "Rows of one entry each."
    return torch.tensor(values, dtype=torch.float)[:, None]


@pytest.mark.parametrize(
    "x, limit",
    [
        (column(1, 2, 3), 20),
        (column(-1, 2, 3, 4), 25),  # the mean of the middle two
        (column(0, 0, 0, 0, 1, 2, 3), 20),  # zero rows do not count
        (column(1, 2, 3, 500, 700), 30),
        (column(5, math.nan), 50),
        (column(0, 0), math.inf),
        (torch.zeros(0, 4), math.inf),
    ],
)
def test_norm_limit(x, limit):
    assert norm_limit(x) == limit and norm_limit(x, None) == math.inf
    assert norm_limit(x, 2) == limit / 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_norms_of_half_precision_do_not_overflow(dtype):
    x = torch.full((3, 64), 30_000, dtype=dtype)  # the norm, 240,000, is beyond float16
    assert norm_limit(x) == pytest.approx(2_400_000, rel=0.01)
    assert not is_outlier(x, norm_limit(x)).any() and is_outlier(x, 1000).all()


def test_is_outlier():
    x = column(1, 30, 31, math.inf, math.nan)
    assert is_outlier(x, 30).tolist() == [False, False, True, False, False]
    assert not is_outlier(x, math.inf).any()


def test_replace_outliers():
    x = column(90, 1, 2, 80, 3, 70, 60, 50)
    assert replace_outliers(x, x[:, 0] > 9).flatten().tolist() == [1, 2, 3, 1, 2, 3, 1, 2]
    kept = torch.randn(7, 3)
    assert torch.equal(replace_outliers(kept, torch.zeros(7, dtype=torch.bool)), kept)
    assert replace_outliers(x, x[:, 0] > 0).shape == x.shape  # nothing can take their place
