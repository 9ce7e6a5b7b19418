"""The command line: what it prints and where, exit statuses, errors of one line, completion; and
the files that describe the package."""

import ast
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from small import asked_devices
from typer.testing import CliRunner

import atm_sae
from atm_sae import cli
from atm_sae.evals.absorption import evaluate_absorption
from atm_sae.evals.first_letter import LETTERS, task_from_activations
from atm_sae.data.activations import ActivationSpec, get_activations
from atm_sae.data.batches import held_out
from atm_sae.cli import app, main
from atm_sae.core import one_thread
from atm_sae.data.lm import load_lm, save_lm, tiny_lm
from atm_sae.evals.metrics import (
    planted_metrics,
    reconstruction_metrics,
    synthsaebench_metrics,
)
from atm_sae.sae.formats import from_pretrained, model_card
from atm_sae.evals.probing import evaluate_probing, probing_tasks
from atm_sae.sae.sae import SAE, SAEConfig
from atm_sae.evals.sae_probes import evaluate_sae_probes, sae_probes_tasks
from atm_sae.evals.saebench import read_saebench
from atm_sae.data.planted import PlantedWorld, WorldBatches, WorldConfig
from atm_sae.data.synthsaebench import TreeWorld, TreeWorldConfig
from atm_sae.methods import METHODS
from atm_sae.train import runs
from atm_sae.train.runs import get_run, recipe, run_folder

ROOT = Path(__file__).resolve().parent.parent
WORLD = WorldConfig(
    d_in=8, n_parents=2, children_per_parent=2, n_free=6, parent_rate=0.3, free_rate=0.2
)
SMALL = [
    "--d-sae",
    "16",
    "--l0",
    "3",
    "--steps",
    "40",
    "--batch-size",
    "32",
    "--set",
    "log_every=5",
    "--set",
    "checkpoint_every=20",
]
SMALL += [
    a
    for n in ("d_in", "n_parents", "children_per_parent", "n_free", "parent_rate", "free_rate")
    for a in ("--set", f"{n}={getattr(WORLD, n)}")
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "Every test has a cache of its own, and one thread."
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    cli.load_model.cache_clear()
    with one_thread():
        yield tmp_path / "cache"


def run(*args):
    "Exit status, stdout and stderr of a command in this process."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(a) for a in args])
    return status, out.getvalue(), err.getvalue()


def done(*args):
    "Stdout of a command that must succeed."
    status, out, err = run(*args)
    assert status == 0, err
    return out


def fails(*args):
    "The one line of a command that must fail."
    status, out, err = run(*args)
    lines = [line for line in err.splitlines() if line.startswith("atm-sae: ")]
    assert (status, out, len(lines)) == (2, "", 1) and "Traceback" not in err, (status, out, err)
    return lines[0]


def shell(*args, code="import sys; from atm_sae.cli import main; sys.exit(main())", **env):
    "A command in a process of its own."
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | env
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def ended(process, seconds=120):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def spec(method="topk", seed=0):
    return recipe(
        method, WORLD, 8, 16, 3.0, 40, seed, batch_size=32, log_every=5, checkpoint_every=20
    )


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    "Two SAEs of one command, with the JSON that it printed."
    folder = tmp_path_factory.mktemp("planted")
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setenv("ATM_SAE_CACHE", str(folder / "cache"))
        rows = json.loads(
            done("train", "topk", "atm", *SMALL, "--out", folder / "saes", "--json", "-q")
        )
    return folder / "saes", rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_lm(tiny_lm(d_model=48), tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    "An SAE without a record, whose metadata name a layer."
    sae = SAE(
        SAEConfig(48, 60, "topk", k=5),
        metadata=dict(model_name="tiny", hook_name="blocks.1.hook_resid_post"),
    )
    return sae, sae.save(tmp_path_factory.mktemp("foreign") / "mine")


# ---- the frame


def test_every_command_has_help_with_an_example_and_defaults():
    for name in ("train", "evaluate", "export", "push", "reproduce"):
        shown = CliRunner().invoke(app, [name, "--help"], env={"TERMINAL_WIDTH": "200"})
        assert shown.exit_code == 0 and f"Example: atm-sae {name} " in shown.output, name
    shown = CliRunner().invoke(app, ["train", "--help"], env={"TERMINAL_WIDTH": "200"}).output
    assert (
        all(panel in shown for panel in ("Data", "Training", "Output"))
        and "[default: 2000]" in shown
        and "[default: planted]" in shown
    )


def test_examples_of_the_help_can_be_parsed():
    import typer

    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        words = command.epilog.split(">")[0].split()[3:]
        command.make_context(name, words)


def test_version():
    assert done("--version") == f"atm-sae {atm_sae.__version__}\n"


def test_help_and_completion_need_no_torch():
    code = """
import sys
from atm_sae.cli import main
status = main()
heavy = {"torch", "numpy", "pandas", "transformers"} & sys.modules.keys()
sys.exit(9 if heavy else status)
"""
    assert [
        ended(shell(*a, code=code))[0] for a in (["--help"], ["train", "--help"], ["--version"])
    ] == [0, 0, 0]


def test_no_command_shows_the_help():
    status, out, err = run()
    assert status == 2 and "Commands" in out + err


@pytest.mark.parametrize(
    "args, message",
    [
        (["frob"], "No such command 'frob'"),
        (["train", "topk", "--frob"], "No such option: --frob"),
        (["train"], "Missing argument"),
        (["train", "topk", "--steps", "many"], "Invalid value for '--steps'"),
        (["train", "topk", "--workers", "0"], "Invalid value for '--workers'"),
    ],
)
def test_wrong_usage(args, message):
    line = fails(*args)
    assert message in line and line.endswith("--help shows how)")


def test_unexpected_errors_are_one_line_unless_debug(monkeypatch):
    monkeypatch.setattr(cli, "_settings", lambda pairs: {}["nothing"])
    assert (
        fails("train", "topk")
        == "atm-sae: KeyError: 'nothing' (unexpected; atm-sae --debug ... shows where)"
    )
    with pytest.raises(KeyError):
        run("--debug", "train", "topk")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(cli, "_settings", lambda pairs: __import__("not_there"))
    assert (
        "not_there is not installed, and this command needs it: pip install '.[reports,data]'"
        in fails("train", "topk")
    )


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_in_any_encoding(encoding, planted, tmp_path, monkeypatch):
    "A folder's name that stdout cannot hold is escaped; JSON has the name itself."
    shutil.copytree(planted[0] / "topk-l0_3-seed0", tmp_path / "ж")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["evaluate", "ж", "-q"]) == main(["evaluate", "ж", "-q", "--json"]) == 0
    stdout.flush()
    text = stdout.buffer.getvalue().decode(encoding)
    table, bracket, rest = text.partition("[")
    assert "\n\\u0436    topk " in table and json.loads(bracket + rest)[0]["sae"] == "ж"


