"Loading models, reading the residual stream, splicing."

import functools
import json
import math
import os
import shutil

import pytest
import torch
from copy import deepcopy as copy_of
from tokenizers import Tokenizer, normalizers

from atm_sae.data import lm as module
from atm_sae.data.lm import (
    LM,
    SITES,
    Site,
    check_hook,
    compile_blocks,
    hook_layer,
    hook_point,
    load_lm,
    model_checksum,
    next_token_logits,
    next_token_losses,
    other_place,
    map_after_prefix,
    prefix_cache,
    read_after_prefix,
    read_site,
    residual_stream,
    save_lm,
    splice,
    tiny_lm,
)
from atm_sae.evals.metrics import spliced_metrics
from atm_sae.sae.architectures import SAEConfig
from atm_sae.sae.sae import SAE


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def tokens(lm):
    return torch.cat(
        [
            torch.full((5, 1), 2),
            torch.randint(3, 1024, (5, 11), generator=torch.Generator().manual_seed(0)),
        ],
        1,
    )


def ours(layer_module):
    return [h for h in layer_module._forward_hooks.values() if h.__module__ == module.__name__]


@pytest.fixture(scope="module")
def saved(lm, tmp_path_factory):
    return save_lm(lm, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


# ---- tiny_lm


def test_tiny_is_reproducible_and_frozen(lm):
    before = torch.get_rng_state()
    assert tiny_lm().checksum == lm.checksum != tiny_lm(seed=1).checksum
    assert torch.equal(before, torch.get_rng_state())
    assert not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())
    assert (lm.n_layers, lm.d_model, lm.device.type) == (3, 32, "cpu")
    assert tiny_lm(n_layers=2, d_model=16).d_model == 16


# ---- loading


def test_checksum_of_a_model_in_memory_covers_tokenizer_and_configuration(monkeypatch):
    "Merges, added tokens, roles and settings count; what the last call asked for does not."
    plain, tokenizer = tiny_lm().checksum, module._tiny_tokenizer()
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=8, split_special_tokens=True)
    assert tiny_lm().checksum == plain
    state = json.loads(tokenizer.backend_tokenizer.to_str())

    def checksum(change):
        other = copy_of(tokenizer)
        changed = change(other)
        monkeypatch.setattr(module, "_tiny_tokenizer", lambda: changed or other)
        return tiny_lm().checksum

    def other_merges(tokenizer):
        merges = state["model"]["merges"]
        swapped = state["model"] | dict(merges=[merges[1], merges[0], *merges[2:]])
        text = json.dumps(state | dict(model=swapped))
        return type(tokenizer)(
            tokenizer_object=Tokenizer.from_str(text),
            pad_token="<pad>",
            eos_token="<eos>",
            bos_token="<bos>",
        )

    def strips(tokenizer):
        tokenizer.backend_tokenizer.normalizer = normalizers.Strip()

    def other_bos(tokenizer):
        tokenizer.bos_token = "<eos>"

    assert checksum(lambda tokenizer: None) == plain
    found = [checksum(change) for change in (other_merges, strips, other_bos)]
    monkeypatch.undo()
    model = tiny_lm().model
    model.config.final_logit_softcapping = 7.0
    found.append(module._weights_checksum(model, tokenizer))
    assert len({plain, *found}) == 5


def test_round_trip(lm, saved, tokens):
    again = load_lm(saved)
    assert torch.equal(next_token_losses(lm, tokens), next_token_losses(again, tokens))
    assert (
        again.tokenizer.get_vocab() == lm.tokenizer.get_vocab()
        and again.tokenizer.bos_token_id == 2
    )
    assert model_checksum(saved) == again.checksum and len(again.checksum) == 64


