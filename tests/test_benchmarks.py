"The benchmarks run and print their tables; how long anything takes is not tested here."

import importlib
import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from atm_sae.methods import ARCHITECTURES, METHODS

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def script():
    "Imports a file of the folder as the scripts there do."
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module


@pytest.fixture(scope="module")
def bench(script):
    return script("absorption")


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


def test_readme_keeps_what_stands_around_the_tables(script, tmp_path, monkeypatch):
    common = script("common")
    written = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in ("training", "probes", "absorption", "extraction"):
        begin, end = script(name).BEGIN, script(name).END
        assert written.count(begin) == written.count(end) == 1, name
    monkeypatch.setattr(common, "README", tmp_path / "README.md")
    common.README.write_text("before BEGIN old END after")
    for _ in range(2):
        common.write_readme("new", "BEGIN", "END")
    assert common.README.read_text() == "before BEGIN\n\nnew\nEND after"


@pytest.mark.parametrize("name", ["training", "probes", "absorption", "extraction"])
@pytest.mark.parametrize("numbers", [["--quick"], ["--repeat", "1"]])
def test_numbers_without_meaning_are_not_written(script, name, numbers, monkeypatch, capsys):
    module = script(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--write", *numbers])
    with pytest.raises(SystemExit):
        module.main()
    assert "error: " in capsys.readouterr().err


def test_each_repetition_scores_a_task_that_holds_no_results(bench, monkeypatch):
    task, seen = bench.large_task(300, d_in=32), []

    def scores(sae, task, config, lm=None):
        seen.append("hits" in vars(task))
        return real(sae, task, config, lm=lm)

    real = bench.evaluate_absorption
    monkeypatch.setattr(bench, "evaluate_absorption", scores)
    bench.measure_scores(bench.word_sae(task, 64), task, 2)
    assert seen == [False, False]


def test_a_score_that_asks_for_no_word_is_not_measured(bench):
    found = [bench.within_seconds("", record(1, 1) | dict(asked=n), 2) for n in (0, 3)]
    assert [line["verdict"] for line in found] == ["NOT met", "met"]
    assert "no word" in found[0]["measured"]


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
def training(script):
    return script("training")


def runs(seconds, loss=1.0):
    return [dict(seconds=[9.0, *[s] * 5], loss=loss, l0=4.0, torch="2") for s in seconds]


def test_training_verdicts_by_hand(training):
    several = training.TOGETHER
    seconds = {who: (1.0, 2.0) for who in training.contestants()} | {
        ("atm-sae", "topk", "sae-lens"): (0.25, 0.5),
        ("dictionary-learning", "topk", "dictionary-learning"): (0.5, 1.0),
        ("atm-sae", several, "streamed", training.ONE_PASS): (0.25, 0.5),
        ("sae-lens", several, "streamed", training.IN_TURN): (8.0, 16.0),
        ("sae-lens", several, "streamed", training.ONE_PASS): (0.5, 1.0),
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
    assert found.loc["standard: loss over that of sae-lens"].to_dict() == dict(
        measured="0.91 [0.91, 0.91]", goal="within 2%", verdict="NOT met"
    )
    assert found.loc["jumprelu: loss over that of sae-lens"].verdict == "met"
    line = found.loc["several TopK, streamed: times as fast as sae-lens, one pass"]
    assert (line.measured, line.verdict) == ("2.00 [2.00, 2.00]", "met")
    line = found.loc["several TopK, streamed: one pass of sae-lens, times as fast as in turn"]
    assert line.measured == "16.00 [16.00, 16.00]"
    assert training.phases([9.0, 1, 2, 3, 4, 5, 6, 7, 9]) == (1.5, 7)
    assert len(training.table(records)) == len(records)


def test_every_method_is_measured_with_the_libraries_that_have_it(training, script):
    tables = script("training_worker")
    assert {*training.METHODS} == {*tables.DICTIONARY_LEARNING}
    measured = {who[1] for who in training.contestants() if who[0] == "atm-sae"}
    assert {*ARCHITECTURES} == measured - {training.TOGETHER}
    several = [who[0] for who in training.contestants() if who[1] == training.TOGETHER]
    assert {*several} == {"atm-sae", *training.RIVALS}


def test_training_worker_trains_what_it_was_given(training, tmp_path):
    task = training.TASK | training.QUICK
    unseen = {"one SAE": training.write_task(tmp_path, task)}
    methods = ("topk", "matryoshka", "gated")
    who = [("atm-sae", method, "sae-lens") for method in methods]
    found = training.race(who, tmp_path, 1, sys.executable)
    start = training.load_file(tmp_path / "start.safetensors")
    nothing = training.torch.zeros(task["d_sae"])
    start |= dict(r_mag=nothing, b_mag=nothing)
    for one, run in found.items():
        assert len(run["seconds"]) == task["steps"] and min(run["seconds"]) > 0
        before, _ = training.final_loss(start, one, task, unseen)
        after, l0 = training.final_loss(run["weights"], one, task, unseen)
        assert after < before and (one[1] == "gated" or l0 <= task["k"]), one
        assert not training.torch.equal(run["weights"]["W_enc"], start["W_enc"]), one


def test_several_saes_are_the_same_on_one_pass_and_in_turn(training, tmp_path):
    task = training.TASK | training.SEVERAL_TASK | training.SEVERAL_QUICK
    unseen = training.write_tasks(tmp_path, task, task)
    who = [who for who in training.contestants() if who[:2] == ("atm-sae", training.TOGETHER)]
    runs = training.race(who, tmp_path / "several", 1, sys.executable)
    found = {
        one[2:]: training.final_loss(run["weights"], one, task, unseen) for one, run in runs.items()
    }
    for kind in training.KINDS:
        assert found[kind, training.ONE_PASS] == found[kind, training.IN_TURN]
        loss, l0 = found[kind, training.ONE_PASS]
        assert 0 < loss < 1 and l0 == pytest.approx(3)  # of 2 and 4
    assert found["cached", training.ONE_PASS] != found["streamed", training.ONE_PASS]
    assert all(len(run["seconds"]) == task["steps"] for run in runs.values())


# ---- environments of other libraries


@pytest.fixture
def peers(script, tmp_path, monkeypatch):
    "The library 'sae-lens' is the module `json`; an environment is this Python, and pip a list."
    module = script("peers")
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path))
    monkeypatch.delenv("ATM_SAE_SAE_LENS", raising=False)
    monkeypatch.setitem(module.MODULES, "sae-lens", ("json",))
    monkeypatch.setattr(module, "installed", [], raising=False)

    def create(folder, **_):
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (folder / "bin" / "python").chmod(0o755)

    monkeypatch.setattr(module.venv, "create", create)
    monkeypatch.setattr(
        module, "pip", lambda python, library, *words: module.installed.append(words)
    )
    return module


