"SAEs of other libraries: recorded files, exports, damaged files, the Hub without a network."

import json
import os
import pickle
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from atm_sae import from_pretrained, export_sae, model_card, push_to_hub
from atm_sae.sae import formats
from atm_sae.sae.formats import sae_checksum
from atm_sae.core import cache_dir
from atm_sae.data.lm import SITES, hook_point, other_place
from atm_sae.sae.sae import SAE, SAEConfig

FIXTURES = Path(__file__).parent / "fixtures"
RECORDED = sorted(p.parent for p in (FIXTURES / "pretrained").rglob("recorded.safetensors"))
GEMMA = FIXTURES / "pretrained/gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_7"
STANDARD, JUMP, TOPK, TRAINED = (
    FIXTURES / f"pretrained/saelens-{n}"
    for n in ("standard", "jumprelu", "topk", "batchtopk-checkpoint")
)
THEIRS = FIXTURES / "pretrained/dictionary-learning-AutoEncoderTopK"
FORMATS = ("saelens", "gemma-scope", "dictionary-learning")
SPARSIFY, LLAMA, SCOPIUM, QWEN, GEMMA_2, PICKLED = (
    FIXTURES / "pretrained" / name
    for name in (
        "sparsify/layers.3",
        "Llama3_1-8B-Base-L15R-8x",
        "llamascopium-jumprelu",
        "SAE-Res-Qwen3-1.7B-Base-W32K-L0_3",
        "gemma-scope-2-1b-it/resid_post/layer_13_width_16k_l0_big",
        "dictionary-learning-pt/resid_post_layer_3/trainer_0",
    )
)
ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu")
PLACE = hook_point("google/gemma-2-2b", 3)


def same(sae, folder, file="recorded.safetensors", latents=True):
    "Latents and reconstruction are those in a file, within 1e-5."
    want = load_file(folder / file)
    x = want["x"] if "x" in want else load_file(folder / "x.safetensors")["x"]
    with torch.no_grad():
        z = sae.encode(x)
    assert want["z"].count_nonzero() > 0 and want["x_hat"].std() > 0.1
    if latents:
        torch.testing.assert_close(z, want["z"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(z).detach(), want["x_hat"], atol=1e-5, rtol=1e-5)


def make(architecture, d_in=6, d_sae=12, seed=0):
    "A random SAE, with rows that are not of unit length where that is allowed."
    sae = SAE(
        SAEConfig(d_in, d_sae, architecture, k=3 if "topk" in architecture else None, seed=seed),
        dict(PLACE),
    )
    g = torch.Generator().manual_seed(seed)
    for p in (sae.b_enc, sae.b_dec):
        p.data = torch.randn(p.shape, generator=g) * 0.5
    if architecture == "batchtopk":
        sae.threshold.fill_(0.3)
    if architecture == "jumprelu":
        sae.threshold.data = torch.rand(d_sae, generator=g)
    if architecture in ("standard", "jumprelu"):
        sae.W_dec.data *= torch.linspace(0.5, 2, d_sae)[:, None]
    return sae


# ---- recorded files of the real libraries


ELSEWHERE = {
    "gemma-scope-2-1b-it/resid_post": hook_point("gemma-3-1b-it", 13),
    "gemma-scope-2-1b-it/mlp_out": hook_point("gemma-3-1b-it", 13, "mlp_out"),
    "gemma-scope-2-1b-it/attn_out": dict(
        model_name="gemma-3-1b-it", hook_name="blocks.13.attn.hook_z"
    ),
    "SAE-Res": hook_point("Qwen3-1.7B-Base", 12),
    "sparsify/layers.3.mlp": hook_point("SmolLM2-135M", 3, "mlp_out"),
    "sparsify/layers.3": hook_point("SmolLM2-135M", 3),
    "Llama3_1-8B-Base-L15R": hook_point("Llama-3.1-8B", 15),
    "Llama3_1-8B-Base-L15A": hook_point("Llama-3.1-8B", 15, "attn_out"),
    "Llama3_1-8B-Base-L15M": hook_point("Llama-3.1-8B", 15, "mlp_out"),
    "llamascopium": dict(hook_name="blocks.3.hook_mlp_out"),
}


@pytest.mark.parametrize(
    "folder", RECORDED, ids=lambda f: f.relative_to(FIXTURES / "pretrained").parts[0]
)
def test_recorded(folder):
    sae = from_pretrained(folder)
    same(sae, folder)
    name = folder.relative_to(FIXTURES / "pretrained").as_posix()
    place = next((ELSEWHERE[start] for start in ELSEWHERE if name.startswith(start)), None)
    if place is None:
        assert other_place(sae.metadata, PLACE) == {} and PLACE.keys() <= sae.metadata.keys()
    else:
        assert sae.metadata == place
    assert all(p.dtype == torch.float32 for p in sae.state_dict().values())


def test_recorded_architectures():
    assert len(RECORDED) == 40
    found = {f.name: from_pretrained(f).config.architecture for f in RECORDED}
    assert (
        found["saelens-gated"] == found["saelens-batchtopk"] == "jumprelu"
        and found["saelens-matryoshka-checkpoint"] == "batchtopk"
    )
    assert (
        found["dictionary-learning-BatchTopKSAE"] == "batchtopk"
        and found["saelens-old-topk"] == "topk"
        and found["average_l0_7"] == "jumprelu"
    )
    sae = from_pretrained(FIXTURES / "pretrained/saelens-batchtopk-checkpoint")
    assert sae.config.k == 3 and sae.threshold.ndim == 0


def test_a_file_or_a_subfolder_will_do():
    assert torch.equal(from_pretrained(GEMMA / "params.npz").W_dec, from_pretrained(GEMMA).W_dec)
    assert torch.equal(
        from_pretrained(FIXTURES / "pretrained", subfolder="saelens-topk").W_dec,
        from_pretrained(str(TOPK / "cfg.json")).W_dec,
    )


def test_gemma_scope_by_hand():
    "z and x_hat with numpy, in double precision, as in Gemma Scope's own example."
    w, x = np.load(GEMMA / "params.npz"), load_file(GEMMA / "recorded.safetensors")["x"]
    pre = x.numpy().astype(float) @ w["W_enc"] + w["b_enc"]
    z = (pre > w["threshold"]) * np.maximum(pre, 0)
    sae = from_pretrained(GEMMA)
    np.testing.assert_allclose(sae.encode(x).detach(), z, atol=1e-5)
    np.testing.assert_allclose(sae(x).detach(), z @ w["W_dec"] + w["b_dec"], atol=1e-5)


def test_finetuned_factor_is_moved_into_the_decoder(tmp_path):
    w, factor = load_file(STANDARD / "sae_weights.safetensors"), torch.linspace(0.5, 2, 12)
    cfg = dict(d_in=6, d_sae=12, finetuning_scaling_factor=True)
    old = folder_with(tmp_path / "a", cfg, w | dict(scaling_factor=factor))
    x, z = torch.randn(8, 6), from_pretrained(STANDARD).encode
    assert torch.allclose(
        from_pretrained(old)(x), (z(x) * factor) @ w["W_dec"] + w["b_dec"], atol=1e-5
    )
    with pytest.raises(ValueError, match="scaling_factor that cfg.json does not mention"):
        from_pretrained(
            folder_with(
                tmp_path / "b",
                cfg | dict(finetuning_scaling_factor=False),
                w | dict(scaling_factor=factor),
            )
        )
    one = folder_with(
        tmp_path / "c", dict(d_in=6, d_sae=12), w | dict(scaling_factor=torch.ones(12))
    )
    assert torch.equal(from_pretrained(one).W_dec, w["W_dec"])


# ---- our own folders, and exports


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_own_folder(tmp_path, architecture):
    sae = make(architecture)
    again = from_pretrained(sae.save(tmp_path / "sae"))
    assert again.config == sae.config and again.metadata == PLACE
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), sae.state_dict().values())
    )


