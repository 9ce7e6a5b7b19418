"The profile of the paper's scale, made small: its plan and estimate without weights, and its notebooks from end to end with the shipped model in place of Gemma-2-2b."

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from atm_sae.report.estimate import SHAPES, estimate_runs, lm_shape, needed_runs, step_seconds
from atm_sae.report.manifest import load_manifest
from atm_sae.data.text import python_docs

ROOT = Path(__file__).resolve().parent.parent


def atm_sae(*args, cache, **env):
    "The command, in a process of its own."
    command = [
        sys.executable,
        "-c",
        "import sys; from atm_sae.cli import main; sys.exit(main())",
        *map(str, args),
    ]
    env = {
        **os.environ,
        "ATM_SAE_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        **env,
    }
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


# ---- the plan


def test_shape_of_gemma_2_2b():
    "2.6 billion parameters; the published count is 2,614,341,888."
    c = lm_shape("google/gemma-2-2b")
    block = (
        3 * c.hidden_size * c.intermediate_size
        + c.hidden_size * c.head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads)
        + 4 * c.hidden_size
    )
    assert (
        c.num_hidden_layers * block + c.vocab_size * c.hidden_size + c.hidden_size == 2_614_341_888
    )


def test_a_model_that_is_nowhere_has_no_shape(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="someone/unknown is not in the local Hub cache"):
        lm_shape("someone/unknown")
    assert list(SHAPES) == ["google/gemma-2-2b"]


def test_objects_share_their_runs():
    m = load_manifest()
    need = needed_runs([e.resolved("gemma") for e in m.of("gemma")])
    ((size, runs),) = need
    p = m.pick("absorption").resolved("gemma")
    assert [*size.values()] == ["google/gemma-2-2b", 12, 16384, 2048, 2441, 5_700_000] and len(
        runs
    ) == len(p["methods"]) * len(p["targets"]) * len(p["seeds"])


def test_estimate_by_hand(monkeypatch):
    from atm_sae.report import estimate as module

    monkeypatch.setattr(module, "step_seconds", lambda method, *a: dict(atm=2.0, topk=1.0)[method])
    monkeypatch.setattr(module, "token_seconds", lambda *a: 1e-6)
    size = dict(
        model="google/gemma-2-2b",
        layer=12,
        d_sae=16384,
        batch_size=2048,
        steps=1000,
        n_tokens=10**6,
    )
    found = estimate_runs(
        size,
        [("atm", 40, 0), ("atm", 40, 1), ("topk", 40, 0), ("random", 40, 0)],
        data=dict(dtype="bfloat16", lm_dtype="bfloat16"),
    )
    parameters = 2 * 2304 * 16384
    assert (
        found.lm_seconds == pytest.approx(13)
        and found.sae_seconds == dict(atm=4000, topk=1000)
        and found.runs == 4
    )
    assert found.disk_bytes == 10**6 * 2304 * 2 + 4 * 4 * parameters
    assert found.memory_bytes == pytest.approx(
        2 * 2.614e9 + 16 * parameters + 24 * 2048 * 16384, rel=1e-3
    )
    stream = estimate_runs(
        size, [("topk", 40, 0), ("topk", 80, 0)], data=dict(dtype="bfloat16", buffer=1000)
    )
    assert stream.lm_seconds == pytest.approx(
        2 * (1000 * 2048 + 1000) * 13e-6
    ) and stream.stored == (pytest.approx(13), 10**6 * 2304 * 2)  # every run reads it anew
    assert "with buffer: 0 it runs once: 13 s for the activations, 4.6 GB more disk" in str(
        stream
    ) and "buffer: 0" not in str(found)
    assert (
        stream.disk_bytes == 2 * 4 * parameters
        and stream.memory_bytes - found.memory_bytes
        == pytest.approx(2 * 2.614e9 + 1000 * 2304 * 2, rel=1e-3)
    )


def test_wider_dictionaries_take_longer():
    narrow, wide = (
        min(step_seconds("topk", 64, d_sae, 8, 256) for _ in range(2)) for d_sae in (128, 8192)
    )
    assert wide > narrow


