"The runner: what it refuses, what it runs again, what it leaves behind. Most tests replace the kernel by a fast stand-in."
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import pytest

from atm_sae import reproduce as R
from atm_sae.core import file_sha256, read_json
from atm_sae.reproduce import ManifestError, RunError, load_manifest, main, published_verdicts, read_parameters, reproduce, run_order, tidy_notebook

DECLARED = '''
profile: str = "smoke"  # size of the run
out: str = ""           # where to write
steps: int = 2          # how far to count
rate: float = 0.5
'''
COUNT = '''
from pathlib import Path
head = "world,method,sparsity,metric,mean,low,high,n,l0,l0_low,l0_high"
Path(out, "tables/count-summary.csv").write_text(f"{head}\\nw,topk,8,total,{sum(range(steps + 1))},5.5,6.5,3,8,8,8\\nw,atm - topk,8,total,-2,-3,-1,3,8,8,8\\n");
'''
DOUBLE = '''
from pathlib import Path
text = Path(out, "tables/count-summary.csv").read_text()
Path(out, "tables/double.md").write_text(f"{len(text)} characters\\n");
'''
MANIFEST = '''
profiles:
  smoke: {description: toy, budget: seconds}
  default: {description: toy, budget: seconds, needs: patience}
shared: &all {steps: 3}
objects:
  - name: double
    title: Doubling
    notebook: 20_double.ipynb
    outputs: [tables/double.md]
    after: [count]
  - name: count
    title: Counting
    notebook: 10_count.ipynb
    parameters: {common: *all, default: {rate: 1}}
    outputs: [tables/count-summary.csv]
    published: [{method: topk, metric: total, value: 6, l0: 8, source: a book, confidence: primary}]
    tolerance: {total: 0.5}
    not_comparable: {default: because}
    claims: [{text: less, difference: atm - topk, metric: total, expect: lower}]
'''


def notebook(path, *code, parameters=DECLARED, tags=(['parameters'],)):
    cells = [nbformat.v4.new_code_cell(parameters.strip(), metadata={'tags': t}) for t in tags]
    cells += [nbformat.v4.new_code_cell(textwrap.dedent(c).strip()) for c in code]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell('# Toy'), *cells])
    for i, cell in enumerate(nb.cells): cell['id'] = f'c{i}'
    nbformat.write(nb, path)


class Toy:
    "A small project in a temporary folder."
    def __init__(self, folder):
        self.folder, self.path, self.out = folder, folder/'exp'/'manifest.yaml', folder/'reports'
        self.path.parent.mkdir()
        self.write(MANIFEST)
        notebook(self.path.parent/'10_count.ipynb', COUNT)
        notebook(self.path.parent/'20_double.ipynb', DOUBLE)

    def write(self, text): self.path.write_text(text)
    def replace(self, old, new):
        assert old in self.path.read_text()
        self.write(self.path.read_text().replace(old, new))
    def run(self, **more):
        lines = []
        done = reproduce(**{'profile': 'smoke', 'out': self.out, 'manifest': self.path, 'say': lines.append} | more)
        return {n: s.state for n, s in done.items()}, '\n'.join(lines)
    def cli(self, *args):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(['reproduce', '--profile', 'smoke', '--out', str(self.out), '--manifest', str(self.path), *args])
        return code, out.getvalue(), err.getvalue()
    def error(self):
        with pytest.raises(ManifestError) as e: load_manifest(self.path)
        return str(e.value)
    def hashes(self, *but): return {p.relative_to(self.out).as_posix(): file_sha256(p) for p in self.out.rglob('*') if p.is_file() and p.parent.name not in but}


def stand_in(path, parameters, target, label):
    "Executes the cells in this process, as papermill would in a kernel."
    nb, space = nbformat.read(path, as_version=4), {}
    for cell in [c for c in nb.cells if c.cell_type == 'code']:
        try: exec(cell.source, space)
        except Exception as e:
            nbformat.write(nb, target)
            raise RunError(f'{type(e).__name__}: {e}') from None
        if 'parameters' in cell.metadata.get('tags', []): space.update(parameters)
    return nb


@pytest.fixture
def real(tmp_path, monkeypatch):
    monkeypatch.setenv('ATM_SAE_CACHE', str(tmp_path/'cache'))
    return Toy(tmp_path)


@pytest.fixture
def toy(real, monkeypatch):
    monkeypatch.setattr(R, '_execute', stand_in)
    return real