def test_float32_whatever_is_stored(lm, tmp_path):
    folder = save_lm(lm, tmp_path / "half", dtype="bfloat16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in load_lm(folder).model.parameters()} == {torch.float32}
    assert {p.dtype for p in load_lm(folder, dtype="bfloat16").model.parameters()} == {
        torch.bfloat16
    }
    assert lm.model.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype 'int8' is unknown"):
        load_lm(folder, dtype="int8")


def test_checksum_follows_the_weights(copy, tmp_path):
    (copy / "README.md").write_text("says nothing about weights")
    plain = model_checksum(copy)
    (copy / "README.md").write_text("still does not")
    assert model_checksum(copy) == plain
    save_lm(tiny_lm(seed=1), copy)
    assert model_checksum(copy) != plain


def test_a_large_model_is_hashed_once_in_a_cache(copy, cache, monkeypatch):
    "Until a file is written again, even with the same size and time."
    monkeypatch.setattr(module, "_NOTED_BYTES", 1)
    monkeypatch.setattr(module, "_SETTLED_SECONDS", -1)
    hashed = []
    sha256 = module.file_sha256
    monkeypatch.setattr(module, "file_sha256", lambda path: hashed.append(path) or sha256(path))

    def checksum():
        "As another process finds it."
        hashed.clear()
        module._files_checksum.cache_clear()
        return model_checksum(copy)

    first = checksum()
    assert hashed and checksum() == first and not hashed
    (note,) = (cache / "checksums").iterdir()
    note.write_text(note.read_text().replace(first, "0" * 64))  # damaged
    assert checksum() == first and hashed
    weights = copy / "model.safetensors"
    before, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert checksum() != first


def test_fresh_and_small_files_are_hashed_in_each_process(copy, cache, monkeypatch):
    model_checksum(copy)
    monkeypatch.setattr(module, "_NOTED_BYTES", 1)
    module._files_checksum.cache_clear()
    model_checksum(copy)
    assert not (cache / "checksums").exists()


READ = {
    "vocab.json": "{}",
    "merges.txt": "a b",
    "tokenizer.model": "pieces",
    "spiece.model": "pieces",
    "added_tokens.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "generation_config.json": "{}",
    "model.safetensors.index.json": "{}",
}
NOT_READ = ("LICENSE", "pytorch_model.bin", "modeling.py", ".gitattributes", "figures/loss.json")


def test_checksum_follows_every_file_that_a_loader_reads(copy):
    seen = {model_checksum(copy)}
    for name, text in READ.items():
        (copy / name).parent.mkdir(exist_ok=True)
        for content in (text, f"{text} "):
            (copy / name).write_text(content)
            seen.add(model_checksum(copy))
    assert len(seen) == 1 + 2 * len(READ)
    for name in NOT_READ:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("not read")
        assert model_checksum(copy) in seen


def test_eager_attention_and_no_bars(saved, capfd):
    assert load_lm(saved).model.config._attn_implementation == "eager"
    assert "%" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/such/folder", "~/no/such/model", "a/b/c", "nano-gemma2"]
)
def test_missing_folder(name, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "data_dir", lambda: tmp_path)
    with pytest.raises(
        FileNotFoundError, match="no model folder .*; give a folder, an id on the Hub"
    ):
        load_lm(name)


def test_folder_without_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_lm(tmp_path)


def test_pickles_are_refused(copy):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match="no \\*.safetensors; other weight formats can run code"):
        load_lm(copy)


def test_damaged_weights(copy):
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="no readable safetensors"):
        load_lm(copy)


def test_missing_weights_are_an_error(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="lack 1 of the tensors .* model.layers.1.mlp.up_proj.weight"
    ):
        load_lm(copy)


def test_weights_of_another_shape(copy):
    config = json.loads((copy / "config.json").read_text())
    config["intermediate_size"] = 64
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="other shapes than its config.json says"):
        load_lm(copy)


def test_folder_without_tokenizer(copy):
    for p in copy.glob("tokenizer*"):
        p.unlink()
    with pytest.raises(ValueError, match="tokenizer files are missing"):
        load_lm(copy)


@pytest.mark.parametrize(
    "change", [dict(architectures=["BertForMaskedLM"], model_type="bert"), dict(architectures=None)]
)
def test_not_a_causal_lm(copy, change):
    config = json.loads((copy / "config.json").read_text()) | change
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not a causal language model"):
        load_lm(copy)


@pytest.mark.parametrize(
    "change",
    [
        dict(model_type="brand_new"),
        dict(model_type="brand_new", auto_map={"AutoConfig": "evil.Config"}),
    ],
)
def test_no_remote_code(copy, change):
    config = json.loads((copy / "config.json").read_text()) | change
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text('raise SystemExit("ran")')
    with pytest.raises(ValueError, match="remote code is never run"):
        load_lm(copy)


# ---- the Hub, simulated