def test_a_plan_without_weights(tmp_path):
    done = atm_sae(
        "reproduce",
        "--profile",
        "gemma",
        "--dry-run",
        "--out",
        tmp_path / "out",
        cache=tmp_path / "cache",
    )
    assert done.returncode == 0, done.stderr
    for said in (
        "needs: a GPU, access to google/gemma-2-2b",
        "estimate: ",
        "for the activations of 5,700,000 tokens",
        "GB of memory",
        "GB of disk",
        "absorption: would run (never run)",
    ):
        assert said in done.stdout, done.stdout
    assert not (tmp_path / "out").exists()


def test_without_access_the_run_says_what_to_do(tmp_path):
    done = atm_sae(
        "reproduce",
        "--profile",
        "gemma",
        "--only",
        "absorption",
        "--out",
        tmp_path / "out",
        cache=tmp_path / "cache",
    )
    assert (
        done.returncode == 1
        and "google/gemma-2-2b is not in the local Hub cache and the Hub cannot be reached"
        in done.stdout
    ), done.stdout


# ---- the whole profile, small

SMALL = dict(
    layer=2,
    d_sae=64,
    batch_size=256,
    steps=20,
    n_tokens=20_000,
    targets=[4, 8],
    target=4,
    seeds=[0, 1],
    l0s=[1, 4, 6, 30],
    pretrained=[],
    max_words=1500,
    n_texts=24,
    planted_targets=[4, 8],
    samples=2000,
    children=[5, 40],
    shares=[0.4],
    parts=[0, 1],
    words_per_letter=40,
    d_in=72,
    eval_seeds=2,
    l1_shares=[0.01],
    jumps=[0.03],
    gap_words=16,
    early_layer=0,
    every=10,
)


def small(value, text):
    "Parameters of the manifest with small numbers, the shipped model, and a text from a file."
    if isinstance(value, list):
        return [small(v, text) for v in value]
    if not isinstance(value, dict):
        return value
    out = {k: SMALL[k] if k in SMALL else small(v, text) for k, v in value.items()}
    if "model" in out:
        out["model"] = str(ROOT / "data" / "nano-gemma2")
    if "activations" in out:
        out["activations"] = {**out["activations"], "text": str(text), "context": 64} | (
            {"buffer": 2048} if "buffer" in out["activations"] else {}
        )
    if "methods" in out and isinstance(out["methods"], list):
        out["methods"] = [
            m
            for m in out["methods"]
            if m in ("atm", "topk", "jumprelu as published", "jumprelu+atm anneal=0.5", "random")
        ]
    return out


@pytest.mark.parametrize("profile", ["gemma", "gemma-long"])
def test_the_whole_profile_with_the_shipped_model(profile, tmp_path):
    shutil.copytree(ROOT / "nbs" / "experiments", tmp_path / "exp")
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps(dict(text=d)) + "\n" for d in python_docs()[:3000]), encoding="utf-8"
    )
    manifest = yaml.safe_load((tmp_path / "exp" / "manifest.yaml").read_text())
    manifest["objects"] = [
        e
        | dict(
            parameters={
                p: small(v, text)
                for p, v in e.get("parameters", {}).items()
                if p in ("common", profile)
            }
        )
        for e in manifest["objects"]
    ]
    (tmp_path / "exp" / "manifest.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False))
    done = atm_sae(
        "reproduce",
        "--profile",
        profile,
        "--manifest",
        tmp_path / "exp" / "manifest.yaml",
        "--out",
        tmp_path / "out",
        cache=tmp_path / "cache",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    wanted = load_manifest().of(profile)
    assert f"{len(wanted)} objects: {len(wanted)} ok" in done.stdout
    for e in wanted:
        for o in e.outputs:
            assert (tmp_path / "out" / o).stat().st_size > 0, o
    specs = [
        json.loads((s / "meta.json").read_text())["spec"]
        for s in (tmp_path / "cache" / "activations").iterdir()
    ]
    assert all(s["dtype"] == s["lm_dtype"] == "bfloat16" and s["text"] == str(text) for s in specs)
    assert {s["held_out"] for s in specs} == (
        {True} if profile == "gemma-long" else {False, True}
    )  # a stream keeps nothing but what it is scored on
