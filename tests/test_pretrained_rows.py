"Pretrained SAEs beside trained ones: as runs, in tables, and in an experiment's notebook."

import math
from pathlib import Path

import numpy as np
import pytest
from notebooks import execute_forked

from atm_sae.data.lm import hook_point, model_width
from atm_sae.sae.formats import export_sae
from atm_sae.train.runs import pretrained_runs
from atm_sae.report.manifest import opened_changes, opened_groups
from atm_sae.report.tables import difference_table, pretty, read_summary, score_runs, summary_table
from atm_sae.sae.sae import SAE, SAEConfig
from atm_sae.train.loop import History
from atm_sae.train.runs import Run

ROOT = Path(__file__).resolve().parent.parent


def folder(path, architecture="standard", layer=2, d_in=6):
    sae = SAE(
        SAEConfig(d_in, 12, architecture, k=3 if architecture == "topk" else None),
        hook_point("nano-gemma2", layer),
    )
    export_sae(sae, path, "gemma-scope" if architecture == "jumprelu" else "saelens")
    return str(path)


def test_runs(tmp_path):
    runs = pretrained_runs(
        [
            folder(tmp_path / "a/one"),
            folder(tmp_path / "b/one", "topk"),
            folder(tmp_path / "b/two", "jumprelu"),
        ],
        "nano-gemma2",
        2,
        6,
    )
    assert [r.spec.method for r in runs] == [
        "pretrained a/one",
        "pretrained b/one",
        "pretrained b/two",
    ]
    assert all(
        math.isnan(r.spec.seed)
        and math.isnan(r.spec.l0)
        and r.history.table.empty
        and not r.sae.W_dec.requires_grad
        for r in runs
    )
    assert pretrained_runs([], "nano-gemma2", 2, 6) == []


def test_a_row_of_another_place_is_refused(tmp_path):
    one = folder(tmp_path / "one")
    with pytest.raises(
        ValueError,
        match=r"one was trained on .*blocks.2.hook_resid_post.*and these tables are of .*blocks.1",
    ):
        pretrained_runs([one], "nano-gemma2", 1, 6)
    with pytest.raises(ValueError, match="one was trained on"):
        pretrained_runs([one], "google/gemma-2-2b", 2, 6)
    with pytest.raises(ValueError, match="width 6, and nano-gemma2 at layer 2 has width 7"):
        pretrained_runs([one], "nano-gemma2", 2, 7)
    with pytest.raises(ValueError, match="given twice"):
        pretrained_runs([one, one], "nano-gemma2", 2, 6)
    with pytest.raises(FileNotFoundError):
        pretrained_runs([str(tmp_path / "none")], "nano-gemma2", 2, 6)


def test_tables_show_it_with_n_1_and_compare_only_what_was_trained(tmp_path):
    trained = [
        Run(type("Spec", (), dict(method=m, l0=8, seed=s))(), None, History(), None)
        for m in ("atm", "topk")
        for s in (0, 1)
    ]
    runs = trained + pretrained_runs([folder(tmp_path / "mine")], "nano-gemma2", 2, 6)
    values = iter([0.1, 0.2, 0.3, 0.5, 0.7])
    rows = score_runs(
        lambda run: dict(score=next(values), l0=8.0 if run.sae is None else 40.0),
        runs,
        "nano",
        workers=1,
        progress=False,
    )
    summary = summary_table(rows, ["score"])
    line = summary.set_index("method").loc["pretrained mine"]
    assert (line["mean"], line.n, line.l0) == (0.7, 1, 40) and np.isnan(
        [line.low, line.high, line.sparsity, line.l0_low]
    ).all()
    assert pretty(summary).set_index("method").loc["pretrained mine", "score"] == "0.700 (n = 1)"
    differences = difference_table(rows.dropna(subset="seed"), ["score"])
    assert differences.method.tolist() == ["atm - topk"] and differences["mean"][
        0
    ] == pytest.approx(-0.25)


SMALL = dict(methods=["atm", "topk"], seeds=[0, 1], steps=4, d_sae=32, n_tokens=8000)


def test_in_the_notebook(tmp_path, shared_cache, monkeypatch):
    monkeypatch.setenv("ATM_SAE_CACHE", str(shared_cache))
    d_in = model_width("nano-gemma2")
    sources = [
        folder(tmp_path / "theirs", "topk", d_in=d_in),
        folder(tmp_path / "gemma-scope", "jumprelu", d_in=d_in),
    ]
    parameters = SMALL | dict(out=str(tmp_path / "out"), spliced_tokens=512, pretrained=sources)
    notebook = ROOT / "nbs/experiments/20_reconstruction.ipynb"
    execute_forked(notebook, parameters, tmp_path / "done.ipynb", "")
    summary = read_summary(tmp_path / "out/tables/reconstruction-summary.csv")
    found = summary[summary.metric == "explained_variance"].set_index("method")
    assert {"atm", "topk", "pretrained theirs", "pretrained gemma-scope"} <= set(found.index)
    assert (
        found.n["pretrained theirs"] == 1
        and found.l0["pretrained theirs"] <= 3
        and np.isnan(found.low["pretrained theirs"])
        and found.n["atm"] == 2
    )
    drawn = (tmp_path / "out/figures/reconstruction.csv").read_text()
    assert "pretrained theirs" in drawn and "pretrained gemma-scope" in drawn
    assert "| pretrained theirs | – |" in (tmp_path / "out/tables/reconstruction.md").read_text()


def test_a_report_knows_the_files_of_a_pretrained_sae(tmp_path, monkeypatch):
    "Other weights below the same name make the report stale; nothing else does."
    monkeypatch.setenv("ATM_SAE_OPENED", str(tmp_path / "opened"))
    sae = folder(tmp_path / "one")
    pretrained_runs([sae], "nano-gemma2", 2, 6)
    groups = opened_groups(tmp_path / "opened")
    assert [group["kind"] for group in groups] == ["pretrained"] and opened_changes(groups) == []
    (Path(sae) / "README.md").write_text("a description")
    assert opened_changes(groups) == []
    weights = Path(sae) / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert opened_changes(groups) == ["pretrained (sae)"]
