"The whole path, small: every experiment in profile smoke, run twice; and the README's ten lines as a reader would type them."

import json, os, re, subprocess, sys
from pathlib import Path
from atm_sae.report.figures import SMOKE
from atm_sae.report.tables import read_summary
from atm_sae.report.manifest import load_manifest

ROOT = Path(__file__).resolve().parent.parent


def reproduce(out, cache, *args):
    command = [
        sys.executable,
        "-c",
        "import sys; from atm_sae.cli import main; sys.exit(main())",
        "reproduce",
        "--profile",
        "smoke",
        "--out",
        str(out),
        *args,
    ]
    env = {
        **os.environ,
        "ATM_SAE_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def outputs(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for part in ("figures", "tables")
        for p in sorted((folder / part).iterdir())
    }


def every_declared_output_is_there(smoke):
    for item in load_manifest().experiments:
        for output in item.outputs:
            assert (smoke / "reports" / output).stat().st_size > 0, output
        record = json.loads((smoke / f"reports/provenance/{item.name}.json").read_text())
        assert set(record["outputs"]) == {*item.outputs, f"notebooks/{item.name}.ipynb"}
    page = (smoke / "reports/index.md").read_text()
    assert SMOKE in page and all(item.title in page for item in load_manifest().experiments)


def summaries_carry_l0_and_seeds(smoke):
    for name, metric in {
        "absorption": "mean_full_absorption_score",
        "reconstruction": "explained_variance",
        "probing": "sae_top_1_test_accuracy",
        "planted": "absorption",
    }.items():
        rows = read_summary(smoke / f"reports/tables/{name}-summary.csv")
        rows = rows[(rows.metric == metric) & ~rows.method.str.contains(" - ")]
        assert {"atm", "topk", "random"} <= set(rows.method) and (rows.n == 2).all(), name
        assert rows[["mean", "low", "high", "l0", "l0_low", "l0_high"]].notna().all().all(), name


def second_run_does_nothing_and_only_rebuilds_one(smoke):
    before = outputs(smoke / "reports")
    again = reproduce(smoke / "reports", smoke / "cache")
    assert (
        again.returncode == 0 and f"{len(load_manifest().experiments)} up to date" in again.stdout
    ), again.stdout
    (smoke / "reports/figures/planted.png").unlink()
    only = reproduce(smoke / "reports", smoke / "cache", "--only", "planted")
    assert only.returncode == 0 and "absorption: running" not in only.stdout, only.stdout
    assert outputs(smoke / "reports") == before


def test_the_whole_smoke_profile(
    tmp_path,
):  # one test, for all its parts look at the same run, made from nothing
    done = reproduce(tmp_path / "reports", tmp_path / "cache")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for check in (
        every_declared_output_is_there,
        summaries_carry_l0_and_seeds,
        second_run_does_nothing_and_only_rebuilds_one,
    ):
        check(tmp_path)


def test_readme_lines_train_topk_and_atm(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    code = next(b for b in blocks if "planted_metrics" in b)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "ATM_SAE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    printed = dict(re.findall(r"(topk|atm): absorption (\d\.\d+) at L0 \d", done.stdout))
    assert printed.keys() == {"topk", "atm"} and all(
        0 <= float(v) <= 1 for v in printed.values()
    ), done.stdout