def fail(monkeypatch, kind, wrapped):
    "The Hub fails with `kind`, or with another error that was raised for it."
    import huggingface_hub.errors as errors

    inner = getattr(errors, kind).__new__(getattr(errors, kind))
    inner.args = ("reason",)

    def hf_hub_download(*a, **k):
        if wrapped:
            raise OSError("a long message") from inner
        raise inner

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize(
    "kind, error, message",
    [
        (
            "GatedRepoError",
            PermissionError,
            "google/gemma-2-2b is gated: accept its licence at https://huggingface.co/google/gemma-2-2b",
        ),
        (
            "RepositoryNotFoundError",
            FileNotFoundError,
            "neither a folder here nor a model on the Hub",
        ),
        ("LocalEntryNotFoundError", ConnectionError, "the Hub cannot be reached"),
        ("OfflineModeIsEnabled", ConnectionError, "HF_HUB_OFFLINE"),
        ("EntryNotFoundError", FileNotFoundError, "has no config.json on the Hub"),
    ],
)
def test_hub_errors(monkeypatch, kind, error, message, wrapped):
    fail(monkeypatch, kind, wrapped)
    with pytest.raises(error, match=message):
        load_lm("google/gemma-2-2b")
    with pytest.raises(error, match=message):
        model_checksum("google/gemma-2-2b")


def test_really_offline(monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="cannot be reached"):
        load_lm("nobody/no-such-model-anywhere")


COMMITS = ("0" * 39 + "a", "f" * 40)


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    "The Hub's cache with two commits of me/tiny, of which the first is the newest."
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    module._commit.cache_clear()
    repo = tmp_path / "models--me--tiny"
    shutil.copytree(saved, repo / "snapshots" / COMMITS[0])
    save_lm(tiny_lm(seed=1), repo / "snapshots" / COMMITS[1])
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMITS[0])
    yield repo
    module._commit.cache_clear()


def test_a_model_on_the_hub_is_named_by_its_commit(hub, lm):
    assert model_checksum("me/tiny") == f"me/tiny@{COMMITS[0]}" == load_lm("me/tiny").checksum
    module._commit.cache_clear()  # as in a new process
    (hub / "refs" / "main").write_text(COMMITS[1])
    assert model_checksum("me/tiny") == f"me/tiny@{COMMITS[1]}"


def test_the_commit_that_is_named_is_loaded(hub, lm, tokens):
    "The newest commit is another one when the weights are read."
    model_checksum("me/tiny")
    (hub / "refs" / "main").write_text(COMMITS[1])
    loaded = load_lm("me/tiny")
    assert loaded.checksum == f"me/tiny@{COMMITS[0]}"
    assert torch.equal(residual_stream(loaded, tokens, 2), residual_stream(lm, tokens, 2))
    assert module.model_config("me/tiny").hidden_size == 32


def test_a_commit_that_cannot_be_told(hub):
    (hub / "snapshots" / COMMITS[0]).rename(hub / "snapshots" / "main")
    (hub / "refs" / "main").write_text("main")
    for call in (model_checksum, load_lm):
        with pytest.raises(ValueError, match="me/tiny: its commit cannot be told from .*main"):
            call("me/tiny")


def test_unknown_errors_pass_unchanged(monkeypatch):
    def hf_hub_download(*a, **k):
        raise KeyError("surprise")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    with pytest.raises(KeyError, match="surprise"):
        load_lm("some/model")
    with pytest.raises(KeyError, match="surprise"):
        model_checksum("some/model")