def test_own_batchtopk_with_thresholds_that_another_tool_changed_is_a_jumprelu(tmp_path):
    folder = make("batchtopk").save(tmp_path / "sae")
    w = load_file(folder / "sae_weights.safetensors")
    w["threshold"] = torch.linspace(0.1, 1, 12)
    save_file(w, folder / "sae_weights.safetensors")
    assert from_pretrained(folder).config.architecture == "jumprelu" and torch.equal(
        from_pretrained(folder).threshold, w["threshold"]
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_export(tmp_path, architecture, format):
    sae, x = make(architecture), torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    before = {n: t.clone() for n, t in sae.state_dict().items()}
    if architecture == "topk" and format == "gemma-scope":
        with pytest.raises(ValueError, match="knows only JumpReLU"):
            export_sae(sae, tmp_path / "out", format)
        return
    again = from_pretrained(export_sae(sae, tmp_path / "out", format))
    assert again.is_trained == (format != "saelens")  # ours says that it is fresh
    torch.testing.assert_close(again(x), sae(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.W_dec.norm(dim=1), torch.ones(12))
    assert all(torch.equal(t, before[n]) for n, t in sae.state_dict().items())
    assert format == "gemma-scope" or again.metadata == PLACE
    if format == "gemma-scope":
        assert again.config.architecture == "jumprelu"
    else:
        assert (
            again.config.architecture == sae.config.architecture and again.config.k == sae.config.k
        )


@pytest.mark.parametrize("format", FORMATS)
def test_export_of_a_decoder_row_of_zeros(tmp_path, format):
    "The other rows get unit length."
    sae, x = make("jumprelu"), torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    sae.W_dec.data[3] = 0
    again = from_pretrained(export_sae(sae, tmp_path / "out", format))
    torch.testing.assert_close(again(x), sae(x), atol=1e-5, rtol=1e-5)
    norm = again.W_dec.norm(dim=1)
    assert norm[3] == 0 and torch.allclose(norm[norm > 0], torch.ones(11))


def test_settings_that_change_nothing_are_read(tmp_path):
    for i, (source, change) in enumerate(
        [
            (STANDARD, cfg_change(reshape_activations=None, hook_head_index=None)),
            (STANDARD, cfg_change(reshape_activations="none")),
            (THEIRS, settings_change(buffer=dict(io="out"))),
            (THEIRS, settings_change(buffer=None)),
        ]
    ):
        (tmp_path / str(i)).mkdir()
        folder = copy(source, tmp_path / str(i))
        change(folder)
        assert from_pretrained(folder).config == from_pretrained(source).config


def test_export_of_a_large_b_dec(tmp_path):
    sae = make("jumprelu")
    sae.b_dec.data *= 100
    x = torch.randn(64, 6) + sae.b_dec.detach()
    for format in FORMATS:
        torch.testing.assert_close(
            from_pretrained(export_sae(sae, tmp_path / format, format))(x),
            sae(x),
            atol=1e-3,
            rtol=1e-5,
        )


def test_export_refuses(tmp_path):
    with pytest.raises(
        ValueError,
        match="unknown format 'onnx': choose one of saelens, gemma-scope, dictionary-learning",
    ):
        export_sae(make("topk"), tmp_path / "x", "onnx")
    assert not list(tmp_path.iterdir())


# ---- damaged and foreign files


def folder_with(folder, cfg, weights):
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(cfg) if not isinstance(cfg, str) else cfg)
    save_file({n: t.contiguous() for n, t in weights.items()}, folder / "sae_weights.safetensors")
    return folder


def copy(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / source.name))


def cfg_change(**change):
    def do(folder):
        cfg = json.loads((folder / "cfg.json").read_text()) | change
        (folder / "cfg.json").write_text(json.dumps({k: v for k, v in cfg.items() if v != "GONE"}))

    return do


def trainer_change(**change):
    def do(folder):
        cfg = json.loads((folder / "config.json").read_text())
        cfg["trainer"] |= change
        (folder / "config.json").write_text(json.dumps(cfg))

    return do


def settings_change(**change):
    def do(folder):
        cfg = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(cfg))

    return do


def weights_change(file, change):
    def do(folder):
        w = load_file(folder / file)
        change(w)
        save_file({n: t.contiguous() for n, t in w.items()}, folder / file)

    return do


