"""Grids of runs in processes and on a Dask cluster of two workers: the same SAEs, files
sent back from other caches, errors, and workers that end with their parent."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial

import distributed
import pytest
import torch
from dask import config as dask_config
from small import WORLD, small, weights

from atm_sae.artefacts import folder_sha256
from atm_sae.train import runs
from atm_sae.train.executors import Executor, LostWorker, find_executor, run_jobs
from atm_sae.train.runs import (
    get_run,
    is_complete,
    receive_run,
    recipe,
    run_folder,
    run_grid,
    twin_spec,
)
from test_cli import SMALL, done, fails, spec as cli_spec


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def client():
    "Two processes with one thread each."
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def settle(client, places):
    "Give each worker a cache."
    for worker, place in zip(client.scheduler_info()["workers"], places, strict=True):
        client.run(
            lambda place: os.environ.update(ATM_SAE_CACHE=place), str(place), workers=[worker]
        )


@pytest.fixture
def far(client, tmp_path):
    "The caches of two workers that have no disk in common with the client, nor with each other."
    settle(client, places := [tmp_path / "a", tmp_path / "b"])
    return places


@pytest.fixture
def dask(client):
    return f"dask:{client.scheduler.address}"


@pytest.fixture
def quick(monkeypatch):
    "Clients that wait for a fifth of a second instead of twenty."
    monkeypatch.setattr(
        distributed,
        "Client",
        lambda address, timeout, client=distributed.Client: client(address, timeout=timeout / 100),
    )


NOBODY = "dask:tcp://127.0.0.1:1"  # no scheduler listens there


def made_by(place):
    return {p.name for p in place.glob("runs/*") if (p / "artefact.json").exists()}


def snapshots(run):
    return {
        step: {n: t.tolist() for n, t in s.items()} for step, s in run.history.snapshots.items()
    }


def keys(specs):
    return {s.key for s in specs}


# ---- the same runs


def test_a_grid_on_two_workers_is_the_grid_in_this_process(far, dask, cache, monkeypatch, tmp_path):
    specs = [
        small("topk"),
        small("atm"),
        small("matryoshka+atm", draw="nested", rescale=True),
        small("jumprelu"),
        small("topk"),
    ]
    many = run_grid(specs, progress=False, executor=dask)
    assert [r.spec for r in many] == specs and {r.folder.parent for r in many} == {cache / "runs"}
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "alone"))
    for a, b in zip(many, run_grid(specs, workers=1, progress=False)):
        assert (
            weights(a.sae) == weights(b.sae)
            and a.history.table.equals(b.history.table)
            and a.history.scale == b.history.scale
        )
        assert snapshots(a) == snapshots(b)
    assert {r.spec.method for r in many if snapshots(r).keys() == {10, 30}} == {
        "atm",
        "matryoshka+atm",
    }  # others have no mask


def test_workers_with_disks_of_their_own_send_whole_runs_back(far, dask, cache):
    specs = [small("topk", seed=s) for s in range(4)]
    run_grid(specs, progress=False, executor=dask)
    here, there = made_by(cache), [made_by(place) for place in far]
    assert (
        here == keys(specs)
        and all(there)
        and there[0] | there[1] == here
        and not there[0] & there[1]
    )  # both worked, on runs of their own
    for place in far:
        for key in made_by(place):
            assert folder_sha256(place / "runs" / key) == folder_sha256(cache / "runs" / key)


def test_a_dropout_control_finds_or_makes_its_twin_where_it_is_trained(
    far, dask, cache, monkeypatch, tmp_path
):
    blind, twin = [[small(m, seed=s) for s in (0, 1)] for m in ("dropout", "atm")]
    many = run_grid(blind, progress=False, executor=dask)
    assert made_by(cache) == keys(blind + twin)
    for place in far:
        assert keys([twin_spec(s) for s in blind if s.key in made_by(place)]) <= made_by(place)
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "alone"))
    for run in many:
        assert weights(run.sae) == weights(get_run(run.spec).sae)


def test_workers_on_a_common_disk_leave_runs_where_they_are(client, dask, cache, monkeypatch):
    settle(client, [cache, cache])
    monkeypatch.setattr(runs, "atomic_folder", None)  # nothing can be received
    assert [
        r.spec.seed
        for r in run_grid([small("topk"), small("topk", seed=1)], progress=False, executor=dask)
    ] == [0, 1]


# ---- what is there already


def test_complete_runs_are_not_made_again(far, dask, cache):
    old, new = small("topk"), small("topk", seed=1)
    record = get_run(old).folder / "run.json"
    before = record.stat().st_mtime_ns
    run_grid([old, new], progress=False, executor=dask)
    assert made_by(far[0]) | made_by(far[1]) == {new.key} and record.stat().st_mtime_ns == before
    assert [r.spec for r in run_grid([old, new], progress=False, executor=NOBODY)] == [
        old,
        new,
    ]  # needs no cluster


def test_what_comes_back_takes_the_place_of_a_run_that_was_stopped(far, dask, monkeypatch):
    spec = small("atm")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_history", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            get_run(spec)
    assert (run_folder(spec) / "checkpoint.safetensors").exists() and not is_complete(spec)
    (run,) = run_grid([spec], progress=False, executor=dask)
    assert sorted(p.name for p in run.folder.iterdir()) == [
        "artefact.json",
        "history.csv",
        "run.json",
        "sae",
        "snapshots.safetensors",
    ]


def run_files(spec):
    folder = get_run(spec).folder
    return {name: (folder / name).read_bytes() for name in runs.RUN_FILES}


def test_a_run_is_received_wholly_or_not_at_all(cache, monkeypatch, tmp_path):
    spec = small("topk")
    files = run_files(spec)
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "here"))
    with pytest.raises(TypeError):
        receive_run(spec, files | {"sae/cfg.json": "not bytes"})
    assert not is_complete(spec) and list((tmp_path / "here" / "runs").iterdir()) == []
    receive_run(spec, files)
    assert run_files(spec) == files


def test_only_the_files_of_a_run_are_received(cache, monkeypatch, tmp_path):
    spec = small("topk")
    files = run_files(spec)
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "here"))
    receive_run(spec, files | {"../../../stolen": b"", str(tmp_path / "stolen"): b"", "more": b""})
    assert run_files(spec) == files and not list(tmp_path.rglob("stolen"))
    assert not (run_folder(spec) / "more").exists()


def test_another_run_is_not_received(cache):
    with pytest.raises(RuntimeError, match='a worker sent another run than "topk, L0 3, seed 1"'):
        receive_run(small("topk", seed=1), run_files(small("topk")))
    assert not is_complete(small("topk", seed=1))


def test_a_worker_with_other_code_trains_nothing(far, dask, client, cache):
    def change_code(change):
        "Have a worker read its own package as if one statement of it were another."
        from atm_sae import closure

        if change:
            sources = dict(closure._sources(str(closure.files("atm_sae"))))
            old = "return WorldBatches(PlantedWorld(data), batch_size, seed)"
            file = "data/batches.py"
            assert old in sources[file]
            sources[file] = sources[file].replace(old, f"data = data\n    {old}")
            closure.real_sources = closure._sources
            closure._sources = lambda root: sources
        else:
            closure._sources = closure.real_sources
        closure._closure.cache_clear()

    client.run(change_code, True)
    try:
        with pytest.raises(
            RuntimeError,
            match=r"the worker has other code, packages, data or devices \(key [0-9a-f]{16}, here "
            r"[0-9a-f]{16}\): install the same atm-sae",
        ):
            run_grid([small("topk")], progress=False, executor=dask)
    finally:
        client.run(change_code, False)
    assert not is_complete(small("topk")) and not made_by(far[0]) | made_by(far[1])


# ---- which executor


def test_names_of_executors():
    assert find_executor("processes") == find_executor(None) == Executor()
    assert find_executor("dask") == Executor("dask")
    assert find_executor("dask:tcp://10.0.0.1:8786") == Executor("dask", "tcp://10.0.0.1:8786")


@pytest.mark.parametrize(
    "name", ["slurm", "Dask", "processes:2", "torchrun", ":tcp://10.0.0.1:8786"]
)
def test_unknown_executor(name, cache):
    with pytest.raises(
        ValueError, match=f"unknown executor '{name}': use 'processes', 'dask' or 'dask:ADDRESS'"
    ):
        run_grid([small("topk")], executor=name)
    assert not cache.exists()


def test_the_environment_names_an_executor(far, dask, monkeypatch):
    spec, other = small("topk"), small("topk", seed=1)
    monkeypatch.setenv("ATM_SAE_EXECUTOR", dask)
    run_grid([spec], progress=False)
    assert made_by(far[0]) | made_by(far[1]) == {spec.key}
    run_grid([other], workers=1, progress=False, executor="processes")  # the argument goes first
    assert is_complete(other) and made_by(far[0]) | made_by(far[1]) == {spec.key}
    monkeypatch.setenv("ATM_SAE_EXECUTOR", "slurm")
    with pytest.raises(ValueError, match="unknown executor 'slurm'"):
        run_grid([spec], progress=False)
    monkeypatch.setenv("ATM_SAE_EXECUTOR", "")
    assert run_grid([spec], progress=False)[0].spec == spec


# ---- errors


def test_the_run_that_failed_is_named(far, dask):
    bad = [recipe("topk", WORLD, d_in=9, d_sae=16, l0=3, steps=5, seed=s) for s in (3, 4)]
    why = "the data are 8 wide, but the SAE has d_in = 9"
    name = r'run "topk, L0 3, seed [34]" \([0-9a-f]{16}\)'
    with pytest.raises(RuntimeError, match=f"{name} failed: ValueError: {why}"):
        run_grid(bad, progress=False, executor=dask)


def test_a_failure_does_not_wait_for_the_others(cache):
    "The long run would take hours on the second worker of a cluster that ends with the grid."
    bad, long = recipe("topk", WORLD, d_in=9, d_sae=16, l0=3, steps=5), small("topk", steps=10**7)
    with pytest.raises(RuntimeError, match="the data are 8 wide"):
        run_grid([long, bad], progress=False, executor="dask")


def test_the_scheduler_is_lost(tmp_path, cache):
    where = tmp_path / "scheduler.json"
    command = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--port",
        "0",
        "--no-dashboard",
        "--scheduler-file",
        str(where),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as scheduler:
        while not where.exists() or not where.read_text():
            time.sleep(0.1)
        threading.Timer(3, scheduler.kill).start()  # no worker ever comes, so the run waits
        with pytest.raises(
            ConnectionError, match="the Dask scheduler was lost: 1 jobs are not done"
        ):
            run_grid(
                [small("topk")],
                progress=False,
                executor=f"dask:{json.loads(where.read_text())['address']}",
            )


def test_no_scheduler_answers(quick, cache):
    why = r"no Dask scheduler answers at tcp://127.0.0.1:1 \(.*\): start one \(dask scheduler\)"
    with pytest.raises(ConnectionError, match=f"{why}, or check the address"):
        run_grid([small("topk")], progress=False, executor=NOBODY)
    assert not is_complete(small("topk"))


def test_distributed_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    for name in ("dask", NOBODY):
        with pytest.raises(
            ImportError,
            match=r'the executor dask needs Dask distributed: pip install "atm-sae\[cluster\]"',
        ):
            run_grid([small("topk")], progress=False, executor=name)
    assert run_grid([small("topk")], workers=1, progress=False)  # others do without


def die(number):
    if number == 1:
        os._exit(3)
    return number


def test_a_worker_that_dies_is_an_error():
    with pytest.raises(LostWorker, match=r"a worker process was killed \(\{EXIT\(3\)") as e:
        [*run_jobs(die, [0, 1, 2], workers=2)]
    assert 1 in e.value.items and len(e.value.items) <= 2 and "\n" not in str(e.value)


def die_with(seed):
    "A grid whose workers are killed when they begin this run; what it raises."

    def lose(function, items, *rest):
        yield from run_jobs(partial(_die_at, function, seed), items, 2)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError) as e:
        patch.setattr(runs, "run_jobs", lose)
        run_grid([small("topk", seed=s) for s in range(4)], progress=False)
    return str(e.value)


def _die_at(function, seed, specs):
    if specs[0].seed == seed:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(specs)


def test_the_run_whose_worker_was_killed_is_named(cache):
    said = die_with(seed=2)
    assert f'run "topk, L0 3, seed 2" ({small("topk", seed=2).key})' in said
    assert "failed: LostWorker: a worker process was killed ({SIGKILL(-9)" in said


def leave(number):
    sys.exit(0)


def test_a_job_that_exits_is_an_error():
    "As a success it would end the process that asked for it, with status 0."
    outcomes = [*run_jobs(leave, [1, 2], workers=2)]
    assert [str(o.error) for o in outcomes] == ["SystemExit: 0"] * 2


def test_each_worker_reads_the_function_once(tmp_path):
    "With all that it holds, such as a language model; a job sends its item alone."

    class Data:
        def __setstate__(self, state):
            self.read_by = os.getpid()
            (tmp_path / f"{time.monotonic_ns()}-{os.getpid()}").touch()

        def __getstate__(self):
            return {}

        def job(self, number):
            return number, self.read_by == os.getpid(), os.getpid()

    found = [o.result for o in run_jobs(Data().job, range(8), workers=2)]
    assert sorted(number for number, _, _ in found) == [*range(8)] and all(
        here for _, here, _ in found
    )
    assert len([*tmp_path.iterdir()]) == len({pid for _, _, pid in found})


def test_a_function_that_cannot_be_pickled_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lock = threading.Lock()
    with pytest.raises(TypeError, match="cannot pickle"):
        [*run_jobs(lambda number: lock, [1, 2], workers=2)]
    assert not [*tmp_path.glob("atm-sae-*")]  # nothing is left behind


UNGUARDED = """
import sys
from atm_sae.train.executors import Executor, run_jobs
outcomes = run_jobs(abs, [-1, -2], 2, Executor(sys.argv[1]))
print(sorted(outcome.result for outcome in outcomes))
"""


@pytest.mark.parametrize("how", ["script", "-"])
def test_a_script_needs_no_guard(how, tmp_path):
    done = unguarded("processes", how, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[1, 2]\n", "")


def test_a_script_without_a_guard_is_told_so_by_dask(tmp_path):
    done = unguarded("dask", "script", tmp_path)
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("RuntimeError: the Dask workers did not start (Nanny failed to start.)")
    assert "must do so below `if __name__ == '__main__':`" in line


def unguarded(executor, how, folder):
    "A script that starts workers without a main guard, from a file or from stdin."
    (folder / "script").write_text(UNGUARDED)
    command = [sys.executable, how, executor]
    text = UNGUARDED if how == "-" else ""
    return subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True)


def test_a_dask_worker_that_dies_is_an_error():
    with dask_config.set({"distributed.scheduler.allowed-failures": 0}):
        (outcome,) = run_jobs(die, [1], 1, Executor("dask"))
    assert type(outcome.error).__name__ == "KilledWorker"


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def refuse(number):
    raise Unpicklable(number, number)


def test_an_exception_that_cannot_be_pickled_keeps_its_text():
    outcomes = [*run_jobs(refuse, [1, 2], workers=2)]
    assert sorted(str(o.error) for o in outcomes) == [
        "Unpicklable: 1 and 1",
        "Unpicklable: 2 and 2",
    ]


def test_results_that_came_back_are_kept(cache):
    bad = recipe("topk", WORLD, d_in=9, d_sae=16, l0=3, steps=5)
    good = [small("topk", seed=s) for s in (1, 2)]
    with pytest.raises(RuntimeError, match="the data are 8 wide"):
        run_grid([*good, small("topk", steps=10**7), bad], progress=False)
    assert is_complete(good[0])


PARENT = """
import os, signal, time
from atm_sae.train.executors import run_jobs
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in background
def job(number):
    os.write(1, b'%d\\n' % os.getpid())  # one piece, since two workers write
    time.sleep(600)
