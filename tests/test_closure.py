"Code closures: what counts as the code of a result, on small packages written by hand."

import ast
from importlib.resources import files
from pathlib import Path

import pytest

from atm_sae.closure import code_closure, outer_names, strip

PACKAGE = Path(str(files("atm_sae")))
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if not p.name.startswith("_"))

ONE = """
"The first module."
from typing import TYPE_CHECKING
import torch
from .two import Config, helper, TABLE as CHOICES
from . import three

if TYPE_CHECKING:
    from .nowhere import Unknown

SIZE = 3
LOOKUP = {"x": 1}
LOOKUP["y"] = SIZE


def make(config: "Unknown", n: int = 2) -> int:
    "Makes it."
    from .two import late
    if n < 0:
        raise ValueError(f"{n} is negative: {advice()}")
    assert n, f"nothing: {advice()}"
    return CHOICES[config.kind](helper(n)) + late() + LOOKUP["x"] + three.step(n)


def advice():
    return "give a positive number"


def unrelated():
    return SIZE
"""
TWO = """
import numpy as np
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    kind: str = "a"
    size: int = 4

    def double(self):
        return 2 * self.size


def helper(x):
    return np.sqrt(x)


def late():
    return Config().double()


def first(x):
    return x


def second(x):
    return -x


TABLE = {"a": first, "b": second}
"""
THREE = "def step(n):\n    return [n + k for k in range(n)]\n\ndef leap(n):\n    return n\n"
ALL = ["one.LOOKUP", "one.SIZE", "one.make", "three.step", "two.Config", "two.TABLE", "two.first"]
ALL += ["two.helper", "two.late", "two.second"]


@pytest.fixture
def package(tmp_path):
    for name, source in {"one": ONE, "two": TWO, "three": THREE}.items():
        (tmp_path / f"{name}.py").write_text(source)
    return tmp_path


def edit(package, module, old, new):
    path = package / f"{module}.py"
    source = path.read_text()
    assert old in source
    path.write_text(source.replace(old, new))
    for name in ("_sources", "_closure"):  # a process sees a package as it was at first
        code_closure.__globals__[name].cache_clear()


def closure(package, **options):
    return code_closure("one.make", root=package, **options)


def test_what_can_be_reached(package):
    found = closure(package)
    assert [*found.definitions] == sorted(ALL)
    assert found.packages == ("numpy",)  # torch is imported and not used


@pytest.mark.parametrize(
    "module, old, new",
    [
        ("one", '"Makes it."', '"Makes something."'),
        ("one", "n: int = 2) -> int", 'n: "float" = 2)'),
        ("one", "is negative", "is below zero"),
        ("one", 'f"nothing: {advice()}"', '"nothing"'),
        ("one", "give a positive number", "give another"),
        ("one", "def unrelated():", "def unrelated(x=1):"),
        ("one", '"The first module."', "# a comment"),
        ("two", "return np.sqrt(x)", "return np.sqrt(x)  # of x"),
        ("three", "    return n\n", "    return -n\n"),
    ],
)
def test_what_does_not_count(package, module, old, new):
    before = closure(package)
    edit(package, module, old, new)
    assert closure(package).hash == before.hash


@pytest.mark.parametrize(
    "module, old, new, changed",
    [
        ("one", "n: int = 2", "n: int = 3", "one.make"),
        ("one", "SIZE = 3", "SIZE = 4", "one.SIZE"),
        ("one", 'LOOKUP["y"] = SIZE', 'LOOKUP["z"] = SIZE', "one.LOOKUP"),
        ("two", "np.sqrt(x)", "np.sqrt(x) + 1", "two.helper"),
        ("two", "2 * self.size", "3 * self.size", "two.Config"),
        ("two", 'kind: str = "a"', 'kind: str = "b"', "two.Config"),
        ("three", "n + k", "n - k", "three.step"),
    ],
)
def test_what_counts(package, module, old, new, changed):
    before = closure(package).definitions
    edit(package, module, old, new)
    after = closure(package).definitions
    assert [n for n in after if after[n] != before[n]] == [changed]


def test_fields_of_a_specification_are_left_out(package):
    before = closure(package, spec_types=["Config"])
    edit(package, "two", 'kind: str = "a"', 'kind: str = "b"\n    new: int = 1')
    assert closure(package, spec_types=["Config"]).hash == before.hash
    edit(package, "two", "2 * self.size", "3 * self.size")
    assert closure(package, spec_types=["Config"]).hash != before.hash


def test_only_the_chosen_entry_of_a_table(package):
    chosen = {"two.TABLE": ("a",)}
    before = closure(package, choose=chosen)
    assert "two.first" in before.definitions and "two.second" not in before.definitions
    edit(package, "two", '"b": second}', '"b": second, "c": helper}')
    assert closure(package, choose=chosen).hash == before.hash
    with pytest.raises(ValueError, match="only a dictionary written out"):
        closure(package, choose={"one.SIZE": ("a",)})


def test_cuts(package):
    found = closure(package, cut=["two", "one.LOOKUP"]).definitions
    assert [*found] == ["one.make", "three.step"]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("helper(n))", "halper(n))", "one.make uses halper, which is neither defined nor imported"),
        ("import Config, helper,", "import Config, helfer as helper,", "two.helfer is not defined"),
        ("three.step(n)", "three.stop(n)", "three.stop is not defined"),
    ],
)
def test_a_name_that_leads_nowhere(package, old, new, message):
    edit(package, "one", old, new)
    with pytest.raises(NameError, match=message):
        closure(package)


def test_strip_keeps_what_runs():
    source = "class A:\n    'Doc.'\n    x: int\n    y: int = 2\n"
    source += "    def f(self, a: int) -> int:\n        'Doc.'"
    assert (
        strip(source)
        == "class A:\n    x: None\n    y: None = 2\n\n    def f(self, a):\n        pass"
    )
    assert strip(source, ["A"]) == "class A:\n\n    def f(self, a):\n        pass"
    assert (
        strip("raise OutputError(number, f'{text}') from error") == "raise OutputError() from error"
    )


def test_outer_names():
    code = (
        "def f(a, b=B):\n    c = [d for d in a]\n    def g():\n        return c, e\n    return g, f"
    )
    assert outer_names(code) == {"B", "e", "f"}
    assert outer_names("class A(Base):\n    n = N\n    def m(self):\n        return n") == {
        "Base",
        "N",
        "n",
    }


def top_level(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_every_name_of_the_package_can_be_resolved(path):
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    makers = [f"{module}.{name}" for name in top_level(path)]
    assert set(makers) <= code_closure(*makers).definitions.keys()


def test_asynchronous_functions_and_items_are_followed():
    plain = "async def f(x):\n    return x\n"
    typed = 'async def f(x: int) -> int:\n    "Text."\n    return x\n'
    assert strip(typed) == strip(plain)