def npz_change(change):
    def do(folder):
        w = dict(np.load(folder / "params.npz"))
        change(w)
        np.savez(folder / "params.npz", **w)

    return do


def write(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def cut(file):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:200])


def hyper_change(**change):
    def do(folder):
        cfg = json.loads((folder / "hyperparams.json").read_text()) | change
        (folder / "hyperparams.json").write_text(json.dumps(cfg))

    return do


def pickled(content, file="ae.pt"):
    return lambda folder: torch.save(content, folder / file)


def pickled_change(file, change):
    def do(folder):
        w = torch.load(folder / file, weights_only=True)
        change(w)
        torch.save(w, folder / file)

    return do


class HeldInAnObject(dict):
    "A dict that torch does not know, as a training script might save."


class Code:
    "What a pickle runs when it is read in full."

    def __reduce__(self):
        return (os.system, ("touch opened",))


def to_code(folder):
    w = torch.load(folder / "ae.pt", weights_only=True)
    torch.save(w | dict(more=Code()), folder / "ae.pt")


def remove(*files):
    return lambda folder: [(folder / f).unlink() for f in files]


def nan(w):
    w["W_dec"][0, :3] = torch.nan


def objects(w):
    w["W_enc"] = np.array([[{}]], dtype=object)


def below(w):
    w["threshold"][:2] = -1


