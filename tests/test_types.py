"The package is typed: mypy finds nothing wrong, and every public function says what it takes and gives."

import importlib, inspect, subprocess, sys
from functools import cached_property
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(p.stem for p in (ROOT / "atm_sae").glob("*.py") if not p.stem.startswith("_"))


def annotated(f):
    "True if each parameter and the return value have a type."
    s = inspect.signature(f)
    empty = [
        p.name
        for p in s.parameters.values()
        if p.annotation is p.empty and p.name not in ("self", "cls")
    ]
    return not empty and s.return_annotation is not s.empty


def methods(cls):
    "(name, function) of the public methods, properties and written-out special methods of a class."
    source = inspect.getsource(cls)
    for name, member in vars(cls).items():
        if isinstance(member, property):
            member = member.fget
        if isinstance(member, cached_property):
            member = member.func
        f = inspect.unwrap(getattr(member, "__func__", member))
        if (
            inspect.isfunction(f)
            and (not name.startswith("_") or name.endswith("__"))
            and f"def {f.__name__}(" in source
        ):
            yield name, f


def untyped(module):
    "Names of public functions and methods of a module that lack a type."
    found = importlib.import_module(f"atm_sae.{module}")
    for name in getattr(found, "__all__", ()):
        value = getattr(found, name)
        if inspect.isclass(value) and value.__module__ == found.__name__:
            if not hasattr(value, "_fields"):
                yield from (f"{module}.{name}.{m}" for m, f in methods(value) if not annotated(f))
        elif inspect.isroutine(value) and not annotated(inspect.unwrap(value)):
            yield f"{module}.{name}"


def test_the_check_sees_what_lacks_a_type():
    def whole(a: int, *b: str, c: int | None = None) -> None: ...
    def no_return(a: int): ...
    def no_parameter(a: int, **more) -> None: ...

    assert [annotated(f) for f in (whole, no_return, no_parameter)] == [True, False, False]

    class Half:
        def f(self): ...
        @property
        def g(self): ...
        @cached_property
        def h(self): ...
        @classmethod
        def make(cls): ...
        def _private(self): ...
        def whole(self) -> int:
            return 1

    assert {n for n, f in methods(Half) if not annotated(f)} == {"f", "g", "h", "make"}


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_annotated(module):
    assert not list(untyped(module))


def test_mypy_finds_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-pretty", "--hide-error-context"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "checked" in done.stdout or "no issues found" in done.stdout, (
        done.stdout + done.stderr
    )  # it ran to the end
    assert not [line for line in done.stdout.splitlines() if ": error: " in line]
