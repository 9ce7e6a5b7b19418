"Training logs: which numbers at which steps, once each, and without an effect on the run."

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from small import WORLD, small, weights

from atm_sae.cli import main
from atm_sae.data.planted import PlantedWorld, WorldBatches
from atm_sae.sae.atm import make_masker
from atm_sae.sae.sae import SAE
from atm_sae.train import runs, training_log
from atm_sae.train.loop import lr_factor, train
from atm_sae.train.runs import get_run, run_folder, run_grid, run_log
from atm_sae.train.training_log import TrainingLog

pytestmark = pytest.mark.usefixtures("cache")  # every test has a cache of its own
needs_tensorboard = pytest.mark.skipif(not find_spec("tensorboard"), reason="needs the extra `log`")


class Writer:
    "A stand-in for TensorBoard's writer: a file with a line of JSON for each scalar."

    made = 0

    def __init__(self, folder, purge_step, flush_secs, filename_suffix):
        assert purge_step == 0
        Writer.made += 1
        self.path = Path(folder) / f"events.out.tfevents.{Writer.made}{filename_suffix}"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()

    def add_scalar(self, name, value, step):
        with self.path.open("a") as file:
            file.write(json.dumps([name, value, step]) + "\n")

    def close(self):
        pass


@pytest.fixture
def written(monkeypatch):
    "A stand-in for TensorBoard; reads {name: [(step, value), ...]} of a log."
    monkeypatch.setattr(training_log, "find_spec", lambda name: True)
    fake = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)

    def read(folder):
        (path,) = Path(folder).glob("events.*")
        found = {}
        for name, value, step in map(json.loads, path.read_text().splitlines()):
            found.setdefault(name, []).append((step, value))
        return found

    return read


def make(spec, log=None, folder=None, data=WorldBatches):
    sae = SAE(spec.sae)
    masker = make_masker(spec.atm, spec.sae.d_sae, spec.train.steps)
    batches = data(PlantedWorld(WORLD), spec.train.batch_size, spec.seed)
    return sae, train(sae, batches, spec.train, masker, folder, progress=False, log=log)


class Fails(WorldBatches):
    "Batches that end in an error at the 28th: after the row of step 25, checkpoint at 20."

    drawn = 0

    def __next__(self):
        self.drawn += 1
        if self.drawn == 28:
            raise OSError("stopped")
        return super().__next__()


def test_each_row_of_the_history_is_logged_and_changes_nothing(written, tmp_path):
    spec = small("atm")
    bare, plain = make(spec)
    sae, history = make(spec, TrainingLog(tmp_path / "log"))
    assert weights(sae) == weights(bare) and history.table.equals(plain.table)
    found, table = written(tmp_path / "log"), history.table
    expected = {n: table[n] for n in ("loss", "fvu", "l0", "mask_rate", "threshold", "coefficient")}
    expected["explained_variance"] = 1 - table.fvu
    expected["dead_share"] = table.dead / spec.sae.d_sae
    rates = [spec.train.lr * lr_factor(step - 1, spec.train) for step in table.step]
    expected["learning_rate"] = table.l0 * 0 + rates
    for name, values in expected.items():
        assert found[name] == list(zip(table.step, values)), name
    assert {"step", "tokens", "dead"}.isdisjoint(found)


def test_a_number_that_a_method_does_not_have_is_left_out(written, tmp_path):
    make(small("topk"), TrainingLog(tmp_path))
    assert {"mask_rate", "threshold", "coefficient"}.isdisjoint(written(tmp_path))


def test_a_resumed_run_has_every_step_once(written, tmp_path):
    spec, place = small("atm"), tmp_path / "log"
    with pytest.raises(OSError, match="stopped"):
        make(spec, TrainingLog(place), tmp_path, Fails)
    steps = [step for step, _ in written(place)["loss"]]
    assert steps[-1] == 25 and not TrainingLog(place).is_complete
    other = place / "events.out.tfevents.9.of-another-tool"
    other.touch()
    _, history = make(spec, TrainingLog(place), tmp_path)
    assert other.exists()
    other.unlink()
    assert written(place)["loss"] == list(zip(history.table.step, history.table.loss))
    assert TrainingLog(place).is_complete