WEIGHTS = "sae_weights.safetensors"
DAMAGE = dict(
    wrong_shape=(
        STANDARD,
        weights_change(WEIGHTS, lambda w: w.update(W_dec=torch.zeros(5, 6))),
        r"W_dec is \(5, 6\) where \(12, 6\) was expected \(d_in = 6, d_sae = 12\)",
    ),
    wrong_size=(STANDARD, cfg_change(d_sae=13), r"W_enc is \(6, 12\) where \(6, 13\) was expected"),
    transposed=(
        STANDARD,
        weights_change(WEIGHTS, lambda w: w.update(W_enc=w["W_enc"].T)),
        r"W_enc is \(12, 6\) where",
    ),
    reshaped=(
        STANDARD,
        cfg_change(reshape_activations="hook_z"),
        "reshape_activations is 'hook_z'.*only SAEs of whole vectors",
    ),
    one_head=(
        STANDARD,
        cfg_change(metadata=dict(hook_name="blocks.3.attn.hook_q", hook_head_index=0)),
        "hook_head_index is 0.*only SAEs of whole vectors",
    ),
    old_head=(
        FIXTURES / "pretrained/saelens-old-standard",
        cfg_change(hook_head_index=3),
        "hook_head_index is 3",
    ),
    their_input=(
        THEIRS,
        settings_change(buffer=dict(io="in")),
        "buffer.io is 'in'.*only SAEs of the output",
    ),
    missing=(
        JUMP,
        weights_change(WEIGHTS, lambda w: w.pop("threshold")),
        "has no threshold: it is damaged, or no jumprelu SAE",
    ),
    nan=(STANDARD, weights_change(WEIGHTS, nan), "W_dec holds 3 values that are NaN or infinite"),
    cut=(STANDARD, cut(WEIGHTS), "is no readable safetensors file"),
    pickled=(
        STANDARD,
        write(WEIGHTS, pickle.dumps([1])),
        "no readable safetensors file.*is a pickle",
    ),
    no_weights=(
        STANDARD,
        remove(WEIGHTS),
        f"no SAE in .*cfg.json with {WEIGHTS} .SAELens, atm-sae. or cfg.json with sae.safetensors "
        ".sparsify., found cfg.json.*not complete",
    ),
    no_json=(STANDARD, write("cfg.json", b'{"d_in": 6, '), "cfg.json is not valid JSON"),
    list_json=(STANDARD, write("cfg.json", b"[1]"), "holds a list"),
    no_d_in=(STANDARD, cfg_change(d_in="GONE"), "d_in is None, where a number"),
    text_d_sae=(STANDARD, cfg_change(d_sae="12"), "d_sae is '12', where a number"),
    no_k=(TOPK, cfg_change(k="GONE"), "k is None"),
    large_k=(TOPK, cfg_change(k=13), "needs k.*not 13"),
    temporal=(
        STANDARD,
        cfg_change(architecture="temporal"),
        "unknown architecture 'temporal'; these can be loaded: standard, topk, jumprelu, batchtopk",
    ),
    transcoder=(
        STANDARD,
        cfg_change(architecture="transcoder"),
        "unknown architecture 'transcoder'",
    ),
    tanh=(
        STANDARD,
        cfg_change(metadata="GONE", activation_fn="tanh-relu"),
        "unknown architecture 'tanh-relu'",
    ),
    layer_norm=(
        STANDARD,
        cfg_change(normalize_activations="layer_norm"),
        "normalize_activations is 'layer_norm'.*let SAELens fold it",
    ),
    rescale=(
        STANDARD,
        cfg_change(normalize_activations="constant_norm_rescale"),
        "normalize_activations is 'constant_norm_rescale'",
    ),
    unfolded=(
        TRAINED,
        remove("activation_scaler.json"),
        "normalize_activations is 'expected_average_only_in'",
    ),
    no_factor=(
        TRAINED,
        write("activation_scaler.json", b'{"scaling_factor": null}'),
        "normalize_activations is 'expected_average_only_in'",
    ),
    npz_objects=(GEMMA, npz_change(objects), "no readable npz file.*pickle"),
    npz_pickle=(
        GEMMA,
        write("params.npz", pickle.dumps({"W_enc": 1})),
        "no readable npz file.*pickle",
    ),
    npz_cut=(GEMMA, cut("params.npz"), "no readable npz file"),
    npz_empty=(GEMMA, write("params.npz", b""), "no readable npz file"),
    npz_nan=(
        GEMMA,
        npz_change(lambda w: w["b_enc"].fill(np.nan)),
        "b_enc holds 12 values that are NaN",
    ),
    npz_missing=(GEMMA, npz_change(lambda w: w.pop("b_dec")), "has no b_dec"),
    npz_other=(
        GEMMA,
        npz_change(lambda w: w.pop("W_enc")),
        "has no matrix W_enc; it has W_dec, b_dec",
    ),
    npz_shape=(
        GEMMA,
        npz_change(lambda w: w.update(threshold=np.ones(7, np.float32))),
        r"threshold is \(7,\) where \(12,\)",
    ),
    npz_negative=(GEMMA, npz_change(below), "2 thresholds are negative"),
    their_code=(
        PICKLED,
        to_code,
        r"ae.pt is no readable file of tensors.*can run code.*torch.load.*'ae.safetensors'",
    ),
    their_cut=(PICKLED, cut("ae.pt"), "ae.pt is no readable file of tensors: it was cut short"),
    their_list=(PICKLED, pickled([torch.ones(2)]), "ae.pt holds a list, where a dict of tensors"),
    their_nan=(
        PICKLED,
        pickled_change("ae.pt", lambda w: w["b_dec"].fill_(torch.nan)),
        "ae.pt: b_dec holds 6 values that are NaN",
    ),
    their_config=(PICKLED, remove("config.json"), "no config.json in .*not complete"),
    their_weights=(PICKLED, remove("ae.pt"), "no SAE in .*ae.safetensors or ae.pt"),
    sparsify_settings=(SPARSIFY, remove("cfg.json"), "no cfg.json in .*not complete"),
    sparsify_weights=(SPARSIFY, remove("sae.safetensors"), "no SAE in .*sae.safetensors .sparsify"),
    sparsify_transcoder=(
        SPARSIFY,
        cfg_change(transcode=True),
        "this is a transcoder of sparsify.*only SAEs are read",
    ),
    sparsify_skip=(SPARSIFY, cfg_change(skip_connection=True), "transcoder of sparsify"),
    sparsify_groups=(SPARSIFY, cfg_change(activation="groupmax"), "unknown .*'groupmax'.*topk"),
    sparsify_signed=(SPARSIFY, cfg_change(signed=True), "signed is true"),
    sparsify_k=(SPARSIFY, cfg_change(k=None), "k is None, where a number"),
    sparsify_size=(SPARSIFY, cfg_change(num_latents=11), r"W_enc is \(6, 12\) where \(6, 11\)"),
    sparsify_nan=(SPARSIFY, weights_change("sae.safetensors", nan), "W_dec holds 3 values"),
    llama_settings=(LLAMA, remove("hyperparams.json"), "no hyperparams.json in .*not complete"),
    llama_weights=(
        LLAMA,
        remove("checkpoints/final.safetensors"),
        "no SAE in .*hyperparams.json with checkpoints/final.safetensors .Llama Scope., found",
    ),
    llama_transcoder=(
        LLAMA,
        hyper_change(hook_point_in="blocks.15.ln2.hook_normalized"),
        "this transcoder maps blocks.15.ln2.hook_normalized to blocks.15.hook_resid_post",
    ),
    llama_glu=(LLAMA, hyper_change(use_glu_encoder=True), "use_glu_encoder is true"),
    llama_token=(LLAMA, hyper_change(norm_activation="token-wise"), "'token-wise'.*no weights can"),
    llama_norm=(LLAMA, hyper_change(dataset_average_activation_norm=None), "is None, where a num"),
    llama_function=(LLAMA, hyper_change(act_fn="gelu"), "unknown .*'gelu'; these .*relu, topk"),
    llama_threshold=(LLAMA, hyper_change(jump_relu_threshold=None), "has no threshold"),
    llama_size=(LLAMA, hyper_change(d_sae=11), r"W_enc is \(6, 12\) where \(6, 11\)"),
    llama_nan=(
        LLAMA,
        weights_change(
            "checkpoints/final.safetensors", lambda w: w["decoder.bias"].fill_(torch.nan)
        ),
        "b_dec holds 6 values that are NaN",
    ),
    scopium_type=(SCOPIUM, settings_change(sae_type="clt"), "this clt maps .*only SAEs are read"),
    scopium_batch=(SCOPIUM, settings_change(act_fn="batchtopk"), "unknown .*'batchtopk'"),
    scopium_missing=(
        SCOPIUM,
        weights_change(WEIGHTS, lambda w: w.pop("W_E")),
        "has no W_enc: it is damaged",
    ),
    gemma_2_transcoder=(
        GEMMA_2,
        settings_change(type="transcoder"),
        "belongs to a transcoder of Gemma Scope 2.*only SAEs are read",
    ),
    gemma_2_affine=(
        GEMMA_2,
        weights_change(
            "params.safetensors", lambda w: w.update(affine_skip_connection=torch.eye(6))
        ),
        "which does not reconstruct its own input",
    ),
    gemma_2_function=(
        GEMMA_2,
        settings_change(architecture="topk"),
        "unknown .*'topk'; .*jump_relu",
    ),
    gemma_2_weights=(
        GEMMA_2,
        remove("params.safetensors", "recorded.safetensors"),
        "no SAE in .*params.safetensors .Gemma Scope 2.*found config.json",
    ),
    gemma_2_other=(
        GEMMA_2,
        weights_change("params.safetensors", lambda w: w.pop("w_enc")),
        "has no matrix w_enc; it has b_dec",
    ),
    gemma_2_negative=(GEMMA_2, weights_change("params.safetensors", below), "2 thresholds are neg"),
    qwen_missing=(
        QWEN,
        pickled_change("layer12.sae.pt", lambda w: w.pop("b_enc")),
        "layer12.sae.pt has no b_enc",
    ),
    qwen_shape=(
        QWEN,
        pickled_change("layer12.sae.pt", lambda w: w.update(W_dec=w["W_enc"])),
        r"W_dec is \(6, 12\) where \(12, 6\)",
    ),
    qwen_other=(
        QWEN,
        pickled_change("layer12.sae.pt", lambda w: w.pop("W_enc")),
        "has no matrix W_enc; it has W_dec, b_dec, b_enc",
    ),
    qwen_many=(
        QWEN,
        lambda folder: shutil.copy(folder / "layer12.sae.pt", folder / "layer3.sae.pt"),
        "has 2 SAEs: give one file, such as .*layer12.sae.pt",
    ),
    their_class=(
        THEIRS,
        trainer_change(dict_class="IdentityDict"),
        "unknown architecture 'IdentityDict'; these can be loaded: AutoEncoder",
    ),
    their_size=(THEIRS, trainer_change(dict_size=None), "d_sae is None"),
    their_shape=(THEIRS, trainer_change(dict_size=11), r"W_enc is \(6, 12\) where \(6, 11\)"),
    their_missing=(
        THEIRS,
        weights_change("ae.safetensors", lambda w: w.pop("encoder.bias")),
        "ae.safetensors has no b_enc",
    ),
    a_model=(
        THEIRS,
        write("config.json", b'{"model_type": "gemma2"}'),
        "names no trainer.dict_class",
    ),
    nothing=(STANDARD, remove("cfg.json", WEIGHTS), "no SAE in .*found recorded.safetensors"),
    only_a_pickle=(
        STANDARD,
        lambda f: (remove("cfg.json", WEIGHTS)(f), write("sae.pt", b"1")(f)),
        "no SAE in .*sae.pt is a pickle",
    ),
)


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(tmp_path, case):
    source, damage, says = DAMAGE[case]
    folder = copy(source, tmp_path)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){says}") as e:
        from_pretrained(folder)
    assert str(folder) in str(e.value) or case == "large_k"