FRESH, DONE = {'count': 'ok', 'double': 'ok'}, {'count': 'up to date', 'double': 'up to date'}


# ---- what runs, and what runs again

def test_order_follows_after_and_a_second_run_does_nothing(toy):
    states, lines = toy.run()
    assert list(states.items()) == list(FRESH.items()) and '[1/2] count: running 10_count.ipynb (never run)' in lines
    before = toy.hashes()
    assert toy.run()[0] == DONE and toy.hashes() == before
    assert set(before) == {'index.md', 'tables/count-summary.csv', 'tables/double.md', 'notebooks/count.ipynb', 'notebooks/double.ipynb',
                           'provenance/count.json', 'provenance/double.json'}


def test_changed_parameter(toy):
    toy.run()
    toy.replace('steps: 3', 'steps: 4')
    states, lines = toy.run()
    assert states == FRESH and 'count: running 10_count.ipynb (changed: parameters)' in lines and 'double: running 20_double.ipynb (changed: inputs)' in lines


def test_changed_code_but_not_prose(toy):
    toy.run()
    path = toy.path.parent/'20_double.ipynb'
    text = path.read_text()
    path.write_text(text.replace('# Toy', '# Another toy'))
    assert toy.run()[0] == DONE
    path.write_text(text.replace('characters', 'letters'))
    assert toy.run()[0] == {'count': 'up to date', 'double': 'ok'} and toy.run(force=True)[0] == FRESH


def test_changed_published_value_matters_to_notebooks_that_read_it(toy):
    notebook(toy.path.parent/'20_double.ipynb', DOUBLE, '# load_manifest')
    toy.run()
    toy.replace('value: 6', 'value: 7')
    assert toy.run()[0] == {'count': 'up to date', 'double': 'ok'} and 'differs' in (toy.out/'index.md').read_text()


def test_changed_library(toy, monkeypatch):
    toy.run()
    monkeypatch.setattr(R, '_library_hash', lambda: 'other')
    assert 'count: would run (changed: library)' in toy.run(dry_run=True)[1]


@pytest.mark.parametrize('harm', [lambda p: p.unlink(), lambda p: p.write_text('changed')])
@pytest.mark.parametrize('name', ['tables/double.md', 'notebooks/double.ipynb', 'provenance/double.json'])
def test_harmed_output(toy, harm, name):
    toy.run()
    good = toy.hashes('provenance')
    harm(toy.out/name)
    assert toy.run()[0] == {'count': 'up to date', 'double': 'ok'} and toy.hashes('provenance').keys() == good.keys()
    assert {k: v for k, v in toy.hashes('provenance').items() if k != 'index.md'} == {k: v for k, v in good.items() if k != 'index.md'}


def test_only(toy):
    states, lines = toy.run(only=['double'])
    assert states == {'double': 'skipped'} and 'it needs count, which is not up to date' in lines
    assert toy.run(only=['10_count'])[0] == {'count': 'ok'} and toy.run(only=['double'])[0] == {'double': 'ok'}
    with pytest.raises(ManifestError, match="no object 'triple' in the manifest; it has double, count"): toy.run(only=['triple'])


def test_dry_run_touches_nothing(toy):
    states, lines = toy.run(dry_run=True, profile='default')
    assert states == {'count': 'would run', 'double': 'would run'} and not toy.out.exists() and 'needs: patience' in lines
    toy.run(only=['count'])
    (toy.out/'tables/count-summary.csv').unlink()
    toy.run(only=['count'])
    assert 'count: up to date' in toy.run(dry_run=True)[1]


def test_objects_of_other_profiles(toy):
    toy.replace('{common: *all, default: {rate: 1}}', '{default: {rate: 1}}\n    profiles: [default]')
    notebook(toy.path.parent/'20_double.ipynb', 'from pathlib import Path', 'Path(out, "tables/double.md").write_text("x");')
    assert toy.run()[0] == {'double': 'ok'} and 'Counting' not in (toy.out/'index.md').read_text()
    with pytest.raises(ManifestError, match="count: not part of profile 'smoke'"): toy.run(only=['count'])


def test_outputs_no_longer_declared_are_removed(toy):
    toy.run()
    toy.replace('tables/double.md', 'tables/twice.md')
    notebook(toy.path.parent/'20_double.ipynb', DOUBLE.replace('double', 'twice'))
    toy.run()
    assert (toy.out/'tables/twice.md').is_file() and not (toy.out/'tables/double.md').exists()


# ---- what goes wrong while running

