"The whole path, small: every experiment in profile smoke, run twice; and the README's ten lines as a reader would type them."
import json, os, re, subprocess, sys
from pathlib import Path
import pytest
from atm_sae.report import SMOKE, read_summary
from atm_sae.reproduce import load_manifest

ROOT = Path(__file__).resolve().parent.parent


def reproduce(out, cache, *args):
    command = [sys.executable, '-c', 'import sys; from atm_sae.reproduce import main; sys.exit(main())', 'reproduce', '--profile', 'smoke', '--out', str(out), *args]
    env = {**os.environ, 'ATM_SAE_CACHE': str(cache), 'HF_HUB_OFFLINE': '1', 'PYTHONPATH': str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "Reports of profile smoke, made from nothing."
    folder = tmp_path_factory.mktemp('smoke')
    done = reproduce(folder/'reports', folder/'cache')
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def outputs(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for part in ('figures', 'tables') for p in sorted((folder/part).iterdir())}


def test_smoke_makes_every_declared_output(smoke):
    for item in load_manifest().experiments:
        for output in item.outputs: assert (smoke/'reports'/output).stat().st_size > 0, output
        record = json.loads((smoke/f'reports/provenance/{item.name}.json').read_text())
        assert set(record['outputs']) == set(item.outputs)
    page = (smoke/'reports/index.md').read_text()
    assert SMOKE in page and all(item.title in page for item in load_manifest().experiments)


def test_summaries_carry_l0_and_seeds(smoke):
    for name in ('absorption', 'reconstruction', 'probing', 'planted', 'dynamics', 'letters'):
        rows = read_summary(smoke/f'reports/tables/{name}-summary.csv')
        assert (rows.n == 2).all() and rows.l0.notna().all() and rows[['low', 'high']].notna().all().all(), name


def test_second_run_does_nothing_and_only_rebuilds_one(smoke):
    before = outputs(smoke/'reports')
    again = reproduce(smoke/'reports', smoke/'cache')
    assert again.returncode == 0 and again.stdout.count('up to date') >= len(load_manifest().experiments), again.stdout
    (smoke/'reports/figures/planted.png').unlink()
    only = reproduce(smoke/'reports', smoke/'cache', '--only', 'planted')
    assert only.returncode == 0 and 'absorption: running' not in only.stdout, only.stdout
    assert outputs(smoke/'reports') == before


def test_readme_lines_train_topk_and_atm(tmp_path):
    blocks = re.findall(r'```python\n(.*?)```', (ROOT/'README.md').read_text(), re.S)
    code = next(b for b in blocks if 'planted_metrics' in b)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'ATM_SAE_CACHE': str(tmp_path/'cache'), 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr
    printed = dict(re.findall(r'(topk|atm): absorption (\d\.\d+) at L0 \d', done.stdout))
    assert printed.keys() == {'topk', 'atm'} and all(0 <= float(v) <= 1 for v in printed.values()), done.stdout