SETTINGS = {
    "saelens": [
        ("architecture", ["topk"]),
        ("metadata.model_name", 5),
        ("metadata.hook_name", ["blocks.1.hook_resid_post"]),
        ("metadata.max_norm", "large"),
        ("metadata.max_norm", 0),
        ("metadata.max_norm", True),
        ("metadata.atm_sae.d_in", "8"),
        ("metadata.atm_sae.architecture", ["topk"]),
        ("metadata.atm_sae.prefixes", None),
        ("metadata.atm_sae.outlier_ratio", "10"),
    ],
    "dictionary-learning": [
        ("trainer.dict_class", ["AutoEncoderTopK"]),
        ("trainer.submodule_name", 5),
        ("trainer.submodule_name", ["resid_post_layer_1"]),
    ],
}


@pytest.mark.parametrize(
    "format, name, value", [(format, *case) for format in SETTINGS for case in SETTINGS[format]]
)
def test_settings_of_a_wrong_type_are_named(tmp_path, format, name, value):
    place = dict(hook_point("tiny", 1), max_norm=5.0)
    export_sae(SAE(SAEConfig(8, 16, "topk", k=2), place), tmp_path / "sae", format)
    path = tmp_path / "sae" / ("cfg.json" if format == "saelens" else "config.json")
    settings = part = json.loads(path.read_text())
    *outer, last = name.split(".")
    for key in outer:
        part = part[key]
    part[last] = value
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=str(path)):
        from_pretrained(tmp_path / "sae")


def test_other_wrong_sources(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="notes.txt is a file that this library does not read"):
        from_pretrained(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no SAE in .*found nothing"):
        from_pretrained(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no folder my-sae: give the folder"):
        from_pretrained("my-sae")
    with pytest.raises(ValueError, match="is a local folder, and revision="):
        from_pretrained(STANDARD, revision="main")
    away = tmp_path / "gemma-scope-2b-pt-transcoders/layer_3"
    shutil.copytree(GEMMA, away)
    with pytest.raises(ValueError, match="transcoders of Gemma Scope, which are no SAEs"):
        from_pretrained(away)


def test_the_line_that_converts_a_pickle_works(tmp_path):
    "A file that torch does not read as tensors alone; the line runs its code, as it says."
    folder = copy(PICKLED, tmp_path)
    w = torch.load(folder / "ae.pt", weights_only=True)
    torch.save(HeldInAnObject(w), folder / "ae.pt")
    with pytest.raises(ValueError, match="not opened") as e:
        from_pretrained(folder)
    code = str(e.value).split('python -c "')[1].rsplit('"', 1)[0]
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parent))
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, env=env)
    same(from_pretrained(folder), folder)


def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch):
    folder = copy(PICKLED, tmp_path)
    to_code(folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="not opened"):
        from_pretrained(folder)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    "folder",
    [f for f in RECORDED if (f / "ae.safetensors").exists()],
    ids=lambda f: f.name,
)
def test_every_class_of_dictionary_learning_is_read_from_ae_pt(tmp_path, folder):
    there = copy(folder, tmp_path)
    torch.save(load_file(there / "ae.safetensors"), there / "ae.pt")
    (there / "ae.safetensors").unlink()
    same(from_pretrained(there), there)


def test_safetensors_are_read_before_a_pickle(tmp_path):
    folder = copy(THEIRS, tmp_path)
    (folder / "ae.pt").write_bytes(b"no pickle")
    same(from_pretrained(folder), folder)


def test_gemma_scope_2_without_settings(tmp_path):
    "The path then gives model and hook; a path that gives neither leaves them out."
    for name, hook in [
        ("resid_post", "hook_resid_post"),
        ("mlp_out_all", "hook_mlp_out"),
        ("attn_out", "attn.hook_z"),
    ]:
        at = tmp_path / "models--google--gemma-scope-2-270m-pt/snapshots/ab" / name
        folder = at / "layer_5_width_16k_l0_small"
        shutil.copytree(GEMMA_2, folder)
        (folder / "config.json").unlink()
        sae = from_pretrained(folder)
        same(sae, folder)
        assert sae.metadata == dict(model_name="gemma-3-270m", hook_name=f"blocks.5.{hook}")
    shutil.copytree(folder, tmp_path / "x")
    assert from_pretrained(tmp_path / "x").metadata == {}
    shutil.copytree(folder, tmp_path / "transcoder_all/layer_5_width_16k_l0_small")
    with pytest.raises(ValueError, match="belongs to a transcoder_all of Gemma Scope 2"):
        from_pretrained(tmp_path / "transcoder_all/layer_5_width_16k_l0_small")


def test_sparsify_weights_beside_settings_of_saelens(tmp_path):
    "The number of latents is called d_sae there, and the settings name model and hook."
    folder = shutil.copytree(SPARSIFY, tmp_path / "sae")
    settings = json.loads((TOPK / "cfg.json").read_text()) | dict(d_in=6, d_sae=12, k=3)
    (folder / "cfg.json").write_text(json.dumps(settings))
    sae = from_pretrained(folder)
    same(sae, SPARSIFY)
    assert sae.config.d_sae == 12 and sae.metadata == PLACE