def test_failure_keeps_old_outputs_and_skips_what_follows(toy):
    toy.run()
    old = toy.hashes()
    notebook(toy.path.parent/'10_count.ipynb', COUNT, 'raise KeyError("deliberate")')
    states, lines = toy.run()
    assert states == {'count': 'FAILED', 'double': 'skipped'} and 'deliberate' in lines and 'it needs count, which failed' in lines
    kept = toy.folder/'cache'/'reproduce'
    assert [p.name for p in kept.rglob('*.ipynb')] == ['count.ipynb'] and str(next(kept.rglob('*.ipynb'))) in lines
    new = toy.hashes()
    assert {k: v for k, v in new.items() if k != 'index.md'} == {k: v for k, v in old.items() if k != 'index.md'}
    assert 'Older than its sources* (changed: notebook)' in (toy.out/'index.md').read_text()
    assert toy.cli()[0] == 1


@pytest.mark.parametrize('code, message', [
    ('None', 'did not write tables/double.md'), ('open(out + "/tables/double.md", "w")', 'empty tables/double.md'),
    (DOUBLE + '\nPath(out, "tables/more.csv").write_text("x")', 'wrote tables/more.csv, which the manifest does not declare'),
    (DOUBLE + '\nPath(out, "tables/count-summary.csv").write_text("x")', 'changed tables/count-summary.csv, which belongs to another object')])
def test_outputs_must_be_as_declared(toy, code, message):
    notebook(toy.path.parent/'20_double.ipynb', code)
    states, lines = toy.run()
    assert states == {'count': 'ok', 'double': 'FAILED'} and message in lines and not (toy.out/'tables/double.md').exists()


def test_out_folder_that_cannot_be_written(toy):
    toy.out.write_text('a file')
    code, _, err = toy.cli()
    assert code == 2 and 'cannot write' in err and 'What to do' in err
    toy.out.unlink()
    toy.out.mkdir(mode=0o500)
    if os.geteuid(): assert toy.cli()[0] == 2


def test_full_disk_while_publishing(toy, monkeypatch):
    toy.run()
    old = toy.hashes()
    toy.replace('steps: 3', 'steps: 4')
    copy = R.shutil.copyfile
    def full(source, target):
        if 'notebooks' in str(target): raise OSError(28, 'No space left on device')
        return copy(source, target)
    monkeypatch.setattr(R.shutil, 'copyfile', full)
    states, lines = toy.run()
    assert states['count'] == 'FAILED' and 'disk is full' in lines
    assert {k: v for k, v in toy.hashes().items() if k != 'index.md'} == {k: v for k, v in old.items() if k != 'index.md'}


