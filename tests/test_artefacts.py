"Hashes, files that are whole or absent, locks, keys of artefacts, provenance."

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import Timeout
from hypothesis import given, settings
from hypothesis import strategies as st
from test_core import Inner, Outer

from atm_sae import artefacts
from atm_sae.artefacts import (
    Artefact,
    OutputError,
    atomic_folder,
    atomic_write,
    file_lock,
    file_sha256,
    folder_sha256,
    git_state,
    provenance,
    read_json,
    read_object,
    stable_hash,
    write_json,
)
from atm_sae.core import to_plain

ROOT = Path(__file__).resolve().parent.parent


def fake_root(folder):
    folder.mkdir(parents=True)
    (folder / "settings.ini").write_text("[DEFAULT]\nlib_path = atm_sae\n")
    return folder


# ---- names by content


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
        raise ZeroDivisionError
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


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_of_any_editor_is_read(tmp_path, encoding):
    (tmp_path / "x.json").write_text('{"ü": 1}', encoding=encoding)
    assert read_json(tmp_path / "x.json") == read_object(tmp_path / "x.json") == {"ü": 1}


def test_json_that_is_no_object_or_no_text(tmp_path):
    for content, kind in (("[1]", "list"), ("null", "NoneType"), ('"a"', "str")):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match=rf"x\.json holds a {kind}, where an object.*: why"):
            read_object(tmp_path / "x.json", "why")
    (tmp_path / "x.json").write_bytes(b'{"a":\n"\xe9"}')
    with pytest.raises(ValueError, match=r"x\.json, line 2: byte 0xe9"):
        read_json(tmp_path / "x.json")


CRASH = """
import os, sys
from atm_sae.artefacts import atomic_folder, atomic_write
writer = {"file": atomic_write, "folder": atomic_folder}[sys.argv[1]]
with writer(sys.argv[2]) as part:
    (part if sys.argv[1] == "file" else part / "half").write_text("half")
    os._exit(9)
"""


@pytest.mark.parametrize("kind, writer", [("file", atomic_write), ("folder", atomic_folder)])
def test_leftovers_of_a_killed_process_are_removed_by_the_next(tmp_path, kind, writer):
    done = subprocess.run([sys.executable, "-c", CRASH, kind, str(tmp_path / "x")], check=False)
    left = names(tmp_path)
    assert done.returncode == 9 and len(left) == 1 and left[0].endswith(".part")
    mine = tmp_path / left[0].replace(f"-{_pid(left[0])}-", f"-{os.getpid()}-")
    mine.touch()  # what a living process is writing stays
    with writer(tmp_path / "x") as part:
        (part if kind == "file" else part / "whole").write_text("whole")
    assert names(tmp_path) == [mine.name, "x"]


def test_a_process_number_means_nothing_in_another_container(tmp_path):
    "What another machine or container writes stays, but for what has lain for a week."
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a[1].x") as part:
        raise KeyboardInterrupt
    space, _, rest = part.name.removeprefix(".a[1].").partition("-")
    dead = rest.replace(_pid(part.name), str(2**22 + 1), 1)  # more than any process number
    for owner in (space, "0" * len(space), "f" * len(space)):
        (tmp_path / f".a[1].{owner}-{dead}").touch()
    week = 7 * 24 * 3600
    os.utime(tmp_path / f".a[1].{'f' * len(space)}-{dead}", (time.time() - 1.1 * week,) * 2)
    write_json(tmp_path / "a[1].x", 1)
    assert names(tmp_path) == [f".a[1].{'0' * len(space)}-{dead}", "a[1].x"]


def _pid(name):
    return name.split("-")[-2]


def test_files_are_flushed_before_they_are_renamed(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda n: done.append("fsync") or fsync(n))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("replace") or replace(a, b))
    write_json(tmp_path / "x.json", 1)
    assert done == ["fsync", "replace", "fsync"]


# ---- locks


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    with file_lock(tmp_path / "deep" / "lock"):
        with pytest.raises(Timeout), file_lock(tmp_path / "deep" / "lock", timeout=0.01):
            pass
    with file_lock(tmp_path / "deep" / "lock", timeout=0.01):
        pass