@pytest.mark.parametrize(
    "name, model, hook",
    [
        ("layers.9", "meta-llama/Llama-3.1-8B", "blocks.9.hook_resid_post"),
        ("layers.9.mlp", "meta-llama/Llama-3.1-8B", "blocks.9.hook_mlp_out"),
        ("layers.9.self_attn", "x/y", "blocks.9.hook_attn_out"),
        ("layers.9.mlp", "google/gemma-2-2b", "layers.9.mlp"),  # its output is normalised later
        ("embed_tokens", "x/y", "embed_tokens"),
    ],
)
def test_the_place_of_a_sparsify_sae(tmp_path, name, model, hook):
    shutil.copytree(SPARSIFY, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps(dict(model=model)))
    place = dict(model_name=model.split("/")[1], hook_name=hook)
    assert from_pretrained(tmp_path / name).metadata == place


def test_a_qwen_scope_file_outside_of_its_repository_has_no_k(tmp_path):
    shutil.copy(QWEN / "layer12.sae.pt", tmp_path / "layer12.sae.pt")
    with pytest.raises(ValueError, match="only the name of its repository says how many latents"):
        from_pretrained(tmp_path / "layer12.sae.pt")


@pytest.mark.parametrize(
    "file",
    [
        LLAMA / "checkpoints/final.safetensors",
        QWEN / "layer12.sae.pt",
        PICKLED / "ae.pt",
        SPARSIFY / "sae.safetensors",
        GEMMA_2 / "params.safetensors",
    ],
)
def test_the_file_of_weights_will_do(file):
    folder = file.parents[1] if file.parent.name == "checkpoints" else file.parent
    same(from_pretrained(file), folder)
    assert sae_checksum(file) == sae_checksum(folder)


def test_every_row_of_the_table_has_a_fixture():
    rows = [formats._locate(folder)[0] for folder in RECORDED]
    assert {name for name, row in formats.FORMATS.items() if row in rows} == {*formats.FORMATS}
    assert [name for name, row in formats.FORMATS.items() if row.write] == list(FORMATS)


# ---- the Hub, without one


def http_error(kind, status=404):
    "An error of the Hub's client as if it came from a response."
    e = kind.__new__(kind)
    Exception.__init__(e, "the Hub said no")
    e.response = SimpleNamespace(status_code=status)
    return e


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A repository in a folder: what is asked of it is recorded, and only that is there."
    repo, asked = tmp_path / "repo", []

    def files():
        return [p.relative_to(repo).as_posix() for p in repo.rglob("*") if p.is_file()]

    def snapshot_download(repo_id, revision=None, allow_patterns=None):
        asked.append((repo_id, revision, allow_patterns))
        cached = tmp_path / f"models--{repo_id.replace('/', '--')}"
        for name in {*files()} & {*allow_patterns}:
            (cached / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repo / name, cached / name)
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda self, repo_id, revision=None: files()
    )
    return SimpleNamespace(repo=repo, asked=asked)


NESTED = [  # repository, path in it, fixture, its file of weights
    ("adamkarvonen/saebench", "topk/resid_post_layer_3/trainer_0", PICKLED, "ae.pt"),
    ("google/gemma-scope-2-4b-pt", "resid_post/layer_9_w", GEMMA_2, "params.safetensors"),
    ("fnlp/Llama3_1-8B-Base-LXR-8x", "L15R-8x", LLAMA, "checkpoints/final.safetensors"),
    ("fnlp/llamascopium", "800M/L3R", SCOPIUM, "sae_weights.safetensors"),
    ("EleutherAI/sae-x", "layers.3", SPARSIFY, "sae.safetensors"),
    ("someone/saes", "a/b/c", STANDARD, "sae_weights.safetensors"),
]


@pytest.mark.parametrize("repo, inside, fixture, weights", NESTED)
def test_nested_folders_of_the_hub(hub, repo, inside, fixture, weights):
    shutil.copytree(fixture, hub.repo / inside)
    shutil.copytree(fixture, hub.repo / f"{inside}-other")
    if fixture == SPARSIFY:
        shutil.copy(SPARSIFY.parent / "config.json", hub.repo)
    for source in (f"hf:{repo}/{inside}", f"{repo}/{inside}/{weights}"):
        sae = from_pretrained(source)
        same(sae, fixture)
        assert sae.metadata == from_pretrained(fixture).metadata
    asked = {name for _, _, patterns in hub.asked for name in patterns}
    assert not any("*" in name or "other" in name or ".." in name for name in asked)
    with pytest.raises(FileNotFoundError, match=f"it has one in {inside}, {inside}-other: name"):
        from_pretrained(f"hf:{repo}")


def test_one_file_of_qwen_scope_is_fetched(hub):
    repo = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_3"
    shutil.copytree(QWEN, hub.repo)
    shutil.copy(QWEN / "layer12.sae.pt", hub.repo / "layer3.sae.pt")
    sae = from_pretrained(f"hf:{repo}/layer3.sae.pt")
    same(sae, QWEN)
    assert sae.metadata == hook_point("Qwen3-1.7B-Base", 3)
    assert hub.asked == [(repo, None, ["layer3.sae.pt"])]
    with pytest.raises(FileNotFoundError, match="it has one in layer12.sae.pt, layer3.sae.pt: na"):
        from_pretrained(repo)


def test_only_the_needed_files_are_fetched(hub):
    at = "layer_3/width_16k/average_l0_7"
    shutil.copytree(GEMMA, hub.repo / at)
    (hub.repo / at / "activations.bin").write_text("large")
    for args in (
        [f"google/gemma-scope-2b-pt-res/{at}"],
        ["google/gemma-scope-2b-pt-res", at, "v1"],
    ):
        sae = from_pretrained(*args)
        same(sae, GEMMA)
        assert sae.metadata == PLACE
    repo, revision, patterns = hub.asked[-1]
    assert (
        repo == "google/gemma-scope-2b-pt-res"
        and revision == "v1"
        and f"{at}/params.npz" in patterns
        and not any("*" in p for p in patterns)
    )
    with pytest.raises(
        FileNotFoundError,
        match=f"no SAE in google/gemma-scope-2b-pt-res; it has one in {at}: name the folder",
    ):
        from_pretrained("google/gemma-scope-2b-pt-res")


