"Documentation strings of installed packages as a text."

import json
import shutil
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from atm_sae.core import project_root
from atm_sae.data import installed, text
from atm_sae.evals.first_letter import PROMPT

DEFINED = """# a licence: with a colon
'''The module has a text of its own, which is longer than sixty characters.'''
class Shape(Base,
            kind="a#b"):
    "A class has a text of its own as well, and that one is in single quotes."

    def area(self) -> float:  # in metres
        u"What a method returns, with a tab\\tand a quote ' that opens no string at all."
        if self:
            x = "An ordinary text is no documentation, however many words there are in it."
        return "# this is no comment: \\"quoted\\" words, and more of them until it is long."
"""


def test_documentation_strings_are_those_of_the_parser():
    found = [*installed.find_docstrings(DEFINED)]
    assert len(found) == 3 and found == text._docstrings(DEFINED.encode())


@pytest.mark.parametrize("name", ["argparse", "asyncio/queues", "json/__init__", "typing"])
def test_documentation_strings_of_a_file_are_those_of_the_parser(name):
    source = (Path(json.__file__).parents[1] / f"{name}.py").read_bytes()
    found = [*installed.find_docstrings(source.decode())]
    assert found and sorted(found) == sorted(text._docstrings(source))


def test_broken_escapes_and_halves_of_characters():
    words = "enough words that the whole is longer than sixty characters, certainly"
    assert [*installed.find_docstrings(f'"\\x{words}"')] == []
    assert [*installed.find_docstrings(f'"\\ud800{words}"')] == [words]


def install(site, package, version="1.0", **files):
    "Make a package as pip would have installed it."
    names = {f"{package}/{name}.py": source for name, source in files.items()}
    about = f"{package}-{version}.dist-info"
    names[f"{about}/METADATA"] = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
    for name, source in names.items():
        (site / name).parent.mkdir(exist_ok=True, parents=True)
        (site / name).write_text(source)
    record = "".join(f"{name},,\n" for name in [*names, f"{about}/RECORD"])
    (site / about / "RECORD").write_text(record)


COMMON = "This line, which is rather long, stands in the documents of two packages."
TOYS = ("toy_alpha", "toy_beta")


def define(*docs):
    "Source of functions with these texts; running it is an error."
    return "raise ImportError\n" + "".join(f'def f():\n    """{d}"""\n' for d in docs)


@pytest.fixture
def site(tmp_path, monkeypatch):
    "Two packages that have a line in common, and no standard library."
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(installed, "stdlib_files", lambda: [])
    monkeypatch.setattr(installed, "help_topics", lambda: [])
    for name in TOYS:
        own = [
            f"Document {i} of {name} has a rather long line that no other document has at all."
            for i in range(9)
        ]
        question = own[8] + PROMPT.format(word=" the word")
        docs = (f"{COMMON}\n{own[0]}", COMMON, *own[1:8], question)
        install(tmp_path, name, core=define(*docs), again=define(*docs))
    return tmp_path


def test_documents_have_no_copies_and_no_question_of_the_letter_task(site):
    docs = installed.read_installed(TOYS)
    assert len(docs) == 16 and sum(COMMON in d for d in docs) == 1
    assert not any("first letter" in d for d in docs)


def test_the_order_mixes_packages_and_is_fixed(site):
    docs = installed.read_installed(TOYS)
    assert docs == installed.read_installed(TOYS)
    halves = [sum("alpha" in d for d in half) for half in (docs[:8], docs[8:])]
    assert all(0 < n < 8 for n in halves)


def test_held_out_documents_share_no_long_line_with_the_others():
    shared = [
        f"line {i} is long enough, since it has eighty characters or even more:" for i in range(40)
    ]
    docs = [
        f"{shared[i % 40]}\n{' '.join(shared[i % 7].split()[::-1])}\n{i} {shared[0][::-1]}"
        for i in range(400)
    ]
    kept = [*installed.without_copies(docs)]
    lines = [{x for x in d.splitlines() if len(x) >= 60} for d in kept]
    assert len(kept) > 20 and sum(map(len, lines)) == len(set().union(*lines))


def test_tests_of_packages_are_left_out(site):
    words = "A test has words as well, and there are more than sixty characters of them."
    install(site, "toy_gamma", core=f'"{words}"', **{"tests/core": f'"{words}"'})
    assert installed.package_files("toy_gamma") == [site / "toy_gamma" / "core.py"]


def test_the_text_is_made_once_and_again_for_another_version(site):
    path, checksum = installed.get_installed(TOYS)
    when = path.stat().st_mtime_ns
    assert installed.get_installed(TOYS) == (path, checksum) and path.stat().st_mtime_ns == when
    assert [*installed.installed_docs(1, TOYS)] == installed.read_installed(TOYS)[1:]
    shutil.rmtree(site / "toy_alpha-1.0.dist-info")
    install(site, "toy_alpha", "1.1", core=define(COMMON))
    other, changed = installed.get_installed(TOYS)
    assert other != path and changed != checksum


def test_a_version_without_changes_keeps_the_checksum(site):
    path, checksum = installed.get_installed(TOYS)
    (site / "toy_alpha-1.0.dist-info").rename(site / "toy_alpha-1.1.dist-info")
    about = site / "toy_alpha-1.1.dist-info" / "METADATA"
    about.write_text(about.read_text().replace("1.0", "1.1"))
    other, same = installed.get_installed(TOYS)
    assert other != path and same == checksum


def test_a_package_that_is_missing_is_named():
    with pytest.raises(ModuleNotFoundError, match="not installed: no-such-package. What to do"):
        installed.installed_artefact(("numpy", "no-such-package"))


def test_a_package_without_a_list_of_files_is_named(site):
    (site / "toy_beta-1.0.dist-info" / "RECORD").unlink()
    with pytest.raises(FileNotFoundError, match="toy_beta has no list of its files"):
        installed.read_installed(TOYS)


def test_its_name_goes_before_a_folder_of_that_name(site, monkeypatch):
    (site / "installed-docs").mkdir()
    monkeypatch.chdir(site)
    monkeypatch.setattr(text, "get_installed", lambda: (None, "a checksum"))
    monkeypatch.setattr(text, "installed_docs", lambda start: iter([f"from {start} on"]))
    assert text.documents_checksum("installed-docs") == "a checksum"
    assert [*text.open_documents("installed-docs", 7)] == ["from 7 on"]


def test_its_packages_are_those_that_the_library_brings():
    def needs(name):
        lines = (Requirement(line) for line in metadata.requires(name) or [])
        return {r.name for r in lines if r.marker is None or r.marker.evaluate({"extra": ""})}

    project = tomllib.loads((project_root() / "pyproject.toml").read_text(encoding="utf-8"))
    brought, todo = set(), {Requirement(r).name for r in project["project"]["dependencies"]}
    while todo:
        name = canonicalize_name(todo.pop())
        if name not in brought:
            brought.add(name)
            todo |= needs(name)
    assert {canonicalize_name(name) for name in installed.PACKAGES} <= brought