def test_disk_full_while_saving(lm, tmp_path, monkeypatch):
    from atm_sae.artefacts import OutputError

    def full(*a, **k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lm.tokenizer, "save_pretrained", full, raising=False)
    with pytest.raises(OutputError, match="the disk is full"):
        save_lm(lm, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# ---- reading


@pytest.mark.parametrize("layer", [0, 1])
def test_equals_hidden_states(lm, tokens, layer):
    full = lm.model(input_ids=tokens, output_hidden_states=True).hidden_states
    assert torch.allclose(residual_stream(lm, tokens, layer), full[layer + 1], atol=1e-6)


def test_last_layer_is_read_before_the_final_norm(lm, tokens):
    full = lm.model(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
    x = residual_stream(lm, tokens, 2)
    assert torch.allclose(lm.model.model.norm(x), full, atol=1e-6) and not torch.allclose(
        x, full, atol=1e-2
    )


def test_stops_after_the_layer(lm, tokens):
    called = []
    handles = [
        m.register_forward_hook(lambda *_, n=n: called.append(n))
        for n, m in (
            ("later", hook_layer(lm, 2)),
            ("head", lm.model.lm_head),
            ("norm", lm.model.model.norm),
            ("earlier", hook_layer(lm, 0)),
        )
    ]
    residual_stream(lm, tokens, 1)
    for h in handles:
        h.remove()
    assert called == ["earlier"] and not ours(hook_layer(lm, 1))


def test_hooks_are_removed_after_an_error(lm, tokens, monkeypatch):
    monkeypatch.setattr(lm.model.model.layers[0], "forward", lambda *a, **k: 1 / 0)
    with splice(lm, 1, lambda r: r):
        assert len(ours(hook_layer(lm, 1))) == 1  # so `ours` sees them
    with pytest.raises(ZeroDivisionError):
        residual_stream(lm, tokens, 1)
    assert not ours(hook_layer(lm, 1))


def test_batches_and_positions(lm, tokens):
    x = residual_stream(lm, tokens, 1)
    assert x.shape == (5, 12, 32) and not x.requires_grad
    assert torch.allclose(residual_stream(lm, tokens, 1, batch_size=2), x, atol=1e-6)
    at = torch.tensor([3, 0, 11, 5, 7])
    assert torch.allclose(
        residual_stream(lm, tokens, 1, batch_size=2, at=at), x[torch.arange(5), at], atol=1e-6
    )
    assert residual_stream(lm, tokens[:0], 1).shape == (0, 12, 32) and residual_stream(
        lm, tokens[:0], 1, at=at[:0]
    ).shape == (0, 32)


def test_a_tuple_as_block_output(lm, tokens, monkeypatch):
    x = residual_stream(lm, tokens, 2)
    loss = next_token_losses(lm, tokens)
    block, after = lm.model.model.layers[1], lm.model.model.layers[2]
    plain, plain_after = block.forward, after.forward
    monkeypatch.setattr(block, "forward", lambda *a, **k: (plain(*a, **k), "cache"))
    monkeypatch.setattr(
        after,
        "forward",
        lambda h, *a, **k: plain_after(h[0] if isinstance(h, tuple) else h, *a, **k),
    )
    assert residual_stream(lm, tokens, 1).shape == (5, 12, 32)
    with splice(lm, 1, lambda r: r):
        assert torch.equal(next_token_losses(lm, tokens), loss)
    with splice(lm, 1, torch.zeros_like):
        assert torch.allclose(
            next_token_losses(lm, tokens), torch.tensor(math.log(1024)), atol=1e-4
        )
    assert torch.equal(residual_stream(lm, tokens, 2), x)


def test_a_list_as_block_output(lm):
    "GPT-1 returns lists, and its blocks end in a norm."
    other = of_family("gpt", lm)
    rows = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    full = other.model(input_ids=rows, output_hidden_states=True).hidden_states
    assert torch.equal(residual_stream(other, rows, 0), full[1])
    loss, seen = next_token_losses(other, rows), []
    with splice(other, 0, lambda x: x):
        assert torch.equal(next_token_losses(other, rows), loss)
    with splice(other, 0, torch.zeros_like):
        handle = hook_layer(other, 0).register_forward_hook(lambda *a: seen.append(a[2]))
        assert not torch.allclose(next_token_losses(other, rows), loss)
        handle.remove()
    assert type(seen[0]) is list and seen[0][0].abs().max() == 0
    for site in ("attn_out", "mlp_out"):
        with pytest.raises(ValueError, match="adds something else"):
            read_site(other, rows, 0, site)


@pytest.mark.parametrize("made, name", [(dict(x=1), "dict"), (None, "NoneType"), ((), "tuple")])
def test_a_block_output_that_is_no_tensor(lm, tokens, monkeypatch, made, name):
    monkeypatch.setattr(lm.model.model.layers[1], "forward", lambda *a, **k: made)
    with pytest.raises(ValueError, match=f"the output of Gemma2DecoderLayer is {name}, where"):
        residual_stream(lm, tokens, 1)


def test_a_block_without_an_input_of_the_usual_name(lm, tokens, monkeypatch):
    block = hook_layer(lm, 0)
    monkeypatch.setattr(lm.model.model, "forward", lambda *a, **k: block(stream=tokens))
    with pytest.raises(ValueError, match="the input of Gemma2DecoderLayer is NoneType"):
        read_site(lm, tokens, 0, "resid_pre")


@pytest.mark.parametrize("layer", [3, -1, 1.0, "1", None])
def test_no_such_layer(lm, tokens, layer):
    for call in (
        lambda: hook_layer(lm, layer),
        lambda: residual_stream(lm, tokens, layer),
        lambda: splice(lm, layer, None).__enter__(),
    ):
        with pytest.raises(ValueError, match="has no layer .*; its layers are 0 to 2"):
            call()


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.tensor([1, 2]), "shape"),
        (torch.ones(1, 2), "whole numbers"),
        (torch.tensor([[1, 1024]]), "another tokenizer"),
        (torch.tensor([[-1]]), "another tokenizer"),
    ],
)
def test_bad_tokens(lm, bad, message):
    for call in (
        lambda: residual_stream(lm, bad, 0),
        lambda: next_token_losses(lm, bad),
        lambda: next_token_logits(lm, bad),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("family, longest", [("gpt", 16), ("opt", 16), ("mpt", 16), (None, 256)])
def test_rows_longer_than_the_models_context(family, longest, lm):
    "The longest rows are read; one more token is refused. OPT's table has two rows more."
    model = of_family(family, lm) if family else lm
    rows = torch.full((1, longest + 1), 3)
    assert residual_stream(model, rows[:, 1:], 0).shape == (1, longest, 32)
    sae = SAE(SAEConfig(32, 64, "topk", k=4))
    for call in (
        lambda: residual_stream(model, rows, 0),
        lambda: next_token_losses(model, rows),
        lambda: next_token_logits(model, rows),
        lambda: spliced_metrics(sae, model, 0, rows),
    ):
        with pytest.raises(ValueError, match=f"{longest + 1} tokens.*at most {longest}; choose a"):
            call()


def test_a_model_that_names_no_longest_context(lm):
    assert residual_stream(of_family("bloom", lm), torch.full((1, 300), 3), 0).shape[1] == 300


def of_family(family, lm):
    "A model of another family, with 2 blocks and random weights."
    import transformers as t

    size = dict(vocab_size=1024, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    make = {
        "gpt": lambda: t.OpenAIGPTLMHeadModel(
            t.OpenAIGPTConfig(vocab_size=1024, n_embd=32, n_layer=2, n_head=2, n_positions=16)
        ),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(**size, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=16)
        ),
        "mpt": lambda: t.MptForCausalLM(
            t.MptConfig(vocab_size=1024, d_model=32, n_layers=2, n_heads=2, max_seq_len=16)
        ),
        "granite": lambda: t.GraniteForCausalLM(
            t.GraniteConfig(**size, intermediate_size=64, residual_multiplier=0.5)
        ),
        "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(**size)),
        "falcon": lambda: t.FalconForCausalLM(t.FalconConfig(**size)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=1024, n_embd=32, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=1
            )
        ),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**size, intermediate_size=64)),
        "neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**size, intermediate_size=64)),
    }[family]
    torch.manual_seed(0)
    return LM(make().eval(), lm.tokenizer, family, family, "")


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
def test_other_families(family, lm, tokens):
    other = of_family(family, lm)
    full = other.model(input_ids=tokens, output_hidden_states=True).hidden_states
    assert other.n_layers == 2 and torch.allclose(
        residual_stream(other, tokens, 0), full[1], atol=1e-5
    )
    loss = next_token_losses(other, tokens)
    with splice(other, 0, lambda r: r):
        assert torch.equal(next_token_losses(other, tokens), loss)
    with splice(other, 0, torch.zeros_like):
        assert not torch.allclose(next_token_losses(other, tokens), loss)