@pytest.mark.parametrize(
    "error, kind, says",
    [
        (
            errors.LocalEntryNotFoundError("offline"),
            ConnectionError,
            "cannot be reached .no network, or HF_HUB_OFFLINE is set.",
        ),
        (errors.OfflineModeIsEnabled("offline"), ConnectionError, "cannot be reached"),
        (
            http_error(errors.RepositoryNotFoundError),
            FileNotFoundError,
            "neither a folder here nor a repository on the Hub that you may see",
        ),
        (http_error(errors.RevisionNotFoundError), FileNotFoundError, "has no revision 'v9'"),
        (http_error(errors.GatedRepoError, 403), PermissionError, "is gated: accept its terms"),
        (
            errors.HFValidationError("bad"),
            ValueError,
            "neither a folder here nor the name of a repository",
        ),
        (RuntimeError("unforeseen"), RuntimeError, "unforeseen"),
    ],
)
def test_hub_errors(monkeypatch, error, kind, says):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(kind, match=says):
        from_pretrained("owner/name", revision="v9")


def test_offline_for_real(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConnectionError, match="atm-sae-no-owner/no-name is not in the local Hub cache"
    ):
        from_pretrained("atm-sae-no-owner/no-name")


class FakeApi:
    "Records what would be done to the Hub."

    calls, files, fails = [], {}, None

    def create_repo(self, repo_id, **more):
        if self.fails:
            raise self.fails
        self.calls.append(("create_repo", repo_id, more))
        return f"https://huggingface.co/{repo_id}"

    def create_branch(self, repo_id, **more):
        self.calls.append(("create_branch", repo_id, more))

    def upload_folder(self, repo_id, folder_path, **more):
        self.calls.append(("upload_folder", repo_id, more))
        self.files.update({p.name: p.read_bytes() for p in Path(folder_path).iterdir()})


@pytest.fixture
def api(monkeypatch):
    fake = type("Api", (FakeApi,), dict(calls=[], files={}))
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


def test_push_is_one_commit(api, tmp_path):
    sae = make("batchtopk")
    assert (
        push_to_hub(sae, "me/mine", dict(l0=3.2), private=True, commit_message="first")
        == "https://huggingface.co/me/mine"
    )
    assert api.calls == [
        ("create_repo", "me/mine", dict(private=True, exist_ok=True)),
        ("upload_folder", "me/mine", dict(revision=None, commit_message="first")),
    ]
    assert set(api.files) == {"cfg.json", WEIGHTS, "README.md"}
    for name, content in api.files.items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(from_pretrained(tmp_path).W_enc, sae.W_enc)
    assert 'from_pretrained("me/mine")' in api.files["README.md"].decode()


def test_push_of_a_folder_to_a_branch(api):
    assert push_to_hub(GEMMA, "me/mine", revision="v2") == "https://huggingface.co/me/mine/tree/v2"
    assert [c[0] for c in api.calls] == [
        "create_repo",
        "create_branch",
        "upload_folder",
    ] and api.calls[-1][2]["revision"] == "v2"
    assert (
        json.loads(api.files["cfg.json"])["architecture"] == "jumprelu"
        and b'from_pretrained("me/mine", revision="v2")' in api.files["README.md"]
    )


def test_nothing_is_sent_of_a_damaged_folder(api, tmp_path):
    folder = copy(STANDARD, tmp_path)
    cut(WEIGHTS)(folder)
    with pytest.raises(ValueError, match="no readable safetensors"):
        push_to_hub(folder, "me/mine")
    assert api.calls == []


@pytest.mark.parametrize(
    "error, kind, says",
    [
        (errors.OfflineModeIsEnabled("x"), ConnectionError, "cannot be reached"),
        (errors.LocalTokenNotFoundError("x"), PermissionError, "hf auth login"),
        (http_error(errors.HfHubHTTPError, 403), PermissionError, "the Hub refused"),
        (KeyError("x"), KeyError, "x"),
    ],
)
def test_push_errors(api, error, kind, says):
    api.fails = error
    with pytest.raises(kind, match=says):
        push_to_hub(make("topk"), "me/mine")
    assert api.calls == []


def test_model_card():
    sae = make("topk")
    card = model_card(
        sae,
        dict(
            l0=3.0,
            explained_variance=(0.75, 0.7, 0.8, 5),
            mean_full_absorption_score=(0.0123, None, None, 1),
            mine=2,
        ),
        "me/mine",
    )
    loaded = huggingface_hub.ModelCard(card)
    assert (
        loaded.data.license == "apache-2.0"
        and loaded.data.library_name == "atm-sae"
        and "topk" in loaded.data.tags
    )
    assert (
        "| explained variance | 0.750 [0.700, 0.800] | 5 |" in card
        and "| first-letter absorption, full | 0.0123 | 1 |" in card
        and "| mine | 2.00 | 1 |" in card
    )
    assert (
        "gemma-2-2b at `blocks.3.hook_resid_post`: 6 inputs, 12 latents" in card
        and "topk, k = 3" in card
        and 'SAE.load_from_disk(snapshot_download("me/mine"))' in card
    )
    bare = make("standard")
    bare.metadata = dict(license="gemma")
    assert (
        "license: gemma" in model_card(bare)
        and "origin was not recorded" in model_card(bare)
        and "| metric |" not in model_card(bare)
    )


# ---- the real libraries: ATM_SAE_SAELENS and ATM_SAE_DICTIONARY_LEARNING name a Python that has
# them; ATM_SAE_PEERS=1 makes one in data/cache/peers