def test_an_environment_that_does_not_import_is_removed(peers, tmp_path, monkeypatch):
    monkeypatch.setitem(peers.MODULES, "sae-lens", ("json", "no_such_module"))
    with pytest.raises(SystemExit, match=r"sae-lens.*'no_such_module'.*ATM_SAE_SAE_LENS"):
        peers.environment("sae-lens")
    assert not (tmp_path / "peers" / "sae-lens").exists()
    named = {"ATM_SAE_SAE_LENS": sys.executable}
    monkeypatch.setattr(os, "environ", {**os.environ, **named})
    with pytest.raises(SystemExit, match="no_such_module"):
        peers.environment("sae-lens")
    assert len(peers.installed) == 1  # the named one was not touched


def test_an_environment_is_made_once_for_each_pytorch(peers, monkeypatch):
    python = peers.environment("sae-lens")
    torch_version = peers.torch.__version__.split("+")[0]
    wanted = ("install", "-q", f"torch=={torch_version}", peers.RIVALS["sae-lens"])
    assert peers.installed == [wanted] and peers.environment("sae-lens") == python
    assert len(peers.installed) == 1
    (Path(python).parent.parent / peers.READY).write_text("")  # as for another PyTorch
    peers.environment("sae-lens")
    assert len(peers.installed) == 2
    monkeypatch.setattr(peers, "installed_version", lambda *_: "1.0")
    (Path(python).parent.parent / peers.READY).unlink()
    with pytest.raises(SystemExit, match=rf"torch 1\.0 instead of {torch_version}"):
        peers.environment("sae-lens")


