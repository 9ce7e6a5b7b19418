import dataclasses, errno, json, math, os, threading
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from atm_sae import core
from atm_sae.artefacts import (
    OutputError,
    atomic_folder,
    atomic_write,
    file_sha256,
    folder_sha256,
    provenance,
    read_json,
    stable_hash,
    write_json,
)
from atm_sae.core import (
    cache_dir,
    check_activations,
    data_dir,
    generator,
    one_thread,
    pick_device,
    project_root,
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


# ---- randomness, device, threads


def test_seed_everything_seeds_all_three():
    import random

    draw = lambda: (seed_everything(3), random.random(), np.random.rand(), torch.rand(1).item())[1:]
    assert draw() == draw()
    assert torch.equal(
        torch.rand(3, generator=seed_everything(5)),
        torch.rand(3, generator=torch.Generator().manual_seed(5)),
    )


def test_generators_are_named_streams():
    first = lambda *key: torch.rand(4, generator=generator(*key)).tolist()
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


def test_stable_hash_by_hand():
    assert stable_hash({"a": 1}) == "015abd7f5cc57a2d"  # sha256 of the text {"a":1}
    assert stable_hash({"b": [1.0, True], "a": None}) == stable_hash({"a": None, "b": (1, True)})


@pytest.mark.parametrize(
    "a, b",
    [
        (1, 2),
        (1, "1"),
        (1, True),
        (0, None),
        ([1], 1),
        (0.1, 0.1 + 1e-16),
        ({"a": 1}, {"b": 1}),
        ([1, [2]], [[1], 2]),
    ],
)
def test_stable_hash_tells_apart(a, b):
    assert stable_hash(a) != stable_hash(b)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(), s, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(plain)
def test_stable_hash_survives_json(obj):
    assert stable_hash(json.loads(json.dumps(obj))) == stable_hash(obj)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text(), plain, max_size=4))
def test_stable_hash_ignores_order(obj):
    assert stable_hash(dict(reversed(obj.items()))) == stable_hash(obj)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_stable_hash_refuses_nan(bad):
    with pytest.raises(ValueError, match="cannot be part of a stable hash"):
        stable_hash({"lr": bad})


def test_file_and_folder_hashes(tmp_path):
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "sub" / "f").write_bytes(b"abc")
    assert file_sha256(tmp_path / "d" / "sub" / "f").startswith(
        "ba7816bf"
    )  # the standard's own example
    one = folder_sha256(tmp_path / "d")
    (tmp_path / "d").rename(tmp_path / "e")
    assert folder_sha256(tmp_path / "e") == one
    (tmp_path / "e" / "sub" / "f").write_bytes(b"abd")
    assert folder_sha256(tmp_path / "e") != one
    with pytest.raises(FileNotFoundError, match="no folder"):
        folder_sha256(tmp_path / "d")


# ---- whole or absent


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_atomic_write(tmp_path):
    with atomic_write(tmp_path / "deep" / "x.npy") as part:
        assert part.suffix == ".npy" and part.parent == tmp_path / "deep"
        np.save(part, np.arange(3))
    assert names(tmp_path / "deep") == ["x.npy"] and np.load(
        tmp_path / "deep" / "x.npy"
    ).tolist() == [0, 1, 2]


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "x") as part:
        part.write_text("new")
        1 / 0
    assert names(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "old"


def test_atomic_write_wants_something_written(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="nothing was written"),
        atomic_write(tmp_path / "x"),
    ):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_leaves_the_old_file(tmp_path):
    (tmp_path / "x").write_text("old")
    if not (pid := os.fork()):
        with atomic_write(tmp_path / "x") as part:
            part.write_text("ne")
            os._exit(9)
    assert os.waitpid(pid, 0)[1] != 0 and (tmp_path / "x").read_text() == "old"


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EACCES, "permission was denied"),
        (errno.EROFS, "the disk is read-only"),
    ],
)
@pytest.mark.parametrize("writer", [atomic_write, atomic_folder])
def test_disk_errors_are_explained(tmp_path, writer, number, words):
    with pytest.raises(OutputError, match=f"cannot write .*result.*{words}.*What to do") as caught:
        with writer(tmp_path / "result"):
            raise OSError(number, os.strerror(number))
    assert caught.value.errno == number and names(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError("1024 requested and 12 written"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
    ],
)
def test_buried_disk_errors_are_found(tmp_path, error):
    with pytest.raises(OutputError, match="the disk is full"), atomic_write(tmp_path / "x"):
        raise error


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(ConnectionError), atomic_write(tmp_path / "x"):
        raise ConnectionError(errno.ECONNRESET, "reset")
    with pytest.raises(RuntimeError, match="^boom$"), atomic_folder(tmp_path / "x"):
        raise RuntimeError("boom")
    assert names(tmp_path) == []


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to root"
)
def test_forbidden_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="permission was denied"):
        write_json(tmp_path / "x.json", 1)