def test_a_missing_number_is_ascii():
    assert cli._table([dict(name="x", value=None), dict(name="y", value=1.5)]).isascii()


def test_ctrl_c(monkeypatch):
    monkeypatch.setattr(cli, "_settings", lambda pairs: (_ for _ in ()).throw(KeyboardInterrupt))
    status, out, err = run("train", "topk")
    assert status == 130 and out == "" and "atm-sae: stopped; what is finished is kept" in err


# ---- train


def test_trained_saes_are_the_librarys(planted, cache):
    folder, rows = planted
    assert [(r["method"], r["l0"], r["seed"], Path(r["sae"]).name) for r in rows] == [
        ("topk", 3, 0, "topk-l0_3-seed0"),
        ("atm", 3, 0, "atm-l0_3-seed0"),
    ]
    for row in rows:
        wanted = get_run(spec(row["method"]))
        assert row["key"] == wanted.spec.key and torch.equal(
            SAE.load(row["sae"]).W_dec, wanted.sae.W_dec
        )
        scores = planted_metrics(wanted.sae, PlantedWorld(WORLD))
        assert row["metrics"] == scores | dict(explained_variance=1 - scores["fvu"])
        assert {p.name for p in Path(row["sae"]).iterdir()} == {
            "cfg.json",
            "sae_weights.safetensors",
            "run.json",
            "history.csv",
        }


def test_train_into_the_cache_and_again():
    status, out, err = run("train", "topk", *SMALL)
    place = run_folder(spec()) / "sae"
    assert (
        status == 0
        and out.splitlines()[0].split()[:3] == ["method", "seed", "L0"]
        and str(place) in out
        and "40/40" in err
        and "fvu" in err
    )
    before = (place / "cfg.json").stat().st_mtime_ns
    assert (
        done("train", "topk", *SMALL, "-q") == out
        and (place / "cfg.json").stat().st_mtime_ns == before
    )


def test_train_in_a_world_by_name():
    sizes = dict(d_in=12, n_features=60, n_roots=2, n_branches=3, depth=2, spread_steps=1)
    small = [f"--set={name}={value}" for name, value in sizes.items()]
    name = "planted:synthsaebench-16k"
    options = ["--d-sae", "16", "--l0", "3", "--steps", "5", "--batch-size", "16", "-q", "--json"]
    (row,) = json.loads(done("train", "topk", "--data", name, *small, *options))
    world = TreeWorld(TreeWorldConfig(**sizes))
    sae = SAE.load(row["sae"])
    assert row["metrics"]["mcc"] == planted_metrics(sae, world)["mcc"]
    scores = {f"synthsaebench_{k}": v for k, v in synthsaebench_metrics(sae, world).items()}
    assert row["metrics"].items() >= scores.items()
    for place in ([], ["--model", name]):
        (found,) = json.loads(done("evaluate", row["sae"], *place, "--json", "-q"))
        assert found["model"] == name and found["absorption"]["n_parents"] == 8
        assert found["core"].items() >= scores.items()
    table = done("evaluate", row["sae"], "-q")
    assert "SynthSAEBench F1" in table and "SynthSAEBench MCC" in table


def test_an_unknown_world_is_named():
    status, _, err = run("train", "topk", "--data", "planted:16k")
    assert status == 2 and "planted:16k: no such world; there are planted, planted:synth" in err


def test_a_missed_l0_is_said_beside_its_target():
    "Without a penalty's coefficient nothing brings JumpReLU to its target."
    missed = ["train", "jumprelu", *SMALL, "--set", "l0_coef=0", "-q"]
    for _ in range(2):  # trained, and loaded
        status, out, err = run(*missed)
        head, line = (text.split() for text in out.splitlines())
        assert status == 0 and head[2:4] == ["L0", "target"] and line[3] == "3"
        assert float(line[2]) > 3.15
        assert err == (
            f"atm-sae: jumprelu, L0 3.0, seed 0: reached L0 {line[2]}, more than 5% from its "
            "target 3: train for more steps, or raise l0_coef\n"
        )
    status, out, err = run("evaluate", line[-1], "-q")
    head, values = (text.split() for text in out.splitlines())
    assert head[2:4] == ["L0", "target"] and values[2:4] == [line[2], "3.00"]
    assert err.startswith(f"atm-sae: {line[-1]}: reached L0 {values[2]}, more than 5% from its")


def test_an_sae_without_a_target_has_no_column_for_it():
    SAE(SAEConfig(64, 80)).save("free")
    status, out, err = run("evaluate", "free", "--model", "planted", "--metrics", "core", "-q")
    assert status == 0 and "L0" in out and "target" not in out + err


def test_quiet_json_and_settings():
    status, out, err = run(
        "train",
        "atm",
        *SMALL,
        "--set",
        "r=0.5",
        "--set",
        "per=sample",
        "--lr",
        "0.01",
        "--json",
        "--quiet",
    )
    assert status == 0 and "atm, L0 3.0, seed 0: reached L0" in err and err.count("\n") == 1
    wanted = recipe(
        "atm",
        WORLD,
        8,
        16,
        3.0,
        40,
        batch_size=32,
        log_every=5,
        checkpoint_every=20,
        r=0.5,
        per="sample",
        lr=0.01,
    )
    assert [r["key"] for r in json.loads(out)] == [wanted.key]


def test_settings_of_masks_and_nested_dictionaries():
    new = dict(draw="nested", effect="norm", rescale=True, anneal=0.25, prefixes=[0.25, 1])
    pairs = [
        a
        for n, v in new.items()
        for a in ("--set", f"{n}={v if isinstance(v, str) else json.dumps(v)}")
    ]
    (row,) = json.loads(done("train", "matryoshka+atm", *SMALL, *pairs, "--json", "-q"))
    assert (
        row["key"]
        == recipe(
            "matryoshka+atm",
            WORLD,
            8,
            16,
            3.0,
            40,
            batch_size=32,
            log_every=5,
            checkpoint_every=20,
            **new,
        ).key
    )
    assert "draw must be 'independent' or 'nested', not 'sideways'" in fails(
        "train", "atm", *SMALL, "--set", "draw=sideways"
    )