def test_a_torchvision_that_does_not_fit_is_removed(peers, monkeypatch):
    monkeypatch.setattr(peers, "installed_version", lambda *_: "0.28.0")
    for reason, calls in (("no operator torchvision::nms", 2), (None, 1)):
        peers.installed.clear()
        monkeypatch.setattr(peers, "import_error", lambda *_, reason=reason: reason)
        peers.install("python", "sae-lens", "2.13.0")
        assert len(peers.installed) == calls, reason
        assert ("uninstall" in peers.installed[-1]) == bool(reason)


def test_what_pip_says_is_shown(script):
    with pytest.raises(SystemExit, match=r"(?s)sae-lens==.*no-such-command.*ATM_SAE_SAE_LENS"):
        script("peers").pip(sys.executable, "sae-lens", "no-such-command")


# ---- the cost of masks


def test_the_cost_of_masks_is_measured_where_they_hide_latents(script, tmp_path, monkeypatch):
    masking, training = script("masking"), script("training")
    task = training.TASK | training.QUICK
    x = masking.sparse_data(task, features=512)
    fresh = masking.make_trainer(task, x, masked=True)
    fresh.step(fresh.read_batch(1))
    masking.save_checkpoint(tmp_path / "fresh", fresh.state_dict(), "warm")
    with pytest.raises(SystemExit, match="hide 0% to 0% of the latents"):
        masking.one_round(task, x, tmp_path / "fresh")
    monkeypatch.setattr(masking, "WARM", 0.62)  # which is reached early
    monkeypatch.setattr(masking, "USUAL", (0.2, 0.65))
    steps = masking.warm_up(task, x, tmp_path / "warm")
    found = masking.one_round(task, x, tmp_path / "warm")
    assert 0 < steps < masking.WARM_STEPS and len(found["shares"]) == task["steps"]
    assert min(found["shares"]) > 0.2 and len(found["masked"]) == len(found["without"])


def test_the_cost_of_masks_by_hand(script):
    masking = script("masking")
    found = dict(without=[1, 2, 9], masked=[3, 1, 4], shares=[0.4, 0.3, 0.5], l0=[9.0, 10.0])
    (line,) = masking.table([found, found | dict(masked=[2, 2, 2])]).to_dict("records")
    assert line["measured"] == "1.250 [1.000, 1.500]" and line["verdict"] == "NOT met"
    assert line["share hidden"] == "0.400 [0.300, 0.500]" and line["L0 with"] == "10.0 [10.0, 10.0]"


def test_masks_that_hide_another_share_leave_their_reason_in_the_report(script, monkeypatch):
    training, masking = script("training"), script("masking")
    rounds = [dict(without=[1, 2, 9], masked=[3, 1, 4], shares=[0.4, 0.5], l0=[9.0, 10.0])]
    monkeypatch.setattr(masking, "measure", lambda *_: (1200, rounds))
    said = training.mask_report(training.measured_masks({}, 1, 1))
    assert "1,200 steps of warm-up" in said and "1.500 [1.500, 1.500]" in said
    monkeypatch.setattr(masking, "measure", lambda *_: masking.check_shares([0.0]))
    said = training.mask_report(training.measured_masks({}, 1, 1))
    assert "not measured" in said and "hide 0% to 0% of the latents" in said


# ---- extraction


