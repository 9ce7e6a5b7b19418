"Settings and fixtures that the test files share."

import os
import shutil
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from toy import Toy

    from atm_sae.data.lm import LM

ROOT = Path(__file__).resolve().parent.parent
# For PyTorch, which nothing has imported yet, and for every process that a test starts: this copy
# of the package, one thread, no network, no screen.
PATHS = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)
os.environ["MPLBACKEND"] = "agg"
DEFAULTS = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)


def pytest_sessionfinish() -> None:
    "Wait for the fork server, so that whoever measures this process measures it too."
    forkserver._forkserver._stop()


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "One cache for all notebooks and all workers: what one has made, the others read."
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return folder / "shared-cache"


@pytest.fixture(scope="session")
def lm() -> "LM":
    "A language model with random weights: 3 blocks, width 32. No test may change it."
    from atm_sae.data.lm import tiny_lm

    return tiny_lm()


@pytest.fixture(scope="session")
def model_folder(lm: "LM", tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The folder of that model."
    from atm_sae.data.lm import save_lm

    return save_lm(lm, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    "Chromium without traffic of its own. For a module, since it keeps an event loop running."
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    reason = "needs playwright (pip install playwright)"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    features = ("gpu", "quic", "background-networking", "component-update", "sync")
    quiet = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in features)]
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=chromium, args=quiet)
        yield running
        running.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    "A cache of the test's own, and one thread."
    from atm_sae.core import one_thread

    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "cache"))
    with one_thread():
        yield tmp_path / "cache"


@pytest.fixture
def real(cache: Path, tmp_path: Path) -> "Toy":
    "A small project whose notebooks run in kernels."
    from toy import Toy

    return Toy(tmp_path)


@pytest.fixture
def toy(real: "Toy", monkeypatch: pytest.MonkeyPatch) -> "Toy":
    "A small project whose notebooks run in this process."
    from toy import stand_in

    monkeypatch.setattr("atm_sae.report.runner.execute_notebook", stand_in)
    return real