# ---- rows that share a prefix


def rows_with_prefixes(tokens):
    "Six rows with two prefixes of 8 tokens, mixed; 12 tokens each."
    rows = tokens[[0, 1, 0, 0, 1, 0]].clone()
    rows[:, 8:] = torch.randint(3, 1024, (6, 4), generator=torch.Generator().manual_seed(1))
    return rows


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "llama", "neox", "falcon"])
def test_after_a_prefix_as_in_whole_rows(family, site, lm, tokens):
    other = lm if family == "gemma2" else of_family(family, lm)
    rows = rows_with_prefixes(tokens)
    whole = read_site(other, rows, 1, site)[:, 8:]
    for batch_size in (64, 5, 2):
        found = read_after_prefix(other, rows, 8, 1, site, batch_size)
        assert torch.allclose(found, whole, rtol=1e-4, atol=1e-5)
        shared = read_after_prefix(other, rows, 8, 1, site, batch_size, threads=3)
        assert torch.equal(shared, found)
    one = read_after_prefix(other, rows[:, :9], 8, 1, site)
    assert torch.allclose(one, whole[:, :1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["opt", "mpt", "bloom", "granite", "gpt"])
def test_after_a_prefix_in_other_families(family, lm, tokens):
    "The first GPT has no keys and values to keep, so its rows are run whole."
    other, rows = of_family(family, lm), rows_with_prefixes(tokens)
    whole = residual_stream(other, rows, 1)[:, 8:]
    assert torch.allclose(read_after_prefix(other, rows, 8, 1), whole, rtol=1e-4, atol=1e-5)


def test_each_prefix_is_run_once(lm, tokens, monkeypatch):
    rows, run = rows_with_prefixes(tokens), []
    forward = lm.model.forward

    @functools.wraps(forward)
    def counted(input_ids, **more):
        run.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **more)

    monkeypatch.setattr(lm.model, "forward", counted)
    read_after_prefix(lm, rows, 8, 1)
    assert run == [(2, 8), (6, 4)]
    run.clear()
    read_after_prefix(lm, rows, 8, 1, batch_size=5)  # four rows of one prefix, two of the other
    assert sorted(run) == [(1, 8), (1, 8), (2, 4), (4, 4)]
    run.clear()
    read_after_prefix(lm, tokens, 8, 1)  # nothing is shared
    assert run == [(5, 12)]