def test_extraction_reads_its_text_from_a_file_each_time(script, tmp_path, monkeypatch):
    extraction = script("extraction")
    monkeypatch.setattr(extraction, "python_docs", lambda: ["one two\nthree"] * 40)
    path = extraction.write_documents(tmp_path / "documents.jsonl", 30)
    rows = extraction.rows(SimpleNamespace(tokenizer=None), path)
    assert list(rows.documents(2)) == ["one two\nthree"] * 28
    path.write_text(path.read_text().replace("one", "four"))
    assert list(rows.documents(29)) == ["four two\nthree"]


# ---- many SAEs on one pass


def test_many_saes_are_compared_on_cached_and_streamed_activations(script, cache, monkeypatch):
    many = script("many")
    passes, real = [], many.train_together
    monkeypatch.setattr(
        many, "train_together", lambda t, **more: (passes.append(len(t)), real(t, **more))[1]
    )
    rows = many.measure(many.QUICK)
    assert [row[0] for row in rows] == ["cached", "streamed"] and min(rows[0][1:]) > 0
    assert passes == [1, 1, 1, 3] * 2


# Of all installed packages only those that the benchmark says it needs, and what these need.
BARE = """
import importlib.machinery, runpy, sys
class Few(importlib.machinery.PathFinder):
    def find_spec(name, path=None, target=None):
        hidden = name.partition(".")[0] in {hidden}
        return None if hidden else importlib.machinery.PathFinder.find_spec(name, path, target)
sys.meta_path = [Few if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
sys.argv = ["gpu.py", "--small", "--out", {out!r}]
runpy.run_path({script!r}, run_name="__main__")
"""
NEEDED = ("torch", "transformers", "safetensors", "pandas", "scipy", "pytest")


def plain_name(name):
    return re.sub("[-_.]+", "-", name).lower()


def with_needs(names):
    "Installed packages, and all that they need without extras."
    found, waiting = set(), [*names]
    while waiting:
        name = plain_name(waiting.pop())
        with suppress(metadata.PackageNotFoundError):
            needs = metadata.requires(name) or []
            if name not in found:
                waiting += [re.match(r"[\w.-]+", n)[0] for n in needs if "extra ==" not in n]
            found.add(name)
    return found


def other_modules(kept):
    "Modules of the installed packages that are not among `kept`."
    homes = metadata.packages_distributions()
    of = {module: {plain_name(name) for name in names} for module, names in homes.items()}
    return sorted(module for module, names in of.items() if not names & kept)


def check_equality(rows):
    "Every method in two precisions, a resumed run and two protocols; on the CPU fp32 is equal."
    cases = [(row["what"], row["precision"]) for row in rows]
    trained = [m for m in METHODS if m != "random"]
    expected = [(f"training, {m}", kind) for m in trained for kind in ("fp32", "bf16")]
    expected += [("resumed training", "fp32")]
    expected += [(f"absorption, {protocol}", "fp32") for protocol in ("exact", "saebench")]
    assert cases == expected and all(row["verdict"] == "met" for row in rows)
    assert all((row["difference"] > 0) == (row["precision"] == "bf16") for row in rows)


def test_gpu_benchmark_in_its_small_form_needs_few_packages(tmp_path):
    hidden = [name for name in other_modules(with_needs(NEEDED)) if name != "atm_sae"]
    assert {"joblib", "matplotlib", "sklearn", "nbformat", "papermill"} <= {*hidden}
    script = str(FOLDER / "gpu.py")
    code = BARE.format(hidden=hidden, out=str(tmp_path), script=script)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert not found["errors"] and not found["left_out"]
    measured = [(row["code_path"], row["method"]) for row in found["training"]]
    methods = ("topk", "jumprelu", "standard", "atm")
    assert measured == [(path, method) for path in ("sparse", "dense") for method in methods]
    assert 0.2 < found["training"][-1]["of_latents_hidden"] < 0.6
    recipe, *names, whole = (row["what"] for row in found["model"])
    assert names[:3] == ["activations of layer 1", "reconstruction", "task of first letters"]
    assert names[3:] == ["absorption, exact", "absorption, saebench", "loss recovered"]
    assert recipe == "recipe: 600 stored activations, one TopK SAE of 64 latents"
    scored = [row["seconds"] for row in found["model"] if row["what"] in {*names[3:], names[1]}]
    assert whole.startswith("evaluation of one SAE of 64 latents")
    assert found["model"][-1]["seconds"] == pytest.approx(sum(scored)) and len(scored) == 4
    check_equality(found["equality"])
    assert all(0 < v for v in found["ceilings"].values())
    assert done.stdout == (tmp_path / "gpu.md").read_text() + "\n"


