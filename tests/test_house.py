"""The house: which module may import which, and how long a function may be.

Lines, unused names and the like are ruff's, types are mypy's (`make lint`)."""

import ast
import json
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each of these may import those before it ...
BELOW = ["core", "ranks", "closure", "artefacts", "methods", "stats"]
# ... and a module of a part all those, its own part, and the parts before it.
PARTS = ["data", "sae", "train", "evals", "report"]
ORDER = [*BELOW, *PARTS, "cli"]
PATHS = sorted((ROOT / "atm_sae").rglob("*.py"))
MODULES = {
    ".".join(path.relative_to(ROOT / "atm_sae").with_suffix("").parts): path
    for path in PATHS
    if not path.name.startswith("_")
}


# ---- imports


def absolute(node: ast.ImportFrom, module: str) -> str:
    "The dotted name that a `from ... import` of a module names, with the package's name in front."
    if not node.level:
        return node.module or ""
    folders = ["atm_sae", *module.split(".")][: -node.level]
    return ".".join([*folders, *filter(None, [node.module])])


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    """Dotted names of all that a module imports, wherever in it. Names that are imported from a
    module follow it after another dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from (f"{absolute(node, module)}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def module_of(name: str) -> str | None:
    "The module of this package that a dotted name lies in; None outside; '' is the package itself."
    first, *rest = name.split(".")
    if first != "atm_sae":
        return None
    while rest and ".".join(rest) not in MODULES:
        rest.pop()
    return ".".join(rest)


def used(tree: ast.AST, module: str) -> set[str]:
    "The modules of this package that a module imports."
    found = {module_of(name) for name in imports(tree, module) if name != "atm_sae.__version__"}
    return {name for name in found if name is not None}


def place(module: str) -> int:
    "How far above the ground a module lies; the package itself lies above all."
    part = module.split(".")[0]
    return ORDER.index(part) if part else len(ORDER)


TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_lies_below_it(module):
    wrong = [name for name in used(TREES[module], module) if place(name) > place(module)]
    assert not wrong, f"{module} imports {wrong}, which lie above it"
    outside = {name.split(".")[0] for name in imports(TREES[module], module)}
    tools = outside & {"nbdev", "fastcore", "execnb", "ghapi"}
    assert not tools, "development tools must not be imported"


def test_no_module_imports_itself_by_way_of_others():
    TopologicalSorter({name: used(tree, name) for name, tree in TREES.items()}).prepare()


def test_modules_that_do_with_less():
    assert not used(TREES["methods"], "methods")
    for name in ("methods", "stats"):
        assert "torch" not in {i.split(".")[0] for i in imports(TREES[name], name)}


def private(tree: ast.AST, module: str) -> list[str]:
    "Private names of other modules of this package that a module uses."
    found, aliases = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = absolute(node, module)
            for alias in node.names:
                if module_of(f"{base}.{alias.name}") is None:
                    continue
                if alias.name.startswith("_") and not alias.name.endswith("__"):
                    found.append(f"{base}.{alias.name}")
                if f"{base}.{alias.name}".removeprefix("atm_sae.") in MODULES:
                    aliases.add(alias.asname or alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in aliases:
            if node.attr.startswith("_") and not node.attr.endswith("__"):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_private_names_stay_at_home(module):
    assert not private(TREES[module], module)


EXAMPLE = """
import atm_sae.data.lm, numpy
from typing import TYPE_CHECKING
from atm_sae import SAE, __version__
from ..core import seeded
from . import losses as L, atm
from .sae import _hidden, __doc__
if TYPE_CHECKING:
    from atm_sae.report.page import write_index
def f():
    from atm_sae.train import loop
    L._secret, loop.train, numpy._core
    import_module("atm_sae.evals.metrics")
"""


def test_every_form_of_import_is_seen():
    tree = ast.parse(EXAMPLE)
    below = {"data.lm", "core", "sae.losses", "sae.atm", "sae.sae"}
    above = {"", "report.page", "train.loop", "evals.metrics"}
    assert used(tree, "sae.formats") == below | above
    assert {name for name in above if place(name) > place("sae.formats")} == above
    assert not {name for name in below if place(name) > place("sae.formats")}
    assert private(tree, "sae.formats") == ["atm_sae.sae.sae._hidden", "L._secret"]


# ---- encodings


def without_encoding(tree: ast.AST) -> list[str]:
    "Calls that read or write text in the encoding of the machine."
    found = []
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        place, called = ast.unparse(node.func), ast.unparse(node)
        named = {keyword.arg for keyword in node.keywords}
        file = place == "open" and not re.search(r"open\(.*, '[rwxa]?b'", called)
        process = place.startswith("subprocess.") and "text" in named
        if file or process or place.endswith((".read_text", ".write_text")):
            found += [] if "encoding" in named else [called]
    return found


def test_text_files_have_an_encoding():
    assert without_encoding(ast.parse("p.read_text(); open(p); subprocess.run(c, text=True)"))[2:]
    assert not without_encoding(ast.parse("open(p, 'rb'); p.write_text(s, encoding='utf-8')"))
    found = {name: calls for name, tree in TREES.items() if (calls := without_encoding(tree))}
    assert not found


# ---- length

LONGEST = 45
# Functions that are longer, each with its reason.
LONGER: dict[str, str] = {}


def cell_sources(path: Path) -> Iterator[tuple[str, str]]:
    "(place, Python code) of a file: its text, or each code cell of a notebook without magics."
    name = path.relative_to(ROOT).as_posix()
    if path.suffix == ".py":
        yield name, path.read_text(encoding="utf-8")
        return
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            yield name, re.sub(r"(?m)^[%!].*$", "", "".join(cell["source"]))


def long_functions(path: Path) -> dict[str, int]:
    "{place:name: number of lines} of the functions that are too long."
    found = {}
    for name, source in cell_sources(path):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > LONGEST:
                    found[f"{name}:{node.name}"] = lines
    return found


SOURCES = [
    path
    for folder in ("nbs", "tests", "benchmarks")
    for suffix in ("*.py", "*.ipynb")
    for path in sorted((ROOT / folder).rglob(suffix))
    if ".ipynb_checkpoints" not in path.parts
]


def test_a_function_fits_a_screen():
    found: dict[str, int] = {}
    for path in SOURCES:
        found |= long_functions(path)
    assert not {name: lines for name, lines in found.items() if name not in LONGER}
    assert not LONGER.keys() - found.keys(), "no longer long: take it from the table"


def test_a_suppressed_warning_has_a_reason():
    "After the code of a suppressed warning stands why."
    bare = []
    for path in SOURCES:
        for name, source in cell_sources(path):
            bare += [f"{name}: {m[0]}" for m in re.finditer(r"#\s*noqa[^\n]*", source)]
    assert not [
        line for line in bare if not re.search(r"noqa: [A-Z]+[0-9]+(, [A-Z]+[0-9]+)*\W+\w", line)
    ]