def test_results_after_prefixes_are_in_the_order_of_the_rows(lm, tokens):
    rows, lengths = rows_with_prefixes(tokens), []

    def rest(lm, after, past):
        lengths.append((len(after), past.get_seq_length()))
        return after

    found = map_after_prefix(rest, lm, rows, 8, batch_size=4)
    assert torch.equal(found, rows[:, 8:])
    assert sorted(lengths) == [(2, 8), (4, 8)]


def test_a_prefix_longer_than_the_sliding_window(lm):
    "Odd layers of tiny_lm read the 128 tokens before alone."
    tokens = torch.randint(3, 1024, (3, 150), generator=torch.Generator().manual_seed(2))
    tokens[:, :140] = tokens[0, :140]
    whole = residual_stream(lm, tokens, 2)[:, 140:]
    found = read_after_prefix(lm, tokens, 140, 2)
    assert torch.allclose(found, whole, rtol=1e-4, atol=1e-5)


def test_the_cache_of_prefixes_continues_to_the_logits(lm, tokens):
    rows = rows_with_prefixes(tokens)
    past = prefix_cache(lm, rows[:, :8])
    found = lm.model(input_ids=rows[:, 8:], past_key_values=past, use_cache=True).logits
    whole = lm.model(input_ids=rows, use_cache=False).logits[:, 8:]
    assert torch.allclose(found, whole, rtol=1e-4, atol=1e-4)


# ---- sites


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "llama", "neox", "falcon"])
def test_a_block_adds_attn_out_and_mlp_out(family, lm, tokens):
    "NeoX and Falcon compute both from the same stream; Falcon adds one to the other in place."
    other = lm if family == "gemma2" else of_family(family, lm)
    full = other.model(input_ids=tokens, output_hidden_states=True).hidden_states
    for layer in (0, 1):
        x = {site: read_site(other, tokens, layer, site, batch_size=2) for site in SITES}
        assert torch.allclose(x["resid_pre"], full[layer], atol=1e-5)
        assert torch.equal(x["resid_post"], residual_stream(other, tokens, layer, batch_size=2))
        total = x["resid_pre"] + x["attn_out"] + x["mlp_out"]
        assert torch.allclose(x["resid_post"], total, atol=1e-5)
        assert x["attn_out"].norm() > 0.01 and x["mlp_out"].norm() > 0.01


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "neox"])
def test_splicing_at_a_site(family, site, lm, tokens):
    "The identity changes nothing; zeros take away what the site gives to the stream."
    other = lm if family == "gemma2" else of_family(family, lm)
    loss = next_token_losses(other, tokens)
    x = {site: read_site(other, tokens, 1, site) for site in SITES}
    with splice(other, 1, lambda v: v, site):
        assert torch.equal(next_token_losses(other, tokens), loss)
    with splice(other, 1, torch.zeros_like, site):
        blind = {name: read_site(other, tokens, 1, name) for name in SITES}
    assert blind[site].abs().max() == 0
    assert not torch.allclose(blind["resid_post"], x["resid_post"], atol=1e-3)
    if site == "mlp_out":
        total = x["resid_pre"] + x["attn_out"]
        assert torch.allclose(blind["resid_post"], total, atol=1e-5)
    assert torch.equal(read_site(other, tokens, 1, site), x[site])  # the hooks are gone