def test_atomic_folder_replaces(tmp_path):
    for file in "ab":
        with atomic_folder(tmp_path / "run") as part:
            (part / file).touch()
    assert names(tmp_path) == ["run"] and names(tmp_path / "run") == ["b"]


def test_atomic_folder_keeps_the_old_one_on_failure(tmp_path):
    with atomic_folder(tmp_path / "run") as part:
        (part / "a").touch()
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "run") as part:
        (part / "b").touch()
        raise KeyboardInterrupt
    assert names(tmp_path) == ["run"] and names(tmp_path / "run") == ["a"]


def test_atomic_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(NotADirectoryError), atomic_folder(tmp_path / "run"):
        pass
    assert names(tmp_path) == ["run"] and (tmp_path / "run").read_text() == "a file"


def test_atomic_folder_in_parallel(tmp_path):
    errors = []

    def work(k):
        try:
            for _ in range(20):
                with atomic_folder(tmp_path / "run") as part:
                    (part / "k").write_text(str(k))
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors and names(tmp_path) == ["run"] and names(tmp_path / "run") == ["k"]


def test_json_round_trip(tmp_path):
    write_json(
        tmp_path / "x.json", {"o": Outer(), "nan": math.nan, "inf": np.float64("inf"), "ü": "ß"}
    )
    assert read_json(tmp_path / "x.json") == {
        "o": to_plain(Outer()),
        "nan": None,
        "inf": None,
        "ü": "ß",
    }
    assert (tmp_path / "x.json").read_text(encoding="utf-8").endswith("}\n")


def test_bad_json_names_the_file(tmp_path):
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"x\.json is not valid JSON.*delete it and run again"):
        read_json(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "y.json")


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
    "x, words",
    [
        (np.zeros((2, 3)), "torch.Tensor, got ndarray"),
        (torch.zeros(3), r"expected shape \(batch, 3\), got \(3,\)"),
        (torch.zeros(2, 4), r"expected shape \(batch, 3\), got \(2, 4\)"),
        (torch.zeros(2, 3, dtype=torch.int64), "got torch.int64"),
    ],
)
def test_wrong_activations(x, words):
    with pytest.raises(ValueError, match=f"^layer 2: .*{words}"):
        check_activations(x, 3, "layer 2")


def test_nan_message_counts():
    x = torch.zeros(4, 2)
    x[1, 0], x[3, 0], x[3, 1] = math.nan, math.inf, -math.inf
    with pytest.raises(
        ValueError, match="1 NaN and 2 infinite of 8 entries, in 2 of 4 rows, first in row 1"
    ):
        check_activations(x)


# ---- provenance


def test_provenance_is_plain_and_private():
    note = provenance(seeds=[1], model="abc")
    assert json.loads(json.dumps(note)) == note and note["seeds"] == [1] and note["model"] == "abc"
    assert not any(
        str(p) in json.dumps(note)
        for p in (Path.home(), ROOT, os.uname().nodename)
        if len(str(p)) > 5
    )


def test_provenance_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    note = provenance()
    assert note["git_sha"] is None and note["git_dirty"] is None and note["packages"]["torch"]


def test_provenance_in_a_foreign_repository(monkeypatch, tmp_path):
    import shutil, subprocess

    if not shutil.which("git"):
        pytest.skip("no git")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(fake_root(tmp_path / "inside" / "atm-sae"))
    assert provenance()["git_dirty"] is None