def test_a_part_that_fails_or_is_slow_does_not_stop_the_others(script, tmp_path):
    gpu = script("gpu")
    device = gpu.torch.device("cpu")
    parts = gpu.Parts(tmp_path, device, True, dict(limit=3600, part=3600))

    def wait():
        while True:
            time.sleep(0.01)

    def memory():
        raise gpu.torch.OutOfMemoryError("no memory")

    assert parts.run("broken", lambda: 1 / 0) is None
    assert parts.run("slow", wait, 0.05) is None
    assert parts.run("large", memory) is None
    assert parts.run("good", lambda: 3) == 3
    parts.write()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "ZeroDivisionError" in found["errors"]["broken"]
    assert "not finished after 0.05 s" in found["errors"]["slow"]
    assert found["left_out"] == ["large: the device has too little memory"]
    assert [*found["seconds"]] == ["broken", "slow", "large", "good"]
    assert "FAILED: broken" in (tmp_path / "gpu.md").read_text()
    parts.sizes["limit"] = 30
    assert parts.run("recipe", lambda: 3) is None and parts.run("short", lambda: 3) == 3
    assert re.fullmatch(
        r"recipe: needs about 90 s, (29|30) s are left", parts.found["left_out"][-1]
    )


def test_a_difference_is_compared_with_its_bound(script):
    gpu = script("gpu")
    for difference, verdict in ((0.05, "met"), (0.2, "NOT met"), (float("nan"), "NOT met")):
        row = gpu.compared("training, topk", "bf16", difference, gpu.BOUNDS["bf16"])
        assert row["verdict"] == verdict, difference


def test_random_activations_are_a_cache(script, tmp_path):
    gpu = script("gpu")
    cache = gpu.write_cache(tmp_path, 600, 8, gpu.torch.device("cpu"), 256)
    assert len(cache) == 600 and [len(shard) for shard in cache.shards] == [256, 256, 88]
    rows = cache.rows(slice(0, 600))
    assert abs(float(rows.mean())) < 0.1 and abs(float(rows.std()) - 1) < 0.1


def test_the_tables_of_the_gpu_have_a_place_in_the_readme(script, tmp_path, monkeypatch):
    common = script("common")
    copied = tmp_path / "README.md"
    copied.write_text(common.README.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(common, "README", copied)
    common.write_readme("new tables", *script("gpu").MARKERS)
    assert "new tables" in copied.read_text(encoding="utf-8")
    assert "no GPU was available.\n<!-- gpu" not in copied.read_text(encoding="utf-8")


def test_memory_benchmark_on_a_task_made_by_hand(script):
    memory = script("memory")
    task = memory.handmade_task(3000, 32)
    right = (task.x @ task.W.T + task.b).argmax(1) == task.letter
    assert right.float().mean() > 0.95 and 500 < int(task.test.sum()) < 700
    before, peak, seconds, letters = memory.measure("exact", memory.QUICK)
    assert letters == 26 and peak >= before > 0


def test_shares_of_a_chip_by_hand(script):
    chip = dict(operations=1000, bytes=50)
    expected = dict(seconds=2, of_operations=0.25, of_bytes=0.1)
    assert script("gpu").shares(2, 500, 10, chip) == expected