def test_a_cached_run_logs_its_stored_history(written, tmp_path):
    spec = small("topk")
    history = get_run(spec).history
    get_run(spec, log=tmp_path)
    log = run_log(tmp_path, spec)
    assert written(log.folder)["fvu"] == list(zip(history.table.step, history.table.fvu))
    assert log.is_complete and log.folder.name == f"topk-l0_3-seed0-{spec.key[:8]}"


def test_a_complete_log_is_kept_and_a_partial_one_is_replaced(written, tmp_path, monkeypatch):
    spec = small("topk")
    get_run(spec, log=tmp_path)
    log, made = run_log(tmp_path, spec), Writer.made
    get_run(spec, log=tmp_path)
    assert Writer.made == made
    (log.folder / "complete").unlink()
    (path,) = log.folder.glob("events.*")
    path.write_text("")
    get_run(spec, log=tmp_path)
    assert written(log.folder)["loss"][-1][0] == spec.train.steps


def test_a_grid_logs_each_run_in_a_folder_of_its_own(written, tmp_path):
    specs = [small("topk"), small("topk", seed=1), small("topk", lr=0.001)]
    get_run(specs[0])
    done = run_grid(specs, workers=1, progress=False, log=tmp_path / "logs")
    folders = [run_log(tmp_path / "logs", spec).folder for spec in specs]
    assert sorted(p.name for p in (tmp_path / "logs").iterdir()) == sorted(p.name for p in folders)
    for folder, run in zip(folders, done):
        assert [v for _, v in written(folder)["fvu"]] == run.history.table.fvu.tolist()


def test_the_log_is_no_part_of_the_key(written, tmp_path):
    spec = small("topk")
    a = get_run(spec, log=tmp_path)
    assert a.folder == run_folder(spec)
    parts = runs.run_artefact(spec).closure.definitions
    assert not [name for name in parts if "training_log" in name]


def test_without_tensorboard_nothing_starts(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training_log, "find_spec", lambda name: None)
    monkeypatch.setattr(runs, "_make_members", None)
    for started in (
        lambda: TrainingLog(tmp_path),
        lambda: get_run(small("topk"), log=tmp_path),
        lambda: run_grid([small("topk")], 1, False, log=tmp_path),
    ):
        with pytest.raises(ImportError, match=r"pip install '\.\[log\]'"):
            started()
    monkeypatch.setattr("atm_sae.cli._read_activations", None)
    assert main(["train", "topk", "--log", str(tmp_path), "-q"]) == 2
    assert "pip install '.[log]'" in capsys.readouterr().err


def test_a_log_in_a_file_is_refused(written, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file: choose another folder"):
        TrainingLog(tmp_path / "file" / "log")


def test_the_command_logs(written, tmp_path, capsys):
    args = "train topk --d-sae 16 --l0 3 --steps 40 --batch-size 32 --json -q".split()
    assert main([*args, "--log", str(tmp_path)]) == 0
    (folder,) = tmp_path.glob("topk-l0_3-seed0-*")
    assert json.loads(capsys.readouterr().out)[0]["method"] == "topk"
    assert written(folder)["loss"][-1][0] == 40


@needs_tensorboard
def test_tensorboard_reads_the_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec = small("atm")
    with pytest.raises(OSError, match="stopped"):
        make(spec, TrainingLog(tmp_path / "log"), tmp_path, Fails)
    _, history = make(spec, TrainingLog(tmp_path / "log"), tmp_path)
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    for name in ("fvu", "mask_rate"):
        read = events.Scalars(name)
        assert [e.step for e in read] == history.table.step.tolist()
        assert [e.value for e in read] == pytest.approx(history.table[name].tolist())