@pytest.mark.parametrize(
    "family, message",
    [("granite", "adds something else"), ("bloom", "adds something else")],
)
def test_a_block_that_adds_something_else(family, message, lm, tokens):
    other = of_family(family, lm)
    for site in ("attn_out", "mlp_out"):
        with pytest.raises(ValueError, match=f"{family} .*block 1 {message}.*read resid_pre"):
            read_site(other, tokens, 1, site)
        with pytest.raises(ValueError, match=message), splice(other, 1, lambda x: x, site):
            next_token_losses(other, tokens)
    assert torch.equal(read_site(other, tokens, 1, "resid_pre"), residual_stream(other, tokens, 0))


def test_the_sum_holds_up_to_rounding_in_16_bits(lm, tokens):
    import copy

    half = LM(copy.deepcopy(lm.model).to(torch.bfloat16), lm.tokenizer, "half", "half", "")
    assert read_site(half, tokens, 2, "mlp_out").dtype == torch.bfloat16


def test_a_block_without_such_a_part(lm, tokens):
    import copy

    other = copy.deepcopy(lm)
    block = other.model.model.layers[1]
    block.cross_attn = torch.nn.Identity()
    del block.post_feedforward_layernorm
    with pytest.raises(ValueError, match="one part that gives attn_out, and has self_attn, cross"):
        read_site(other, tokens, 1, "attn_out")
    for call in (lambda: read_site(lm, tokens, 1, "hook_z"), lambda: hook_point("m", 1, "hook_z")):
        with pytest.raises(ValueError, match="no site 'hook_z'; choose one of resid_pre, attn_out"):
            call()


@pytest.mark.parametrize(
    "name, site",
    [
        ("blocks.12.hook_resid_post", Site(12)),
        ("blocks.0.hook_resid_pre", Site(0, "resid_pre")),
        ("blocks.3.hook_mlp_out", Site(3, "mlp_out")),
        ("blocks.3.hook_attn_out", Site(3, "attn_out")),
        ("resid_post_layer_8", Site(8)),
        ("model.layers.5", Site(5)),
        ("transformer.h.5", Site(5)),
    ],
)
def test_names_of_hooks(name, site):
    assert Site.parse(name) == site and Site.parse(site.hook_name) == site


@pytest.mark.parametrize(
    "name",
    [
        "blocks.3.attn.hook_z",
        "blocks.3.hook_mlp_in",
        "blocks.3.ln2.hook_normalized",
        "blocks.3.hook_resid_post.2",
        "model.layers.3.mlp",
        "mlp_layer_3",
        "blocks.hook_resid_post",
        "",
    ],
)
def test_hooks_that_cannot_be_read(name):
    with pytest.raises(ValueError, match=f"the hook {name} cannot be read; those that can are"):
        Site.parse(name)
    here = hook_point("m", 3)
    said = dict(hook_name=name) if name else {}
    assert other_place(said, here) == said


def test_places_are_compared():
    here = hook_point("a/m", 2)
    assert other_place(dict(model_name="m", hook_name="blocks.3.hook_resid_pre", n=1), here) == {}
    assert other_place({}, here) == other_place(dict(model_name=None), here) == {}
    assert other_place(dict(model_name="other"), here) == dict(model_name="other")

    class Trained:
        metadata = dict(hook_name="blocks.2.hook_mlp_out")

    check_hook(Trained(), 2, "mlp_out")
    check_hook(object(), 2, "mlp_out")
    message = "trained on blocks.2.hook_mlp_out, and blocks.2.hook_resid_post is read"
    with pytest.raises(ValueError, match=message):
        check_hook(Trained(), 2, "resid_post")


# ---- models of several parts


def vision_model(vision_layers=2, n_layers=2):
    "A Gemma-3 that also reads images, with random weights."
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    heads = dict(num_attention_heads=2)
    text = dict(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=n_layers,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=64,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        **heads,
    )
    vision = dict(hidden_size=16, intermediate_size=32, image_size=28, patch_size=14)
    config = Gemma3Config(
        text_config=text,
        vision_config=vision | dict(num_hidden_layers=vision_layers) | heads,
        mm_tokens_per_image=4,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).eval()


