"""The profiles for Gemma-2-2b are planned without its weights: shape, runs, estimate, refusals."""

import pytest

from atm_sae.cli import main
from atm_sae.report import estimate
from atm_sae.report.estimate import SHAPES, estimate_runs, lm_shape, needed_runs, step_seconds
from atm_sae.report.manifest import load_manifest


@pytest.fixture
def costs(monkeypatch):
    "A step takes 2 s with a mask and 1 s without one, a parameter of the model 1 us a token."

    def seconds(method, *size):
        return dict(atm=2.0).get(method, 1.0)

    monkeypatch.setattr(estimate, "step_seconds", seconds)
    monkeypatch.setattr(estimate, "token_seconds", lambda *size: 1e-6)


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
    assert [*size.values()] == ["google/gemma-2-2b", 12, 16384, 2048, 2441, 5_700_000]
    names = ("absorption", "density", "importance")
    p, dense, controlled = (m.pick(name).resolved("gemma") for name in names)
    further = set(dense["targets"]) - set(p["targets"])
    methods = {*p["methods"], *controlled["methods"]}
    shared = len(methods) * len(p["targets"]) * len(p["seeds"])
    assert len(runs) == shared + len(dense["methods"]) * len(further) * len(dense["seeds"])


def test_runs_of_several_lengths_and_sizes():
    "One of the points is that of the object `absorption`, whose SAEs are used again."
    m = load_manifest()
    shared, own = (m.pick(name).resolved("full") for name in ("absorption", "scale"))
    assert all(own[name] == shared[name] for name in ("activations", "tuned", "n_tokens"))
    ((size, compared),) = needed_runs([shared])
    found = {(size["steps"], size["d_sae"]): runs for size, runs in needed_runs([own])}
    longer = {(steps, 2048) for steps in (610, 2441, 4882, 14648)}
    assert set(found) == longer | {(2441, d_sae) for d_sae in (4096, 8192, 16384)}
    assert {len(runs) for runs in found.values()} == {6} and found[2441, 2048] < compared
    assert needed_runs([shared, own])[0] == (size, compared)


def test_estimate_by_hand(costs):
    size = dict(model="google/gemma-2-2b", layer=12, d_sae=16384, batch_size=2048)
    size |= dict(steps=1000, n_tokens=10**6)
    runs = [("atm", 40, 0), ("atm", 40, 1), ("topk", 40, 0), ("random", 40, 0)]
    found = estimate_runs(size, runs, data=dict(dtype="bfloat16", lm_dtype="bfloat16"))
    parameters = 2 * 2304 * 16384
    assert found.lm_seconds == pytest.approx(13) and found.runs == 4
    assert found.sae_seconds == dict(atm=4000, topk=1000)
    assert found.disk_bytes == 10**6 * 2304 * 2 + 4 * 4 * parameters
    memory = 2 * 2.614e9 + 16 * parameters + 24 * 2048 * 16384
    assert found.memory_bytes == pytest.approx(memory, rel=1e-3)
    assert "buffer: 0" not in str(found)


def test_a_method_with_a_frozen_weight_is_measured_by_itself(costs, monkeypatch):
    measured = []
    monkeypatch.setattr(
        "atm_sae.report.estimate.step_seconds", lambda method, *_: measured.append(method) or 1.0
    )
    size = dict(model="nano-gemma2", layer=2, d_sae=64, batch_size=8, steps=5, n_tokens=10)
    estimate_runs(size, [(m, 4, 0) for m in ("topk", "frozen decoder", "frozen encoder")])
    assert measured == ["topk", "frozen decoder", "frozen encoder"]


def test_estimate_of_a_stream_by_hand(costs):
    "One pass over the text for all runs of a seed, and a buffer in memory in place of a cache."
    size = dict(model="google/gemma-2-2b", layer=12, d_sae=16384, batch_size=2048)
    size |= dict(steps=1000, n_tokens=10**6)
    runs = [("topk", 40, 0), ("topk", 80, 0)]
    more = [*runs, ("atm", 40, 0), ("dropout", 40, 0), ("random", 40, 3)]  # a pass for the control
    two = estimate_runs(size, more, data=dict(dtype="bfloat16", buffer=1000))
    assert two.lm_seconds == pytest.approx(2 * (1000 * 2048 + 1000) * 13e-6)
    stored = estimate_runs(size, runs, data=dict(dtype="bfloat16", lm_dtype="bfloat16"))
    stream = estimate_runs(size, runs, data=dict(dtype="bfloat16", buffer=1000))
    assert stream.lm_seconds == pytest.approx((1000 * 2048 + 1000) * 13e-6)
    assert stream.stored == (pytest.approx(13), 10**6 * 2304 * 2)
    assert "with buffer: 0 it runs once: 13 s for the activations, 4.6 GB more disk" in str(stream)
    assert stream.disk_bytes == 2 * 4 * 2 * 2304 * 16384
    more = 2 * 2.614e9 + 1000 * 2304 * 2  # the model in 4 bytes instead of 2, and the buffer
    assert stream.memory_bytes - stored.memory_bytes == pytest.approx(more, rel=1e-3)


def test_wider_dictionaries_take_longer():
    narrow, wide = (
        min(step_seconds("topk", 64, d_sae, 8, 256) for _ in range(2)) for d_sae in (128, 8192)
    )
    assert wide > narrow


def planned(out, *args):
    "Exit status of the command for the profile gemma."
    return main(["reproduce", "--profile", "gemma", "--out", str(out), *args])


def test_a_plan_without_weights(costs, cache, tmp_path, capsys):
    assert planned(tmp_path / "out", "--dry-run") == 0
    said = capsys.readouterr().out
    for part in (
        "needs: a GPU, access to google/gemma-2-2b",
        "estimate: ",
        "for the activations of 5,700,000 tokens",
        "GB of memory",
        "GB of disk",
        "absorption: would run (never run)",
    ):
        assert part in said, said
    assert not (tmp_path / "out").exists()


def test_without_access_the_run_says_what_to_do(costs, cache, tmp_path, capsys):
    assert planned(tmp_path / "out", "--only", "absorption") == 1
    said = capsys.readouterr().out
    why = "google/gemma-2-2b is not in the local Hub cache and the Hub cannot be reached"
    assert why in said, said
