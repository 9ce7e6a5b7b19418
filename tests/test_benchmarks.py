"The benchmark runs and prints its tables; how long anything takes is not tested here."

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmark_absorption", FOLDER / "absorption.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(size, *seconds):
    return dict(d_sae=size, peak_mib=3072, seconds=[dict(total=s) for s in seconds])


def test_exponent_and_verdicts_by_hand(bench):
    linear = [record(2**i, 2**i, 100, 2**i - 0.1) for i in range(4)]  # medians 1, 2, 4, 8
    assert bench.exponent(linear, "d_sae") == pytest.approx((1, 1))
    bent = [
        record(2**i, 2 ** max(0, 2 * (i - 3))) for i in range(6)
    ]  # seconds 1, 1, 1, 1, 4, 16: flat, then quadratic
    assert bench.exponent(bent, "d_sae") == pytest.approx(
        (26 / 35, 2)
    )  # (1.5 * 2 + 2.5 * 4) / 17.5, sizes seen from their middle
    assert [bench.linear("", r, "d_sae")["verdict"] for r in (linear, bent)] == ["met", "NOT met"]
    assert (
        bench.within_memory("", record(1, 1))["verdict"] == "NOT met"
    )  # 3072 MiB is not under 3 GiB
    assert bench.within_seconds("", record(1, 1, 9, 2), 2) == dict(
        what="", measured="2.00 [1.00, 9.00] s", target="2 s", verdict="met"
    )


def test_stopwatch_tells_steps_apart(bench, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    real = bench.absorption.encode_words
    monkeypatch.setattr(
        bench.absorption, "main_latents", lambda: next(clock)
    )  # takes 2 ticks: its own and the clock's
    with bench.stopwatch({"main latents": ["main_latents"], "encode": ["encode_words"]}) as spent:
        bench.absorption.main_latents()
    assert (
        spent == {"total": 4, "main latents": 2, "encode": 0, "rest": 2}
        and bench.absorption.encode_words is real
    )


def test_wide_sae_fires_as_often_and_carries_words(bench):
    task = bench.large_task(300, d_in=32)
    sae = bench.word_sae(task, 64)
    z, W_dec = bench.encode_words(sae, task.x)
    assert 16 < z.nnz / 300 <= bench.L0 and (W_dec[:26] - task.directions).abs().max() < 1e-6


def test_readme_keeps_what_stands_around_the_tables(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "README", tmp_path / "README.md")
    bench.README.write_text(f"before {bench.BEGIN} old {bench.END} after")
    for _ in range(2):
        bench.write_readme("new")
    assert bench.README.read_text() == f"before {bench.BEGIN}\n\nnew\n{bench.END} after"
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert text.count(bench.BEGIN) == text.count(bench.END) == 1


def test_quick_run_prints_its_tables(tmp_path):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(FOLDER.parent)}
    command = [
        sys.executable,
        str(FOLDER / "absorption.py"),
        "--quick",
        "--json",
        str(tmp_path / "all.json"),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for title in (
        "Targets",
        "The task from nothing",
        "Three scores",
        "Two scores over latents",
        "Two scores over words",
        "A wide SAE on many words",
    ):
        assert f"**{title}**" in done.stdout, done.stdout
    assert not any(str(p) in done.stdout for p in (tmp_path, FOLDER.parent))  # no absolute paths
    written = json.loads((tmp_path / "all.json").read_text())
    parts = ["set-up", "set-up", "three scores", "latents", "latents", "words", "words", "large"]
    assert len(written["verdicts"]) == 7 and [r["part"] for r in written["records"]] == parts
    for r in written["records"]:
        for s in r["seconds"]:
            assert sum(s.values()) == pytest.approx(2 * s["total"]) and min(s.values()) >= 0, r


# ---- training steps


@pytest.fixture(scope="module")
def training(bench):
    sys.modules["absorption"] = bench  # beside it in the folder; the script's own import
    spec = importlib.util.spec_from_file_location("benchmark_training", FOLDER / "training.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    del sys.modules["absorption"]
    return module


def runs(seconds, loss=1.0):
    return [dict(seconds=[9.0, *[s] * 5], loss=loss, l0=4.0, torch="2") for s in seconds]


def test_training_verdicts_by_hand(training):
    seconds = {who: (1.0, 2.0) for who in training.contestants()} | {
        ("atm-sae", "topk", "sae-lens"): (0.25, 0.5),
        ("dictionary-learning", "topk", "dictionary-learning"): (0.5, 1.0),
    }
    records = {who: runs(s) for who, s in seconds.items()}
    records["sae-lens", "standard", "sae-lens"] = runs((1.0, 2.0), loss=1.1)
    found = training.verdicts(records).set_index("what")
    line = found.loc["topk: times as fast as dictionary-learning, the faster of the two"]
    assert (line.measured, line.goal, line.verdict) == (
        "2.00 [2.00, 2.00]",
        "at least 3",
        "NOT met",
    )
    assert found.loc["ATM: time of a step over standard"].verdict == "met"
    assert found.loc["standard: loss over that of sae-lens"].to_dict() == dict(
        measured="0.91 [0.91, 0.91]", goal="within 2%", verdict="NOT met"
    )
    assert found.loc["jumprelu: loss over that of sae-lens"].verdict == "met" and len(found) == 10
    assert training.phases([9.0, 1, 2, 3, 4, 5, 6, 7, 9]) == (1.5, 7)
    assert len(training.table(records)) == len(records)


def test_training_worker_trains_what_it_was_given(training, tmp_path):
    task = training.TASK | training.QUICK
    unseen = training.write_task(tmp_path, task)
    who = ("atm-sae", "topk", "sae-lens")
    run = training.race(who, tmp_path, 1)
    assert len(run["seconds"]) == task["steps"] and min(run["seconds"]) > 0
    start = training.load_file(tmp_path / "start.safetensors")
    (before, _), (after, l0) = (
        training.final_loss(start, who, task, unseen),
        training.final_loss(run["weights"], who, task, unseen),
    )
    assert after < before and l0 <= task["k"]
    assert not training.torch.equal(run["weights"]["W_enc"], start["W_enc"])