def test_killed_while_publishing_counts_as_stale(toy, monkeypatch):
    toy.run()
    toy.replace('steps: 3', 'steps: 4')
    monkeypatch.setattr(R, 'write_json', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    assert toy.cli()[0] == 130
    monkeypatch.undo()
    monkeypatch.setattr(R, '_execute', stand_in)
    monkeypatch.setenv('ATM_SAE_CACHE', str(toy.folder/'cache'))
    toy.replace('steps: 4', 'steps: 3')
    states, lines = toy.run()
    assert states['count'] == 'ok' and 'not as it was written: ' in lines


def test_two_runs_into_one_folder(toy):
    with R._alone(toy.out, 'smoke'):
        code, _, err = toy.cli()
    assert code == 2 and 'another run is writing' in err


# ---- the manifest

@pytest.mark.parametrize('old, new, message', [
    ('steps: 3', 'stepps: 3', "declares no parameter 'stepps'; it has profile, out, steps, rate"),
    ('steps: 3', 'steps: 3.5', 'steps must be int, got 3.5'), ('rate: 1', 'rate: 2e-4', "rate must be float, got '2e-4'"),
    ('steps: 3', 'out: x', '`out` is set by the runner'), ('default: {rate: 1}', 'huge: {rate: 1}', "unknown profile 'huge' in parameters; the manifest has smoke, default"),
    ('{default: because}', '{huge: because}', "unknown profile 'huge' in not_comparable"), ('name: double', 'name: count', "the name 'count' is used twice"),
    ('tables/double.md', 'tables/count-summary.csv', "the output 'tables/count-summary.csv' is declared twice"),
    ('title: Doubling', 'titel: Doubling', "unknown key 'titel'"), ('title: Doubling', 'about: nothing', 'no `title`'),
    ('20_double.ipynb', '21_double.ipynb', 'no notebook 21_double.ipynb'), ('tables/double.md', '../x.md', "output '../x.md' must lie in figures/ or tables/"),
    ('after: [count]', 'after: [counts]', "after: no object 'counts'"), ('after: [count]', 'after: [count]\n    profiles: [huge]', "unknown profile 'huge' in profiles"), ('after: [count]', 'after: count', '`after` must be a list'),
    ('tolerance: {total: 0.5}', '', "no tolerance for the published metric 'total'"), ('method: topk', 'method: topq', "unknown method 'topq'"),
    ('value: 6', 'value: six', "published value 'six' is not a number"), ('value: 6', 'valu: 6', "unknown key 'valu'"),
    ('expect: lower', 'expect: less', "expects 'lower' or 'higher'"), ('[tables/count-summary.csv]', '[tables/count.csv]', 'read from tables/count-summary.csv'),
    ('budget: seconds}', 'cost: 1}', "profile smoke: unknown key 'cost'"), ('title: Doubling', 'title: Doubling\n    title: Again', "doubled key 'title'"),
    ('objects:', 'objects: [', 'not valid YAML'), ('name: double', 'name: Double it', 'may hold a-z'), ('outputs: [tables/double.md]', 'outputs: []', 'no outputs')])
def test_manifest_errors(toy, old, new, message):
    toy.replace(old, new)
    assert message in toy.error() and toy.cli('--list')[0] == 2


def test_all_problems_at_once(toy):
    toy.replace('steps: 3', 'stepps: 3')
    toy.replace('title: Doubling', 'titel: Doubling')
    assert toy.error().startswith('manifest.yaml: 3 problems') and 'stepps' in toy.error()


def test_circle(toy):
    toy.replace('name: count\n', 'name: count\n    after: [double]\n')
    assert 'double, count' in toy.error()


@pytest.mark.parametrize('more, message', [
    (dict(tags=()), 'no cell has the tag `parameters`'), (dict(tags=(['parameters'], ['parameters'])), '2 cells have the tag'),
    (dict(tags=(['parametres'],)), 'no cell has'), (dict(parameters='profile: str = "smoke"'), 'does not declare `out: str`'),
    (dict(parameters=DECLARED + 'k = 3'), '`k = 3` is not of the form'), (dict(parameters=DECLARED + 'k: int = steps'), '`k: int = steps` is not of the form'),
    (dict(parameters=DECLARED + 'k: list = [\n1]'), 'line 5'), (dict(parameters=DECLARED + 'steps: int = 3'), "'steps' is declared twice"),
    (dict(parameters=DECLARED + 'k: int = = 3'), 'is not Python')])
def test_notebook_errors(toy, more, message):
    notebook(toy.path.parent/'20_double.ipynb', DOUBLE, **more)
    assert message in toy.error() and '20_double.ipynb' in toy.error()


def test_unreadable_notebook(toy):
    (toy.path.parent/'20_double.ipynb').write_text('{')
    assert 'cannot be read as a notebook' in toy.error()


def test_read_parameters(toy):
    p = read_parameters(nbformat.read(toy.path.parent/'10_count.ipynb', 4), 'x')
    assert p['steps'] == R.Parameter('steps', 'int', 2, 'how far to count') and p['rate'].help == ''


def test_types():
    assert R._fits(None, 'int | None') and R._fits(1, 'float') and R._fits([1], 'list[int]') and R._fits(object(), 'Odd')
    assert not R._fits(True, 'int') and not R._fits('1', 'int') and not R._fits(None, 'int')


def test_braces(): assert R._expand('a/{x,y}.{p, q}') == ['a/x.p', 'a/x.q', 'a/y.p', 'a/y.q']


# ---- pages and command line

def test_landing_page(toy):
    toy.run()
    page = (toy.out/'index.md').read_text()
    assert '| [Counting](#counting) | 1 reproduced | 1 holds |' in page and 'SMOKE: not a result' in page
    assert '| TopK | total | 6 | 8.00 | a book (primary) | 6.00 [5.50, 6.50] | 8.00 | 0.00 | 0.500 | **reproduced**: at the published L0 |' in page
    assert '| less | w | 8.00 [8.00, 8.00] | -2.0 [-3.0, -1.0] | 3 | holds |' in page and '`steps = 3`, `rate = 0.5`' in page and 'characters' in page
    assert str(toy.folder) not in page
    toy.run(profile='default', out=toy.folder/'d')
    assert '**not comparable**: because' in (toy.folder/'d'/'index.md').read_text() and 'SMOKE' not in (toy.folder/'d'/'index.md').read_text()


def test_landing_page_survives_a_broken_summary(toy):
    toy.run()
    (toy.out/'tables/count-summary.csv').write_text('a,b')
    notebook(toy.path.parent/'10_count.ipynb', '1/0')
    assert toy.run()[0] == {'count': 'FAILED', 'double': 'skipped'}
    assert 'Older than its sources' in (toy.out/'index.md').read_text()


def test_list_and_summary(toy):
    code, out, _ = toy.cli('--list')
    assert code == 0 and 'count   Counting  [never run]' in out and not toy.out.exists()
    code, out, _ = toy.cli()
    assert code == 0 and '2 objects: 2 ok' in out and f'results: {toy.out/"index.md"}' in out
    assert 'count   Counting  [up to date, took 0:0' in toy.cli('--list')[1]
    assert toy.cli('--force', '--only', 'count')[1].count(' ok in ') == 1


def test_unknown_profile(toy):
    for more in ([], ['--list']):
        code, _, err = toy.cli('--profile', 'huge', *more)
        assert code == 2 and "unknown profile 'huge'; the manifest has smoke, default" in err


def test_manifest_that_is_not_there(tmp_path):
    with pytest.raises(ManifestError, match='no manifest .*pass --manifest'): load_manifest(tmp_path/'none.yaml')


def test_tidy_notebook(tmp_path):
    out = nbformat.v4.new_output
    cell = nbformat.v4.new_code_cell(f"out = {str(tmp_path)!r}\nsteps = 3", metadata={'tags': ['injected-parameters'], 'papermill': {'duration': 1}}, outputs=[
        out('stream', name='stderr', text='100%'), out('display_data', data={'application/vnd.jupyter.widget-view+json': {}}), out('stream', name='stdout', text=f'{tmp_path}/tables, {sys.prefix}/lib, <A at 0x7f0123456789>')])
    last = nbformat.v4.new_code_cell('', metadata={'tags': ['epilogue']}, outputs=[out('stream', name='stdout', text='{"memory_mib": 7}')])
    nb, peak = tidy_notebook(nbformat.v4.new_notebook(cells=[cell, last], metadata={'papermill': {}}), tmp_path)
    assert peak == {'memory_mib': 7} and len(nb.cells) == 1 and nb.metadata == {}
    assert nb.cells[0].source == 'out = ""\nsteps = 3' and nb.cells[0].metadata == {'tags': ['injected-parameters']}
    assert [o.get('text') for o in nb.cells[0].outputs] == ['/tables, python/lib, <A>']


# ---- with real kernels

def test_real_kernel_is_this_python(real, monkeypatch):
    "Even where the user has another kernel called python3, and a plotting back end that needs a screen."
    spec = real.folder/'jupyter'/'kernels'/'python3'
    spec.mkdir(parents=True)
    (spec/'kernel.json').write_text(json.dumps({'argv': ['/nowhere/python', '-f', '{connection_file}'], 'display_name': 'other', 'language': 'python'}))
    monkeypatch.setenv('JUPYTER_PATH', str(real.folder/'jupyter'))
    monkeypatch.setenv('MPLBACKEND', 'TkAgg')
    monkeypatch.setenv('HERE', f'{sys.executable} {real.path.parent}')
    notebook(real.path.parent/'10_count.ipynb', COUNT, '''
        import os, sys
        assert f"{sys.executable} {Path.cwd()}" == os.environ["HERE"] and os.environ["MPLBACKEND"] != "TkAgg"
        print(out, profile, steps, "warning", sys.path[0]); print("noise", file=sys.stderr)''')
    states, lines = real.run(only=['count'])
    assert states == {'count': 'ok'}, lines
    nb = nbformat.read(real.out/'notebooks/count.ipynb', 4)
    text = (real.out/'notebooks/count.ipynb').read_text()
    assert str(real.folder) not in text and ' smoke 3 ' in text and 'noise\\n' not in text and 'papermill' not in nb.metadata
    injected = next(c for c in nb.cells if 'injected-parameters' in c.metadata.get('tags', []))
    assert 'out = ""' in injected.source and 'steps = 3' in injected.source
    record = read_json(real.out/'provenance/count.json')
    assert record['peak']['memory_mib'] > 10 and record['seconds'] > 0 and record['parameters'] == {'steps': 3, 'rate': .5} and record['command'].endswith('--only count')
    assert str(real.folder) not in json.dumps(record) and record['outputs']['tables/count-summary.csv'] == file_sha256(real.out/'tables/count-summary.csv')
    assert published_verdicts(load_manifest(real.path).pick('count'), 'smoke', real.out).verdict[0] == 'reproduced'


def test_real_failure_names_cell_and_error(real):
    notebook(real.path.parent/'10_count.ipynb', COUNT, 'steps/0')
    code, out, _ = real.cli('--only', 'count')
    assert code == 1 and 'ZeroDivisionError: division by zero\n    line 1: steps/0' in out and 'failed/count.ipynb' in out and not (real.out/'tables').exists()


@pytest.mark.skipif(sys.platform == 'win32', reason='signals')
def test_killed_then_resumed_gives_the_same_bytes(real, monkeypatch):
    "Terminated, interrupted and killed outright, in three runs one after the other (kernels that start at once race for ports); then resumed."
    notebook(real.path.parent/'10_count.ipynb', COUNT, """
        import os, time
        if "GO" not in os.environ:
            Path(out, "pid").write_text(str(os.getpid()))
            time.sleep(300)""")
    # a job in the background inherits SIGINT as ignored; a user's terminal does not
    source = 'import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from atm_sae.reproduce import main; sys.exit(main())'
    command = [sys.executable, '-c', source, 'reproduce', '--profile', 'smoke', '--only', 'count', '--manifest', str(real.path), '--out']
    runs = {how: real.folder/how.name for how in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)}
    environment = os.environ | {'PYTHONPATH': str(Path(R.__file__).parent.parent)}
    for how, out in runs.items():
        process = subprocess.Popen([*command, str(out)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
        pid = R._scratch(out, 'smoke', 'count')/'out'/'pid'
        until(lambda: pid.is_file() and pid.read_text())
        kernel = int(pid.read_text())
        process.send_signal(how)
        _, err = process.communicate(timeout=150)
        assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[how], err
        until(lambda: not alive(kernel))
        assert not [p for p in runs[how].rglob('*') if p.is_file() and p.name != 'index.md']
    monkeypatch.setenv('GO', '1')
    results = []
    for out in (runs[signal.SIGKILL], real.out):
        real.out = out
        assert real.run(only=['count'])[0] == {'count': 'ok'}
        results.append({k: v for k, v in real.hashes('provenance').items() if k != 'index.md'})
    assert results[0] == results[1]


def alive(pid):
    "True if the process exists and is not a zombie."
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError: return False


def until(condition, seconds=150):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited too long'
        time.sleep(.1)


# ---- the project's own manifest

def test_the_real_manifest_fits_the_real_notebooks():
    path = R.project_root()/'nbs'/'experiments'/'manifest.yaml'
    if not list(path.parent.glob('*.ipynb')): pytest.skip('no experiment notebooks yet')
    manifest = load_manifest(path)
    assert set(manifest.profiles) == {'smoke', 'default', 'full', 'gemma'}
    assert {e.notebook for e in manifest.experiments} == {p.name for p in path.parent.glob('*.ipynb')}


def test_the_real_manifest_is_well_formed_and_holds_the_published_values():
    path = R.project_root()/'nbs'/'experiments'/'manifest.yaml'
    experiments, wrong = R._check_manifest(R._load_yaml(path), path)
    assert [w for w in wrong if 'no notebook' not in w] == [] or list(path.parent.glob('*.ipynb'))
    values = {(p['method'], p['metric'], p.get('l0')): p['value'] for e in experiments for p in e.published}
    assert values['atm', 'mean_full_absorption_score', None] == .0068 and values['topk', 'mean_full_absorption_score', 40.] == .140248
    assert values['jumprelu', 'mean_full_absorption_score', 2665.9] == .011419 and values['atm', 'mse_saebench', None] == .5508
    assert all(p.get('source') and p.get('confidence') for e in experiments for p in e.published)
    order = [e.name for e in run_order(experiments)]
    assert order.index('summary') > max(map(order.index, ('absorption', 'planted', 'probing', 'reconstruction')))


def test_reports_that_came_with_a_clone_are_made_again(toy, monkeypatch, tmp_path):
    assert toy.run()[0] == FRESH and toy.run()[0] == DONE
    monkeypatch.setenv('ATM_SAE_CACHE', str(tmp_path/'another'))
    manifest = load_manifest(toy.path)
    assert {R.stale_reason(manifest, e, 'smoke', toy.out) for e in manifest.experiments} == {'made elsewhere'}
    assert toy.run()[0] == FRESH