def test_the_text_model_of_one_that_reads_images(lm, tokens, tmp_path):
    "The vision tower has as many blocks as the text model, and comes first."
    both = LM(vision_model(), lm.tokenizer, "both", "both", "")
    other = load_lm(save_lm(both, tmp_path / "both"))
    assert (other.n_layers, other.d_model, module.model_width(tmp_path / "both")) == (2, 32, 32)
    full = other.model(input_ids=tokens, output_hidden_states=True).hidden_states
    assert torch.allclose(residual_stream(other, tokens, 0), full[1], atol=1e-5)
    plain = residual_stream(other, tokens, 1)
    with splice(other, 0, torch.zeros_like):
        assert not torch.allclose(residual_stream(other, tokens, 1), plain)
    compile_blocks(other, 1, backend="eager")
    assert torch.allclose(residual_stream(other, tokens, 1), plain, atol=1e-5)


def test_blocks_that_cannot_be_told(lm):
    "Lists inside a block do not count; two lists beside each other are ambiguous."
    import copy

    other = copy.deepcopy(lm)
    other.model.model.layers[0].experts = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    assert hook_layer(other, 1) is other.model.model.layers[1]
    other.model.model.more = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    with pytest.raises(ValueError, match="should be in one list .* there are: layers, more"):
        hook_layer(other, 1)
    other.model.model.more = other.model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="there are: none"):
        hook_layer(other, 1)


# ---- losses and splicing


def test_losses_by_hand(lm, tokens):
    logits = lm.model(input_ids=tokens).logits
    by_hand = -logits[0, 3].log_softmax(0)[tokens[0, 4]]
    assert torch.allclose(next_token_losses(lm, tokens)[0, 3], by_hand, atol=1e-6)
    assert torch.allclose(
        next_token_losses(lm, tokens, batch_size=2), next_token_losses(lm, tokens), atol=1e-5
    )
    assert torch.allclose(next_token_logits(lm, tokens), logits[:, -1], atol=1e-6)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_zero_makes_a_blind_guess(lm, tokens, layer):
    with splice(lm, layer, torch.zeros_like):
        blind = next_token_losses(lm, tokens)
    assert torch.allclose(blind, torch.full((5, 11), math.log(1024)), atol=1e-4)


def test_splice_reaches_readers_at_and_behind_it(lm, tokens):
    x = residual_stream(lm, tokens, 1)
    with splice(lm, 1, lambda r: r + 1):
        assert torch.allclose(residual_stream(lm, tokens, 1), x + 1)
    with splice(lm, 1, lambda r: r + 1):
        assert torch.equal(residual_stream(lm, tokens, 0), residual_stream(lm, tokens, 0))
    assert torch.equal(residual_stream(lm, tokens, 1), x)


def test_splice_checks_shape_and_cleans_up(lm, tokens):
    loss = next_token_losses(lm, tokens)
    with pytest.raises(
        ValueError,
        match="splice at layer 1: .*\\(5, 12, 31\\) for activations of shape \\(5, 12, 32\\)",
    ):
        with splice(lm, 1, lambda r: r[..., 1:]):
            next_token_losses(lm, tokens)
    assert torch.equal(next_token_losses(lm, tokens), loss)


def test_splice_keeps_the_models_dtype(saved, tokens):
    half = load_lm(saved, dtype="bfloat16")
    with splice(half, 1, lambda r: r.float() * 0.5):
        assert next_token_losses(half, tokens).dtype == torch.float32


def test_gradients_flow_through_a_splice(lm, tokens):
    delta = torch.zeros(32, requires_grad=True)

    def loss(d):
        with splice(lm, 1, lambda r: r + d):
            return next_token_losses(lm, tokens).double().mean()

    loss(delta).backward()
    assert all(p.grad is None for p in lm.model.parameters())
    direction = torch.nn.functional.normalize(
        torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0
    )
    slope = (loss(0.05 * direction) - loss(-0.05 * direction)) / 0.1
    assert abs(slope - delta.grad @ direction) < 0.05 * delta.grad.norm()


def test_without_a_splice_no_graph_is_kept(lm, tokens):
    assert not next_token_losses(lm, tokens).requires_grad


def test_compiled_blocks_give_the_same_stream():
    lm = tiny_lm(n_layers=4)
    tokens = torch.randint(3, 1024, (3, 16), generator=torch.Generator().manual_seed(0))
    plain = residual_stream(lm, tokens, 2)
    torch._dynamo.reset()
    compile_blocks(lm, 2, backend="eager")
    assert torch.allclose(residual_stream(lm, tokens, 2), plain, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    with pytest.raises(ValueError, match="no layer 4"):
        compile_blocks(lm, 4)


def test_sites_that_were_not_all_read_do_not_add_up():
    assert not module._adds_up({}, 1e-6)