if __name__ == '__main__':
    list(run_jobs(job, [1, 2], workers=2))
"""


def is_running(pid):
    try:
        return not open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(number, tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    (tmp_path / "t").mkdir()
    with subprocess.Popen(command, env=os.environ | dict(TMPDIR=tmp_path / "t"), **pipes) as parent:
        try:
            workers = [int(parent.stdout.readline()) for _ in range(2)]
            assert all(map(is_running, workers))
            parent.send_signal(number)
            parent.wait(30)
        finally:
            parent.kill()  # or the end of this block would wait for it
    end = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(is_running, workers)) and not [*(tmp_path / "t").glob("atm-sae-*")]


# ---- from the command line


def test_train_on_a_cluster_of_its_own():
    out = done("train", "topk", "atm", *SMALL, "--workers", 2, "--executor", "dask", "-q")
    for method in ("topk", "atm"):
        spec = cli_spec(method)
        assert is_complete(spec) and str(run_folder(spec) / "sae") in out


def test_train_a_single_run_on_a_given_cluster(far, dask):
    done("train", "topk", *SMALL, "--executor", dask, "-q")
    assert made_by(far[0]) | made_by(far[1]) == {cli_spec().key}


def test_wrong_executors(quick):
    assert "unknown executor 'slurm': use 'processes', 'dask' or 'dask:ADDRESS'" in fails(
        "train", "topk", *SMALL, "--executor", "slurm"
    )
    assert "no Dask scheduler answers at tcp://127.0.0.1:1" in fails(
        "train", "topk", *SMALL, "-q", "--executor", NOBODY
    )
    assert "unknown executor 'slurm'" in fails("reproduce", "--dry-run", "--executor", "slurm")


def test_a_missing_distributed_is_no_surprise(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    said = fails("train", "topk", *SMALL, "-q", "--executor", "dask")
    assert 'pip install "atm-sae[cluster]"' in said and "unexpected" not in said


def test_a_single_run_obeys_the_environment(far, dask, monkeypatch):
    monkeypatch.setenv("ATM_SAE_EXECUTOR", dask)
    done("train", "topk", *SMALL, "-q")
    assert made_by(far[0]) | made_by(far[1]) == {cli_spec().key}


def gpu_of(folder, number):
    "Process and GPU of a job that ends when two jobs have begun. To be called in a worker."
    (folder / str(number)).touch()
    while len([*folder.iterdir()]) < 2:
        time.sleep(0.01)
    return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"]


def test_each_worker_has_a_gpu_of_its_own(tmp_path):
    jobs = run_jobs(partial(gpu_of, tmp_path), range(6), workers=2, gpus=["3", "5"])
    found = {o.result for o in jobs}
    assert len(found) == 2 and {gpu for _, gpu in found} == {"3", "5"}
    assert len({process for process, _ in found}) == 2


@pytest.mark.parametrize("visible, names", [(None, ["0", "1"]), ("4,7", ["4", "7"])])
def test_more_workers_than_gpus_are_refused(visible, names, monkeypatch):
    monkeypatch.setattr(runs, "pick_device", lambda name="auto": torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    made = []
    monkeypatch.setattr(runs, "_stages", lambda specs, device: [["one stage"]])
    monkeypatch.setattr(runs, "group_runs", lambda stage, workers, device: [[workers]])
    monkeypatch.setattr(runs, "run_jobs", lambda *args: made.append(args[2:]) or iter(()))
    with pytest.raises(ValueError, match="3 workers need a GPU each, and there are 2: choose work"):
        run_grid([], workers=3, progress=False)
    with pytest.raises(ValueError, match="would share a GPU: choose the executor 'processes'"):
        run_grid([], workers=2, progress=False, executor="dask")
    assert made == []
    run_grid([], progress=False)  # a process for each GPU
    assert made == [(2, Executor(), names)]