PEERS = {
    "saelens": ("ATM_SAE_SAELENS", ["sae-lens==6.54.12", "transformer-lens==3.9.0"]),
    "dictionary-learning": (
        "ATM_SAE_DICTIONARY_LEARNING",
        ["dictionary-learning==0.1.0", "nnsight==0.3.7"],
    ),
    "sparsify": ("ATM_SAE_SPARSIFY", ["eai-sparsify==1.3.3"]),
    "lm-saes": (
        "ATM_SAE_LM_SAES",
        ["lm-saes @ git+https://github.com/OpenMOSS/Language-Model-SAEs@2320def2"],
    ),
    "llamascopium": (
        "ATM_SAE_LLAMASCOPIUM",
        ["llamascopium @ git+https://github.com/OpenMOSS/Language-Model-SAEs@95281ac7"],
    ),
}
RECORDS = dict(saelens=25, sparsify=2, llamascopium=2) | {"dictionary-learning": 8, "lm-saes": 3}


def peer(library):
    "A Python that has the library; skips the test if there is none and none may be made."
    name, packages = PEERS[library]
    if name in os.environ:
        return os.environ[name]
    if not os.environ.get("ATM_SAE_PEERS"):
        pytest.skip(f"{name} names no Python with {packages[0]}, and ATM_SAE_PEERS is not set")
    home = cache_dir() / "peers" / library
    if not (home / "ready").exists():
        venv.create(home, with_pip=True, clear=True)
        subprocess.run(
            [home / "bin/python", "-m", "pip", "install", "--quiet", *packages], check=True
        )
        (home / "ready").touch()
    return str(home / "bin/python")


def ask(library, *args, cwd):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [peer(library), FIXTURES / "record.py", library, *map(str, args)],
        capture_output=True,
        text=True,
        env=env,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("library", PEERS)
def test_theirs_is_read_by_ours(tmp_path, library):
    ask(library, "record", tmp_path / "out", cwd=tmp_path)
    folders = [p.parent for p in (tmp_path / "out").rglob("recorded.safetensors")]
    for folder in folders:
        same(from_pretrained(folder), folder)
    assert len(folders) == RECORDS[library]


@pytest.mark.parametrize(
    "library, format",
    [
        ("saelens", "saelens"),
        ("saelens", "gemma-scope"),
        ("dictionary-learning", "dictionary-learning"),
    ],
)
def test_ours_is_read_by_theirs(tmp_path, library, format):
    x, folders = torch.randn(32, 6, generator=torch.Generator().manual_seed(2)), {}
    for a in ARCHITECTURES:
        if (a, format) == ("topk", "gemma-scope"):
            continue
        folder = export_sae(make(a), tmp_path / a, format)
        save_file(dict(x=x), folder / "x.safetensors")
        folders[a] = folder
    ask(library, "read", *folders.values(), cwd=tmp_path)
    for a, folder in folders.items():
        same(from_pretrained(folder), folder, "theirs.safetensors")
        same(make(a), folder, "theirs.safetensors", latents=False)


# ---- what a path says


@pytest.mark.parametrize(
    "path, model, layer",
    [
        ("player_1/gemma-scope-2b-pt-res/layer_12/width_16k/l0", "gemma-2-2b", 12),
        ("layer_9/embedding/gemma-scope-2b-pt-res/layer_12/width_16k/l0", "gemma-2-2b", 12),
        ("embedding-study/gemma-scope-2b-pt-res/layer_12/width_16k/l0", "gemma-2-2b", 12),
        ("transcoders/gemma-scope-9b-it-res/layer_3/w/l0", "gemma-2-9b-it", 3),
        ("gemma-scope-2b-pt-transcoders/gemma-scope-9b-pt-res/layer_3/w/l0", "gemma-2-9b", 3),
        ("gemma-scope-9b-pt-res/x/gemma-scope-2b-pt-res-layer_4", "gemma-2-2b", 4),
        ("models--google--gemma-scope-2b-pt-res/snapshots/ab/layer_5/player_7/l0", "gemma-2-2b", 5),
    ],
)
def test_the_path_of_a_gemma_scope_sae(tmp_path, path, model, layer):
    "The nearest repository and the nearest layer count, and no folder above the repository."
    export_sae(SAE(SAEConfig(4, 8, "jumprelu")), tmp_path / path, "gemma-scope")
    assert from_pretrained(tmp_path / path).metadata == hook_point(model, layer)


@pytest.mark.parametrize(
    "path", ["embedding/layer_1/a/b", "embedding-study/w/l0", "player_1/gemma-scope-study/x/y"]
)
def test_a_path_that_says_nothing(tmp_path, path):
    export_sae(SAE(SAEConfig(4, 8, "jumprelu")), tmp_path / path, "gemma-scope")
    assert from_pretrained(tmp_path / path).metadata == {}


@pytest.mark.parametrize(
    "path, kind",
    [
        ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "embedding"),
        ("embedding/width_4k/average_l0_6", "embedding"),
        ("gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_6", "transcoders"),
    ],
)
def test_paths_of_what_reads_no_residual_stream(tmp_path, path, kind):
    export_sae(SAE(SAEConfig(4, 8, "jumprelu")), tmp_path / path, "gemma-scope")
    with pytest.raises(ValueError, match=f"belongs to the {kind} of Gemma Scope"):
        from_pretrained(tmp_path / path)


def test_a_card_shows_all_digits_of_a_count():
    card = model_card(SAE(SAEConfig(4, 8)), dict(l0=(8.0, 7.5, 8.5, 2_097_152)))
    assert "| 8.00 [7.50, 8.50] | 2097152 |" in card


@pytest.mark.parametrize("format", ["saelens", "dictionary-learning"])
@pytest.mark.parametrize("site", [*SITES, "attn.hook_z"])
def test_every_format_keeps_the_site(tmp_path, format, site):
    "A hook that cannot be read keeps its name, too."
    place = dict(model_name="m", hook_name=f"blocks.3.{site}")
    if site in SITES:
        place = hook_point("m", 3, site)
    export_sae(SAE(SAEConfig(4, 8), place), tmp_path / "sae", format)
    assert from_pretrained(tmp_path / "sae").metadata == place


def test_a_hub_that_cannot_list_files_costs_the_hint_alone(monkeypatch):
    def fail(self, repo, revision):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", fail)
    assert formats._sae_places("me/saes", None) == []