# ---- artefacts

MAKER = ("core.generator",)


def artefact(spec=None, **options):
    return Artefact("tasks", spec or Outer(), MAKER, **options)


def test_what_a_key_depends_on():
    key = artefact().key
    assert key == artefact().key == artefact(Outer(Inner(1.0), Path("x/y"))).key
    other = [
        artefact(Outer(none=1)),
        artefact(inputs={"model": "a"}),
        artefact(device="cuda"),
        artefact(dtype="bfloat16"),
        Artefact("probing", Outer(), MAKER),
        Artefact("tasks", Outer(), ("core.seed_everything",)),
    ]
    assert len({key, *(a.key for a in other)}) == 7


def test_a_key_depends_on_the_packages_that_compute(monkeypatch):
    before = artefact().key
    version = artefacts.package_version
    monkeypatch.setattr(
        artefacts, "package_version", lambda n: "9.9" if n == "matplotlib" else version(n)
    )
    assert artefact().key == before
    monkeypatch.setattr(
        artefacts, "package_version", lambda n: "9.9" if n == "torch" else version(n)
    )
    assert artefact().key != before


def make(wanted, text="x"):
    with wanted.lock(), atomic_folder(wanted.folder) as part:
        (part / "a").write_text(text)
        wanted.seal(part)


def test_an_artefact_exists_once_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path))
    wanted = artefact()
    assert not wanted.exists() and wanted.content() is None
    with pytest.raises(KeyboardInterrupt), atomic_folder(wanted.folder) as part:
        wanted.seal(part)
        raise KeyboardInterrupt
    assert not wanted.exists()
    make(wanted)
    assert wanted.exists() and wanted.folder == tmp_path / "tasks" / wanted.key
    again = artefact(inputs={"model": "b"})
    make(again)
    assert again.key != wanted.key and again.content() == wanted.content()


def test_content_outlives_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path))
    wanted = artefact()
    make(wanted)
    content = wanted.content()
    shutil.rmtree(wanted.folder)
    assert not wanted.exists() and wanted.content() == content


def test_what_was_opened_is_noted(tmp_path, monkeypatch):
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "cache"))
    wanted = artefact(inputs={"model": "abc"})
    make(wanted)
    wanted.opened()  # nobody asked
    monkeypatch.setenv("ATM_SAE_OPENED", str(tmp_path / "opened.jsonl"))
    wanted.opened()
    wanted.opened()
    lines = [json.loads(line) for line in (tmp_path / "opened.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[0] == lines[1]
    assert lines[0]["key"] == wanted.key and lines[0]["content"] == wanted.content()
    assert lines[0]["inputs"] == {"model": "abc"} and lines[0]["makers"] == ["core.generator"]


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
    if not shutil.which("git"):
        pytest.skip("no git")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(fake_root(tmp_path / "inside" / "atm-sae"))
    assert provenance()["git_dirty"] is None


def test_results_do_not_count_as_changes(monkeypatch, tmp_path):
    if not shutil.which("git"):
        pytest.skip("no git")
    root = fake_root(tmp_path / "project")
    monkeypatch.chdir(root)
    config = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*config, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], check=True)
    commit, dirty = git_state()
    assert len(commit) == 40 and dirty is False
    (root / "reports").mkdir()
    (root / "reports" / "x.md").write_text("a result")
    assert git_state() == (commit, False)
    (root / "code.py").write_text("x = 1")
    assert git_state() == (commit, True)


def test_a_package_that_is_not_installed_has_no_version():
    assert artefacts.package_version("no-such-package") is None
    assert artefacts.package_version("torch")


@pytest.mark.parametrize("error, alive", [(ProcessLookupError, False), (PermissionError, True)])
def test_processes_of_other_users_count_as_alive(error, alive, monkeypatch):
    def kill(pid, number):
        raise error

    monkeypatch.setattr(os, "kill", kill)
    assert artefacts._is_alive(7) is alive


def test_a_system_that_does_not_say_how_much_memory_was_held(monkeypatch):
    assert artefacts._peak_memory() > 1
    monkeypatch.setitem(sys.modules, "resource", None)
    assert artefacts._peak_memory() is None