def test_a_grid_over_processes():
    rows = json.loads(
        done("train", "topk", *SMALL, "--seed", 0, "--seed", 1, "--workers", 2, "--json", "-q")
    )
    assert [r["key"] for r in rows] == [spec(seed=s).key for s in (0, 1)]


def test_outliers_are_said(monkeypatch, tmp_path):
    "The loudest row of every batch is 150 times as loud."

    class Loud(WorldBatches):
        def __next__(self):
            x = super().__next__()
            x[x.norm(dim=1).argmax()] *= 150
            return x

    monkeypatch.setattr(
        runs, "data_batches", lambda _, n, seed, device: Loud(PlantedWorld(WORLD), n, seed)
    )
    out = done("train", "topk", *SMALL, "--out", tmp_path / "mine", "-q")
    said = "topk, seed 0: left out 40 of 1,280 activations as outliers, norm above "
    assert out.splitlines()[2].startswith(said) and len(out.splitlines()) == 3
    (row,) = json.loads(done("train", "topk", *SMALL, "--json", "-q"))
    folder = next((tmp_path / "mine").iterdir())
    sae = SAE.load(folder)
    assert row["outliers"] == dict(n=40, of=1280, max_norm=pytest.approx(sae.max_norm))
    sample = PlantedWorld.sample
    monkeypatch.setattr(PlantedWorld, "sample", lambda *a: (lambda x, c: (9 * x, c))(*sample(*a)))
    (row,) = json.loads(done("evaluate", folder, "--json", "-q"))
    n = row["core"]["n_outliers"]
    assert 0 < n < 20_000
    out = done("evaluate", folder, "-q")
    assert out.splitlines()[-1].endswith(f"seed0: activations left out as outliers: {n:,} (core)")
    monkeypatch.setattr(PlantedWorld, "sample", sample)
    assert "left out" not in done("evaluate", folder, "-q")


def test_train_on_a_model(model, tmp_path):
    args = [
        "train",
        "topk",
        "--data",
        model,
        "--layer",
        1,
        "--site",
        "mlp_out",
        "--set",
        "n_tokens=3000",
        "--d-sae",
        32,
        "--l0",
        4,
        "--steps",
        5,
        "--batch-size",
        64,
    ]
    (row,) = json.loads(done(*args, "--out", tmp_path / "mine", "--json"))
    assert SAE.load(row["sae"]).metadata["hook_name"] == "blocks.1.hook_mlp_out"
    data = ActivationSpec(model=model, layer=1, n_tokens=3000, site="mlp_out")
    assert row["metrics"] == reconstruction_metrics(
        SAE.load(row["sae"]), held_out(get_activations(data), 20_000)
    )
    (again,) = json.loads(done("evaluate", row["sae"], "--metrics", "core", "--json", "-q"))
    place = (again["model"], again["layer"], again["site"])
    assert place == (str(Path(model).resolve()), 1, "mlp_out")
    core = again["core"]
    assert {k: core[k] for k in row["metrics"]} == row["metrics"]
    # of an untrained model the score may have any size: it is held against the losses it is made of
    zero, sae, orig = (core[f"ce_{k}"] for k in ("zero", "sae", "orig"))
    assert (
        core["ce_loss_score"] == pytest.approx((zero - sae) / (zero - orig))
        and min(zero, sae, orig) > 0
        and zero != orig
    )


@pytest.mark.parametrize(
    "args, message",
    [
        (["topq"], "unknown method 'topq': choose one of atm"),
        (["topk", "--set", "k"], "--set k: write NAME=VALUE"),
        (["topk", "--set", "seed=3"], "--set seed=3: use --seed"),
        (["topk", "--set", "kk=3"], "--set kk=3: no field 'kk'; there are "),
        (["topk", "--set", "k=many"], "--set k=many: k must be int, not 'many'"),
        (["atm", "--set", "rescale=1"], "rescale must be bool"),
        (["topk", "--set", "k=true"], "k must be int"),
        (
            ["topk", "--set", "r=1"],
            "--set r: no field of SAEConfig or TrainConfig, nor of ATMConfig if topk has a mask",
        ),
        (["topk", "--l0", "1000"], "needs k"),
        (["topk", "--steps", "0"], "must be at least 1"),
        (["topk", "--lr", "-1"], "lr must be positive"),
        (["topk", "--set", "n_parents=-1"], "n_parents"),
        (["topk", "--data", "no-model"], "no-model is not in the local Hub cache"),
    ],
)
def test_wrong_training(args, message):
    assert message in fails("train", *args)


def test_a_layer_that_is_not_there(model):
    assert "tiny has no layer 9" in fails("train", "topk", "--data", model, "--layer", 9).replace(
        model, "tiny"
    )


def test_out_replaces_nothing_else(planted, tmp_path):
    wanted = tmp_path / "precious/topk-l0_3-seed0"
    wanted.mkdir(parents=True)
    (wanted / "file").write_text("x")
    refused = "is there already and is not this run"
    assert refused in fails("train", "topk", *SMALL, "--out", tmp_path / "precious", "-q")
    other = shutil.copytree(planted[0] / "atm-l0_3-seed0", tmp_path / "other/topk-l0_3-seed0")
    assert refused in fails("train", "topk", *SMALL, "--out", other.parent, "-q")
    line = fails("train", "topk", *SMALL, "--out", wanted / "file", "-q")
    assert line == f"atm-sae: {wanted / 'file'} is a file: choose another --out"
    assert (wanted / "file").read_text() == "x" and not (tmp_path / "cache/runs").exists()
    (tmp_path / "empty/topk-l0_3-seed0").mkdir(parents=True)
    for _ in range(2):
        done("train", "topk", *SMALL, "--out", tmp_path / "empty", "-q")


def test_one_run_and_several_have_the_same_layout(planted, tmp_path):
    "What the README shows for two methods works for one: train --out saes, evaluate saes/*."
    done("train", "topk", *SMALL, "--out", tmp_path / "saes", "-q")
    (folder,) = (tmp_path / "saes").iterdir()
    assert folder.name == "topk-l0_3-seed0" and (planted[0] / folder.name).is_dir()
    assert "topk" in done("evaluate", *(tmp_path / "saes").iterdir(), "-q")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("how, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_training_goes_on(cache, how, status):
    args = ["train", "topk", *SMALL, "--set", "checkpoint_every=200", "--steps", 20_000]
    code = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from atm_sae.cli import main
sys.exit(main())
"""
    process, end = shell(*args, code=code), time.monotonic() + 100
    while not (found := list((cache / "runs").glob("*/checkpoint.safetensors"))):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    process.send_signal(how)
    code, out, err = ended(process)
    assert (
        (code, out) == (status, "")
        and "Traceback" not in err
        and [p.name for p in found[0].parent.iterdir()] == ["checkpoint.safetensors"]
    )


# ---- evaluate


def test_files_of_an_sae_are_not_saes(planted):
    folder = planted[0] / "topk-l0_3-seed0"
    line = fails("evaluate", *sorted(folder.iterdir()), "-q")
    said = f"{folder / 'cfg.json'} is a file: give the folder of an SAE, such as {folder}"
    assert line == f"atm-sae: {said}"


def test_the_record_in_a_subfolder_is_read(planted):
    args = ("evaluate", planted[0], "--subfolder", "atm-l0_3-seed0", "--json", "-q")
    (score,) = json.loads(done(*args))
    assert (score["method"], score["model"]) == ("atm", "planted")


def test_evaluate_planted(planted):
    folder, rows = planted
    scored = json.loads(done("evaluate", *(r["sae"] for r in rows), "--json"))
    for row, score in zip(rows, scored):
        assert (score["method"], score["model"], score["layer"]) == (row["method"], "planted", None)
        assert score["core"].pop("target_l0") == 3
        assert (
            score["core"] == {k: row["metrics"][k] for k in score["core"]}
            and score["core"]["l0"] > 0
        )
        assert score["absorption"] == dict(
            full=row["metrics"]["absorption"], miss_rate=row["metrics"]["miss_rate"], n_parents=2
        )
    table = done("evaluate", rows[0]["sae"], "-q")
    assert (
        table.splitlines()[1].split()[:2] == [rows[0]["sae"], "topk"]
        and "absorption, full" in table
        and "probing" not in table
    )
    assert (
        "absorption"
        not in json.loads(done("evaluate", rows[0]["sae"], "--metrics", "core", "--json", "-q"))[0]
    )


def test_evaluate_a_cached_run_and_one_without_a_record():
    (place,) = (r["sae"] for r in json.loads(done("train", "atm", *SMALL, "--json", "-q")))
    assert json.loads(done("evaluate", place, "--json", "-q"))[0]["method"] == "atm"
    bare = SAE(SAEConfig(64, 80, "topk", k=4)).save("bare")
    (row,) = json.loads(done("evaluate", bare, "--model", "planted", "--json", "-q"))
    assert (
        row["method"] == "topk"
        and row["absorption"]["full"]
        == planted_metrics(SAE.load(bare), PlantedWorld(WorldConfig()))["absorption"]
    )


def test_options_that_name_what_the_run_read_keep_its_text():
    "A cache of other text, or of fewer tokens, would hold activations that it was trained on."
    place = dict(model_name="nano-gemma2", hook_name="blocks.2.hook_resid_post")
    sae = SAE(SAEConfig(48, 60, "topk", k=5), place)
    recorded = ActivationSpec(n_tokens=2_000_000, seed=3)
    for named in [("nano-gemma2", None, None), (None, 2, None), (None, None, "resid_post")]:
        assert cli._data_of("sae", sae, recorded, cli.Reads(*named, None)) == recorded
    assert cli._data_of("sae", sae, recorded, cli.Reads(None, 3, "resid_pre", None)) == recorded
    other = cli._data_of("sae", sae, recorded, cli.Reads("tiny", None, None, None))
    assert other == ActivationSpec(model="tiny", layer=2)


@pytest.mark.parametrize("record", [{"id": 3}, {"spec": 3}, {"spec": {"data": {"width": 3}}}])
def test_a_run_json_of_another_tool_is_named(tmp_path, record):
    folder = SAE(SAEConfig(64, 80, "topk", k=4)).save(tmp_path / "sae")
    (folder / "run.json").write_text(json.dumps(record))
    said = fails("evaluate", folder, "--model", "planted", "-q")
    assert f"{folder}: run.json is not a record" in said


def test_two_saes_of_one_name_do_not_share_a_file_of_saebench(model, foreign, tmp_path):
    twin = shutil.copytree(foreign[1], tmp_path / foreign[1].name)
    args = ("--model", model, "--metrics", "core", "--saebench", tmp_path / "bench", "-q")
    assert "two of the SAEs are called mine" in fails("evaluate", foreign[1], twin, *args)
    assert not (tmp_path / "bench").exists()


@pytest.mark.parametrize("value", ['[0.5,"all"]', "[true]", "[[1]]"])
def test_a_list_of_other_things_than_numbers_is_refused(value):
    said = fails("train", "matryoshka", "--set", f"prefixes={value}", "-q")
    assert f"--set prefixes={value}: prefixes must be tuple" in said


def test_a_card_of_a_planted_sae_without_its_absorption(tmp_path):
    (tmp_path / "scores.json").write_text('[{"model": "planted", "absorption": {}}]')
    assert cli.card_scores(tmp_path / "scores.json") == {}


@pytest.fixture
def letters(monkeypatch):
    "First-letter tasks of exact vectors, at two seeds, in the place of the model's."
    letter = torch.arange(26).repeat_interleave(20)
    x = torch.zeros(520, 48)
    x[range(520), letter] = x[range(520), 26 + torch.arange(20).repeat(26)] = 1
    words = pd.DataFrame(
        {
            "text": [f"{LETTERS[n]}{i}" for i, n in enumerate(letter)],
            "letter": [LETTERS[n] for n in letter],
        }
    )
    tasks = [task_from_activations(x, words, seed, model="tiny", layer=1) for seed in range(2)]
    tasks[0].asked = []

    def found(lm, layer, seeds, site, **which):
        tasks[0].asked.append(which)
        return [tasks[i] for i in seeds]

    monkeypatch.setattr("atm_sae.evals.first_letter.get_tasks", found)
    return tasks


def test_evaluate_on_a_model(model, foreign, letters, monkeypatch, tmp_path):
    sae, folder = foreign
    tasks = [t for t in probing_tasks(n_texts=24) if t.group == "tools"]
    monkeypatch.setattr("atm_sae.evals.probing.probing_tasks", lambda: tasks)
    args = ["--model", model, "--tokens", 3000, "--eval-seeds", 2, "--saebench", tmp_path / "bench"]
    status, out, err = run("evaluate", folder, *args, "--json")
    assert status == 0 and "metrics: 100%" in err, err
    (row,) = json.loads(out)
    assert (row["method"], row["model"], row["layer"]) == ("topk", model, 1)
    core = reconstruction_metrics(
        sae, held_out(get_activations(ActivationSpec(model=model, layer=1, n_tokens=3000)), 20_000)
    )
    assert {k: row["core"][k] for k in core} == core
    result = evaluate_absorption(sae, letters)
    assert (
        row["absorption"]["full"],
        row["absorption"]["fraction"],
        row["absorption"]["eval_seeds"],
    ) == (result.full, result.fraction, 2)
    assert (
        row["absorption"]["n_letters"] == 26
        and row["absorption"]["full_noise"] == result.noise["full"]
    )
    probing = evaluate_probing(sae, load_lm(model), 1, tasks).summary
    assert {k: row["probing"][k] for k in probing} == probing and row["probing"]["n_tasks"] == len(
        tasks
    )
    bench = read_saebench(tmp_path / "bench").set_index("eval_type")
    assert (
        set(bench.index) == {"core", "absorption_first_letter", "sparse_probing"}
        and set(bench.sae_id) == {"mine"}
        and set(bench.layer) == {1}
    )
    assert (
        bench.mean_full_absorption_score["absorption_first_letter"] == result.full
        and bench.l0["core"] == core["l0"]
    )


@pytest.fixture
def benchmark(tmp_path):
    "A folder of sae-probes with one task of 240 texts."
    place = tmp_path / "sae_probes" / "data"
    (place / "cleaned_data").mkdir(parents=True)
    about = {"Data type": "Binary Classification", "Dataset save name": "cleaned_data/1_cats.csv"}
    pd.DataFrame([about]).to_csv(place / "probing_datasets_MASTER.csv")
    texts = [f"the {'cat' if i % 2 else 'dog'} number {i}" for i in range(240)]
    table = pd.DataFrame(dict(prompt=texts, target=[i % 2 for i in range(240)]))
    table.to_csv(place / "cleaned_data" / "1_cats.csv", index=False)
    return tmp_path


def test_evaluate_on_sae_probes(model, foreign, benchmark):
    sae, folder = foreign
    args = ["evaluate", folder, "--model", model, "--metrics", "sae-probes", "-q"]
    args += ["--sae-probes", benchmark]
    (row,) = json.loads(done(*args, "--saebench", benchmark / "bench", "--json"))
    found = row["sae-probes"]
    truth = evaluate_sae_probes(sae, load_lm(model), 1, sae_probes_tasks(benchmark)).summary
    assert found == truth | dict(n_tasks=1) and {*row} >= {"sae", "model", "layer"}
    (bench,) = read_saebench(benchmark / "bench").to_dict("records")
    assert bench["eval_type"] == "sparse_probing_sae_probes" and bench["sae_id"] == "mine"
    assert bench["sae_probes_sae_top_1_test_auc"] == truth["sae_top_1_test_auc"]
    head, numbers = done(*args).splitlines()
    assert head.split("  ")[-2:] == ["sae-probes, top-1 AUC", "sae-probes, model's AUC"]
    scores = [truth["sae_top_1_test_auc"], truth["llm_test_auc"]]
    assert [float(n) for n in numbers.split()[-2:]] == pytest.approx(scores, abs=0.01)


def test_files_of_sae_probes_are_read_before_anything_is_measured(model, foreign, monkeypatch):
    monkeypatch.setattr(cli, "load_model", None)
    args = ["evaluate", foreign[1], "--model", model, "--metrics", "core,sae-probes"]
    assert "holds no folder cleaned_data" in fails(*args, "--sae-probes", "none")
    monkeypatch.setattr("atm_sae.evals.sae_probes.find_spec", lambda name: None)
    said = fails(*args)
    assert "is not installed: download it with: pip download --no-deps sae-probes" in said
    assert "--sae-probes FILE" in said


def test_sae_probes_needs_texts(planted, benchmark):
    args = ["--metrics", "sae-probes", "--sae-probes", benchmark]
    said = fails("evaluate", planted[1][0]["sae"], *args)
    assert "--metrics sae-probes: the planted world has no texts to probe" in said


def test_evaluate_by_the_protocol_of_saebench(model, foreign, letters):
    sae, folder = foreign
    args = ["evaluate", folder, "--model", model, "--tokens", 3000, "--metrics", "absorption"]
    status, out, err = run(*args, "--protocol", "saebench", "--json")
    assert status == 0, err
    found = json.loads(out)[0]["absorption"]
    result = evaluate_absorption(sae, letters[0], protocol="saebench")
    assert (found["saebench_full"], found["saebench_fraction"]) == (result.full, result.fraction)
    assert found["protocol"] == "saebench" and "full" not in found
    assert found["n_letters"] == result.n_letters
    status, _, err = run(*args, "--protocol", "published")
    assert status != 0 and "unknown protocol 'published': choose one of exact, saebench" in err


def test_the_words_that_are_scored_can_be_chosen_and_are_named(model, foreign, letters):
    args = ["evaluate", foreign[1], "--model", model, "--tokens", 3000, "--metrics", "absorption"]
    (row,) = json.loads(done(*args, "--max-words", 400, "--spaced", "--json", "-q"))
    found = row["absorption"]
    assert (found["max_words"], found["spaced"]) == (400, True)
    n = found["n_words"]
    said = done(*args, "--max-words", 400, "--spaced", "-q")
    assert f"scored on {n} test words with a leading space, out of 400 drawn at random" in said
    assert f"scored on {n} test words, of the whole vocabulary" in done(*args, "-q")
    chosen, usual = dict(max_words=400, spaced=True), dict(max_words=None, spaced=False)
    assert letters[0].asked == [chosen, chosen, usual]


def test_one_device_for_models_activations_and_saes(model, foreign, letters, monkeypatch):
    "Model and SAE are put on the device of `--device`, and nothing else chooses one."
    from atm_sae import core
    from atm_sae.data import activations, lm

    asked, moved = [], []
    monkeypatch.setattr(
        core, "pick_device", lambda name="auto": asked.append(name) or torch.device("cpu")
    )
    for module in (activations, lm):
        monkeypatch.setattr(module, "pick_device", None, raising=False)  # nobody else picks
    monkeypatch.setattr(SAE, "to", lambda sae, device: moved.append(device) or sae)
    args = ["--model", model, "--tokens", 3000, "--metrics", "core", "--device", "cuda:1", "-q"]
    (row,) = json.loads(done("evaluate", foreign[1], *args, "--json"))
    assert {*asked} == {"cuda:1"} and moved == [torch.device("cpu")]
    assert row["core"]["n_tokens"] > 0


@pytest.mark.parametrize("n", [1, 2])
def test_the_device_of_training(n, monkeypatch):
    "One run or several are trained and measured on the device of `--device`."
    from atm_sae import core

    asked = asked_devices(monkeypatch, core, runs)
    methods = ["topk", "jumprelu"][:n]
    rows = json.loads(done("train", *methods, *SMALL, "--device", "cuda:1", "--json", "-q"))
    assert len(rows) == n and {*asked} == {"cuda:1"}


def test_a_device_that_is_not_there_is_refused_before_training():
    said = fails("train", "topk", *SMALL, "--device", "cuda:99")
    assert "device 'cuda:99' is not available here" in said


@pytest.fixture
def hub(monkeypatch, foreign, tmp_path):
    "The repository me/saes, which holds an SAE in its folder layer1/topk."
    import huggingface_hub

    shutil.copytree(foreign[1], tmp_path / "hub" / "layer1" / "topk")

    def snapshot_download(repo_id, revision=None, allow_patterns=None):
        assert (repo_id, revision) == ("me/saes", None), (repo_id, revision)
        return str(tmp_path / "hub")

    def list_repo_files(self, repo_id, revision=None):
        return ["layer1/topk/cfg.json", "layer1/topk/sae_weights.safetensors"]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)


def test_one_command_measures_an_sae_of_the_hub(hub, model, foreign, letters):
    Path("me/saes").mkdir(parents=True)  # hf: names the Hub even where a folder has the name
    args = ["--model", model, "--tokens", 3000, "--metrics", "core,absorption", "--device", "cpu"]
    args += ["--protocol", "saebench", "--max-words", 400, "--json"]
    status, out, err = run("evaluate", "hf:me/saes/layer1/topk", *args)
    assert status == 0, err
    (row,) = json.loads(out)
    (local,) = json.loads(done("evaluate", foreign[1], *args))
    assert row["sae"] == "hf:me/saes/layer1/topk" and row["layer"] == 1
    assert {k: v for k, v in row.items() if k != "sae"} == {
        k: v for k, v in local.items() if k != "sae"
    }
    assert "saebench_full" in row["absorption"] and row["absorption"]["max_words"] == 400


@pytest.mark.parametrize(
    "source, message",
    [
        ("hf:me/saes", "no SAE in me/saes; it has one in layer1/topk"),
        ("hf:me", "'me' names no repository on the Hub: write hf:OWNER/NAME[/PATH]"),
        ("hf:", "'' names no repository"),
        ("hf:/saes", "names no repository"),
    ],
)
def test_wrong_names_on_the_hub(hub, source, message):
    assert message in fails("evaluate", source, "-q")


def of_site(hook_name):
    "The folder of an SAE of another site, without a record."
    place = dict(model_name="tiny", hook_name=hook_name)
    return SAE(SAEConfig(48, 60, "topk", k=5), place).save(hook_name)


def test_the_site_of_an_sae_is_read(model, monkeypatch):
    "All metrics are asked for the site that the metadata name."
    asked = []

    def note(sae, lm, layer, *args, site):
        asked.append((layer, site))
        raise ValueError("enough")

    monkeypatch.setattr("atm_sae.evals.probing.evaluate_probing", note)
    monkeypatch.setattr(
        "atm_sae.evals.first_letter.get_tasks",
        lambda lm, layer, seeds, site, **which: note(0, lm, layer, site=site),
    )
    folder = of_site("blocks.1.hook_mlp_out")
    args = ("--model", model, "--tokens", 3000, "--metrics")
    for metric in ("probing", "absorption"):
        assert "enough" in fails("evaluate", folder, *args, metric, "-q")
    assert asked == [(1, "mlp_out")] * 2
    (row,) = json.loads(done("evaluate", folder, *args, "core", "--json", "-q"))
    data = ActivationSpec(model=model, layer=1, n_tokens=3000, site="mlp_out")
    x = held_out(get_activations(data), 20_000)
    core = reconstruction_metrics(SAE.load(folder), x)
    assert (row["site"], {k: row["core"][k] for k in core}) == ("mlp_out", core)


def test_an_sae_of_another_model_is_named(model):
    own, other = of_site("blocks.1.hook_resid_post"), "other"
    sae = SAE.load(own)
    sae.metadata["model_name"] = "gpt2"
    sae.save(other)
    args = ("--model", model, "--tokens", 3000, "--metrics", "core")
    for folder, said in ((own, False), (other, True)):
        status, _, err = run("evaluate", folder, *args, "-q")
        assert status == 0 and ("other was trained on gpt2, and is measured on tiny" in err) == said


@pytest.mark.parametrize("metric", ["core", "probing", "absorption"])
def test_a_hook_that_cannot_be_read_is_refused(model, metric):
    folder = of_site("blocks.1.attn.hook_z")
    message = "the hook blocks.1.attn.hook_z cannot be read"
    for options in ([], ["--layer", 1], ["--layer", 1, "--site", "resid_post"]):
        found = fails("evaluate", folder, "--model", model, *options, "--metrics", metric)
        assert f"{folder}: {message}" in found


@pytest.mark.parametrize(
    "args, message",
    [
        (["none"], "none"),
        (
            ["{planted}", "--metrics", "core,loss"],
            "no metric 'loss'; there are core, absorption, probing, sae-probes",
        ),
        (["{planted}", "--metrics", "probing"], "probing: the planted world has no texts"),
        (
            ["{foreign}", "--model", "{model}", "--sae-probes", "x.whl"],
            "--sae-probes x.whl: add sae-probes to --metrics",
        ),
        (
            ["{foreign}", "--model", "{model}", "--metrics", "sae-probes", "--sae-probes", "x"],
            "x holds no folder cleaned_data of sae-probes: download it",
        ),
        (["{planted}", "--saebench", "x"], "SAEBench has no planted world"),
        (["{planted}", "--spaced"], "choose words of a model, and the planted world has none"),
        (["{planted}", "--model", "{model}"], "give --model and --layer"),
        (
            [
                "{planted}",
                "--model",
                "{model}",
                "--layer",
                "1",
                "--tokens",
                "3000",
                "--metrics",
                "core",
            ],
            "the SAE reads width 8",
        ),
        (["{foreign}"], "tiny is not in the local Hub cache"),
        (["{bare}"], "does not say which model and layer"),
        (["{foreign}", "--eval-seeds", "0"], "Invalid value for '--eval-seeds'"),
        (["{planted}", "--device", "cuda:99"], "device 'cuda:99' is not available here"),
        (["{planted}", "--device", "gpu"], "unknown device 'gpu': use 'auto', 'cpu', 'cuda'"),
        (["{foreign}", "--max-words", "0"], "Invalid value for '--max-words'"),
        (["{foreign}", "--protocol", "paper"], "unknown protocol 'paper': choose one of exact"),
        (
            ["{foreign}", "--model", "{model}", "--layer", "9"],
            "trained on blocks.1.hook_resid_post, and the options name blocks.9.hook_resid_post",
        ),
        (["{foreign}", "--model", "{model}", "--site", "mlp_out"], "name blocks.1.hook_mlp_out"),
        (["{bare}", "--model", "{model}", "--layer", "9"], "has no layer 9"),
        (["{bare}", "--model", "{model}", "--layer", "1", "--site", "z"], "no site 'z'; choose"),
    ],
)
def test_wrong_evaluation(args, message, planted, model, foreign):
    bare = SAE(SAEConfig(8, 16, "topk", k=2)).save("bare")
    assert message in fails(
        "evaluate",
        *(
            a.format(planted=planted[1][0]["sae"], model=model, foreign=foreign[1], bare=bare)
            for a in args
        ),
    )


# ---- reproduce


def test_list_and_summary(toy):
    code, out, _ = toy.cli("--list")
    assert code == 0 and "count   Counting  [never run]" in out and not toy.out.exists()
    code, out, _ = toy.cli()
    assert code == 0 and "2 objects: 2 ok" in out and f"results: {toy.out / 'index.html'}" in out
    assert "count   Counting  [up to date, took 0:0" in toy.cli("--list")[1]
    assert toy.cli("--force", "--only", "count")[1].count(" ok in ") == 1


def test_unknown_profile(toy):
    for more in ([], ["--list"]):
        code, _, err = toy.cli("--profile", "huge", *more)
        assert code == 2 and "unknown profile 'huge'; the manifest has smoke, default" in err


def test_reproduce_json(toy):
    rows = json.loads(toy.cli("--list", "--json")[1])
    assert (
        rows
        == [
            dict(name=n, title=t, state="never run", seconds=None)
            for n, t in (("double", "Doubling"), ("count", "Counting"))
        ]
        and not toy.out.exists()
    )
    status, out, err = toy.cli("--json")
    assert status == 0 and [(r["name"], r["state"]) for r in json.loads(out)] == [
        ("count", "ok"),
        ("double", "ok"),
    ]
    assert "2 objects: 2 ok" in err and "running 10_count.ipynb" in err


def test_only_takes_several_names(toy):
    for args in (
        ["--only", "count", "double"],
        ["--only", "count", "--only", "double"],
        ["count", "double"],
    ):
        assert [r["name"] for r in json.loads(toy.cli("--dry-run", "--json", *args)[1])] == [
            "count",
            "double",
        ]
    assert [
        r["name"] for r in json.loads(toy.cli("--dry-run", "--json", "--only", "double")[1])
    ] == ["double"]
    code, _, err = toy.cli("--only", "triple")
    assert code == 2 and "no object 'triple' in the manifest; it has double, count" in err


def test_reproduce_says_what_failed(toy, monkeypatch):
    (toy.path.parent / "10_count.ipynb").write_text(
        (toy.path.parent / "10_count.ipynb").read_text().replace("lines = [", "lines = nothing + [")
    )
    code, out, _ = toy.cli()
    assert (
        code == 1 and "2 objects: 1 FAILED, 1 skipped" in out and "  FAILED count: NameError" in out
    )


# ---- export and push


def test_export(planted, tmp_path):
    place = planted[1][0]["sae"]
    told = json.loads(
        done("export", place, tmp_path / "dl", "--format", "dictionary-learning", "--json")
    )
    assert told == dict(
        folder=str(tmp_path / "dl"),
        format="dictionary-learning",
        files=sorted(p.name for p in (tmp_path / "dl").iterdir()),
    )
    assert torch.allclose(from_pretrained(tmp_path / "dl").W_dec, SAE.load(place).W_dec, atol=1e-6)
    assert done("export", place, tmp_path / "sl").startswith(f"{tmp_path / 'sl'}: cfg.json, ")


@pytest.mark.parametrize(
    "args, message",
    [
        (["{sae}", "new", "--format", "gguf"], "unknown format 'gguf': choose one of saelens"),
        (["{sae}", "{sae}"], "is there already"),
        (["./none", "new"], "no folder none"),
    ],
)
def test_wrong_export(args, message, planted):
    assert message in fails("export", *(a.format(sae=planted[1][0]["sae"]) for a in args))


def test_push_dry_run_shows_card_and_files(foreign, tmp_path):
    scores = [
        dict(
            sae="x",
            model="m",
            layer=1,
            core=dict(l0=4.97, fvu=0.3, explained_variance=0.7),
            absorption=dict(full=0.012, n_letters=22, full_noise=None),
        )
    ]
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    shown = done("push", foreign[1], "me/mine", "--metrics", tmp_path / "scores.json", "--dry-run")
    assert shown.startswith(
        "would send to me/mine: README.md, cfg.json, sae_weights.safetensors\n\n---\n"
    )
    named = dict(l0=4.97, explained_variance=0.7, mean_full_absorption_score=0.012)
    assert cli.card_scores(tmp_path / "scores.json") == named and shown.endswith(
        model_card(foreign[0], named, "me/mine") + "\n"
    )
    (tmp_path / "scores.json").write_text(json.dumps(scores * 2))
    assert "does not hold the metrics of one SAE" in fails(
        "push", foreign[1], "me/mine", "--metrics", tmp_path / "scores.json", "--dry-run"
    )


def test_push_hands_everything_on(foreign, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "atm_sae.sae.formats.push_to_hub",
        lambda *a, **k: asked.append((a, k)) or "https://the.hub/me/mine",
    )
    (tmp_path / "flat.json").write_text('{"l0": 5.0, "note": "x"}')
    args = [
        "--private",
        "--revision",
        "v2",
        "--message",
        "hello",
        "--metrics",
        tmp_path / "flat.json",
    ]
    assert done("push", foreign[1], "me/mine", *args) == "https://the.hub/me/mine\n"
    (sae, repo), more = asked[0]
    assert torch.equal(sae.W_dec, foreign[0].W_dec) and repo == "me/mine"
    assert more == dict(metrics={"l0": 5.0}, private=True, revision="v2", commit_message="hello")


def test_push_without_network(foreign):
    assert "me/mine" in fails("push", foreign[1], "me/mine") and "no folder" in fails(
        "push", "./none", "me/mine"
    )


# ---- completion


def completed(words, kind="bash"):
    "What the program offers for the last of the words."
    words = f"atm-sae {words}"
    env = dict(
        bash=dict(COMP_WORDS=words, COMP_CWORD=str(len(words.split(" ")) - 1)),
        zsh=dict(_TYPER_COMPLETE_ARGS=words),
        fish=dict(_TYPER_COMPLETE_ARGS=words, _TYPER_COMPLETE_FISH_ACTION="get-args"),
    )[kind]
    code = """
import sys
from atm_sae.cli import main
sys.argv = ["atm-sae"]
status = main()
sys.exit(9 if "torch" in sys.modules else status)
"""
    return ended(shell(code=code, _ATM_SAE_COMPLETE=f"complete_{kind}", **env))[1]


def test_completion_of_names():
    assert completed("train bat").split() == [m for m in METHODS if m.startswith("bat")]
    assert (
        completed("reproduce --only pla").split()
        == ["planted"]
        == completed("reproduce --only evaluator pla").split()
    )
    assert completed("reproduce --profile ").split() == [
        "smoke",
        "default",
        "full",
        "gemma",
        "gemma-long",
    ]
    assert completed("export a b --format g").split() == [
        "gemma-scope"
    ] and "evaluate" in completed("ev")


def test_a_method_with_a_space_is_one_word():
    "bash inserts the line as it is; zsh and fish quote it themselves."
    names = [name for name in METHODS if name.startswith("frozen")]
    lines = completed("train frozen").splitlines()
    assert [shlex.split(line) for line in lines] == [[name] for name in names] != []
    assert completed("train frozen", "fish").splitlines() == names
    assert all(f'"{name}"' in completed("train frozen", "zsh") for name in names)


@pytest.mark.parametrize(
    "kind, shape", [("zsh", '"planted":"Absorption where'), ("fish", "planted\tAbsorption where")]
)
def test_completion_of_other_shells(kind, shape):
    assert shape in completed("reproduce --only pla", kind)


@pytest.mark.parametrize(
    "kind, word",
    [
        ("bash", "complete -o default -F"),
        ("zsh", "#compdef atm-sae"),
        ("fish", "complete --command atm-sae"),
    ],
)
def test_completion_scripts(kind, word):
    status, out, _ = ended(shell(_ATM_SAE_COMPLETE=f"source_{kind}"))
    assert status == 0 and word in out


def test_completion_reads_the_given_manifest_and_survives_a_broken_one(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text("profiles: {quick: {}}\nobjects: [{name: one, title: One}]")
    assert completed(f"reproduce --manifest {path} --only o").split() == ["one"] and completed(
        f"reproduce --manifest {path} --profile "
    ).split() == ["quick"]
    path.write_text("objects: [")
    assert completed(f"reproduce --manifest {path} --only ").split() == []


@pytest.mark.parametrize(
    "content",
    [
        b"objects: [{name: \xe9}]",
        b"- objects",
        b"objects:\nprofiles:",
        b"objects: [3, {title: x}]\nprofiles: {a: 1}",
        b"objects: {a: 1}\nprofiles: [a]",
    ],
)
def test_completion_of_a_manifest_without_names_is_empty(tmp_path, content):
    (tmp_path / "m.yaml").write_bytes(content)
    context = SimpleNamespace(params=dict(manifest=tmp_path / "m.yaml"))
    assert cli._complete_object(context, "") == cli._complete_profile(context, "") == []


# ---- the package's names


def test_names_are_lazy_and_the_same_for_type_checkers():
    tree = ast.parse((ROOT / "atm_sae/__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        node.module.removeprefix("atm_sae."): [a.name for a in node.names] for node in block.body
    }
    assert (
        all(a.name == a.asname for node in block.body for a in node.names)
        and seen == atm_sae._NAMES
    )
    code = """
import sys, atm_sae
assert "torch" not in sys.modules
from atm_sae import *
assert SAE and set(atm_sae.__all__) <= set(dir(atm_sae)) & globals().keys()
"""
    assert ended(shell(code=code)) == (0, "", "")


def test_names_are_those_of_their_modules():
    for module, names in atm_sae._NAMES.items():
        for name in names:
            assert getattr(atm_sae, name) is getattr(sys.modules[f"atm_sae.{module}"], name)
    with pytest.raises(AttributeError, match="module 'atm_sae' has no attribute 'nothing'"):
        getattr(atm_sae, "nothing")  # noqa: B009  what is tested is the attribute
    with pytest.raises(ImportError):
        exec("from atm_sae import nothing")


def test_train_is_the_function_whatever_was_imported_first():
    code = """
import sys, atm_sae.train, atm_sae
from atm_sae import train
assert callable(train)
assert atm_sae.train is train is sys.modules["atm_sae.train.loop"].train
"""
    assert ended(shell(code=code))[0] == 0
    assert (
        isinstance(sys.modules["atm_sae.sae"], type(sys))
        and atm_sae.sae is sys.modules["atm_sae.sae"]
    )


# ---- files that describe the package


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (
        citation["cff-version"] == "1.2.0"
        and citation["version"] == atm_sae.__version__
        and {"message", "title", "authors"} <= citation.keys()
    )
    (paper,) = citation["references"]
    assert (
        paper["identifiers"][0]["value"] == "arXiv:2510.08855"
        and paper["type"]
        and paper["title"] in (ROOT / "README.md").read_text().replace("\n", " ")
    )


def test_changelog_names_the_version():
    versions = re.findall(r"^## \[([^\]]+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0][0] == atm_sae.__version__ and all(
        date == "Unreleased" or re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in versions
    )


def test_pyproject_names_command_and_types():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert (
        project["project"]["scripts"] == {"atm-sae": "atm_sae.cli:main"}
        and "Typing :: Typed" in project["project"]["classifiers"]
    )
    assert any(d.startswith("typer") for d in project["project"]["dependencies"])


def test_wheel_holds_the_types_marker(tmp_path):
    import shutil

    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path / "project"
    shutil.copytree(
        ROOT / "atm_sae", copy / "atm_sae", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    built = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=copy, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        assert "atm_sae/py.typed" in names and "atm_sae/cli.py" in names
        entry = next(n for n in names if n.endswith("entry_points.txt"))
        assert "atm-sae = atm_sae.cli:main" in wheel.read(entry).decode()


def test_values_that_fit_a_setting():
    assert cli._fits(None, int) and cli._fits([1, 2.5], tuple)
    assert not cli._fits(True, int) and not cli._fits([1, "a"], tuple)
