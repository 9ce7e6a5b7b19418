"""The site: `python docs/make_site.py` writes `_docs/`, which a browser reads without a network.

Pages are the notebooks with the outputs that they were saved with, the reports, and a reference of
the modules. A link to a file of the project leads to its page, or to a copy of the file."""

import html
import itertools
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from reference import module_page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(!\[[^\]]*\]|\])\(([^)\s]+)\)")
# links of an example, into a folder that is no part of the project
EXAMPLE_HREF = re.compile(r'\bhref="(?!#|[a-z]+:)[^"]*"')
EXAMPLE_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?![/#]|[a-z]+:)[^)\s]+\)")
PARTS = ["core", "data", "sae", "train", "evals", "report"]
PAGE_SUFFIXES = (".ipynb", ".md")
# the page of `atm-sae explore` on two small SAEs of the toy model: what makes it, and what shows it
SAMPLE, SAMPLE_OF = "explore.html", "report/explore"
SAMPLE_SAES = {"mask off": "standard+off", "mask on": "atm"}  # names on the page, methods
SAMPLE_SIZE = "--data nano-gemma2 --l0 16 --d-sae 512 --steps 600 --set n_tokens=120000"


@dataclass(frozen=True)
class Page:
    "A page of the site, made from a file of the project."

    name: str  # path in the site, without suffix
    source: str  # path in the project
    folder: str  # folder that its links start from

    @property
    def file(self) -> str:
        "Its path in the folder that Sphinx reads."
        return self.name + posixpath.splitext(self.source)[1]


# ---- which pages there are


def objects(root: Path) -> list[dict[str, Any]]:
    "The experiments of the manifest, in its order."
    path = root / "nbs/experiments/manifest.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))["objects"] if path.exists() else []


def notebook_pages(root: Path) -> list[Page]:
    "A page for each notebook in nbs/ and each written page beside them, but no experiments."
    found = []
    for path in sorted((root / "nbs").rglob("*")):
        parts = path.relative_to(root / "nbs").parts
        hidden = any(part.startswith(".") for part in parts)
        if path.suffix in PAGE_SUFFIXES and not hidden and parts[0] != "experiments":
            name = Path(*parts).with_suffix("").as_posix()
            source = path.relative_to(root).as_posix()
            found.append(Page(name, source, posixpath.dirname(source)))
    return found


def experiment_pages(root: Path) -> list[Page]:
    "Each experiment as it was run for the reports; where it was not, its notebook."
    found = []
    for entry in objects(root):
        name, folder = entry["name"], "nbs/experiments"
        runs = [("", "reports/notebooks"), ("full/", "reports/full/notebooks")]
        made = [
            Page(f"experiments/{at}{name}", source, folder)
            for at, place in runs
            if (root / (source := f"{place}/{name}.ipynb")).exists()
        ]
        found += made or [Page(f"experiments/{name}", f"{folder}/{entry['notebook']}", folder)]
    return found


def other_pages(root: Path) -> list[Page]:
    "Tables of the reports and the page about benchmarks."
    paths = [*sorted((root / "reports").glob("**/tables/*.md")), root / "benchmarks/README.md"]
    sources = [path.relative_to(root).as_posix() for path in paths if path.exists()]
    return [Page(s.removesuffix(".md"), s, posixpath.dirname(s)) for s in sources]


def site_pages(root: Path) -> list[Page]:
    "All pages that are made from files of the project."
    return notebook_pages(root) + experiment_pages(root) + other_pages(root)


def page_names(root: Path, pages: Iterable[Page]) -> dict[str, str]:
    "{path in the project: file of the page that a link to it leads to}."
    names = {page.source: page.file for page in pages} | {"README.md": "index.ipynb"}
    known = set(names.values())
    for entry in objects(root):
        name = f"experiments/{entry['name']}.ipynb"
        page = name if name in known else f"experiments/full/{entry['name']}.ipynb"
        names.setdefault(f"nbs/experiments/{entry['notebook']}", page)
    return names


# ---- links


def relative(target: str, page: str) -> str:
    "The path from a page to `target`, both from the root of the site."
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


def page_link(path: str, names: dict[str, str]) -> str:
    "Where in the site a file of the project is."
    if path.endswith("/index.md") and path.startswith("reports/"):
        return "reports/index.html"  # which covers all profiles
    return posixpath.splitext(names[path])[0] + ".html" if path in names else path


def with_site_links(text: str, page: Page, root: Path, names: dict[str, str], used: set) -> str:
    "Markdown whose links lead into the site; `used` receives the files that it links to."

    def replaced(match: re.Match) -> str:
        before, link = match.groups()
        target, mark, place = link.partition("#")
        path = posixpath.normpath(posixpath.join(page.folder, unquote(target)))
        if not target or urlsplit(link).scheme or not (root / path).is_file():
            return match[0]
        if before.startswith("!"):
            used.add(path)
            return f"{before}({relative(path, page.name)})"
        if path in names:
            return f"{before}(/{names[path]}{mark}{place})"
        used.add(path)
        return f"{before}(site:{relative(page_link(path, names), page.name)})"

    return LINK.sub(replaced, text)


def with_page_links(text: str, folder: str, names: dict[str, str]) -> str:
    "A page of the reports, whose links to notebooks and tables lead to their pages."

    def replaced(match: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(folder, html.unescape(match[1])))
        return f'href="{posixpath.relpath(page_link(path, names), folder)}"'

    return re.sub(r'href="([^"#:]+\.(?:ipynb|md))"', replaced, text)


# ---- notebooks


def directives(source: str) -> set[str]:
    "What the lines `#| ...` of a cell say."
    return {m[1].replace(" ", "") for m in re.finditer(r"(?m)^# ?\| ?(.+?) *$", source)}


def site_cells(notebook: dict, change: Callable[[str], str]) -> list[dict]:
    "The cells that a reader sees, without directives of nbdev; `change` gets all Markdown."
    found = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        marks, tags = directives(source), cell["metadata"].get("tags", [])
        empty = not re.sub(r"(?m)^# ?\| ?.*$", "", source).strip()
        if cell["cell_type"] == "code" and (empty or "hide" in marks):
            continue
        if cell["cell_type"] == "markdown":
            cell = cell | dict(source=change(source))
        else:
            shown = re.sub(r"(?m)^# ?\| ?.*\n?", "", source)
            hidden = ["remove-input"] if "echo:false" in marks else []
            outputs = [with_markdown(output, change) for output in cell["outputs"]]
            cell = cell | dict(source=shown, outputs=outputs, metadata=dict(tags=tags + hidden))
        found.append(cell)
    return found


def with_markdown(output: dict, change: Callable[[str], str]) -> dict:
    "An output whose Markdown went through `change`; a link of an example is shown as its text."
    data = dict(output.get("data", {}))
    if "text/markdown" in data:
        text = change("".join(data["text/markdown"]))
        data["text/markdown"] = EXAMPLE_LINK.sub(r"\1", text)
    if "text/html" in data:
        data["text/html"] = EXAMPLE_HREF.sub("", "".join(data["text/html"]))
    return output | dict(data=data) if data else output


# ---- the sample page of the explorer


def sample_link(root: Path, page: str) -> str:
    "A sentence of a page that leads to the sample; '' for a project without the explorer."
    if not (root / f"nbs/{SAMPLE_OF}.ipynb").exists():
        return ""
    address = f"site:{relative(SAMPLE, page)}"
    return f"A [sample page of the explorer]({address}) shows two small SAEs, mask off and on."


def write_sample(path: Path) -> None:
    "Train two small SAEs, or take them from the cache, and write the sample page."
    from atm_sae.cli import main

    with tempfile.TemporaryDirectory() as folder:
        methods = SAMPLE_SAES.values()
        failed = main(["train", *methods, *SAMPLE_SIZE.split(), "-q", "--out", folder])
        for name, method in SAMPLE_SAES.items():
            for sae in Path(folder).glob(f"{method}-*"):
                sae.rename(Path(folder, name))
        saes = [str(Path(folder, name)) for name in SAMPLE_SAES]
        if failed or main(["explore", *saes, "--out", str(path)]):
            sys.exit("the sample page of the explorer was not made: see the message above")


# ---- the source that Sphinx reads


def toctree(pages: Iterable[str], options: str = "") -> str:
    "A list of pages."
    return "\n".join(["```{toctree}", *options.splitlines(), "", *pages, "```"])


def part_notebooks(root: Path) -> dict[str, list[str]]:
    "{part: pages of its notebooks}, in the order in which the index and the guide name them."
    guide = [root / "nbs/index.ipynb", *sorted((root / "nbs/guide").glob("*.md"))]
    index = "".join(path.read_text(encoding="utf-8") for path in guide)
    found = {}
    for part in PARTS:
        names = [f"{part}/{p.stem}" for p in sorted((root / "nbs" / part).glob("*.ipynb"))]
        places = {name: index.find(f"{name}.ipynb)") for name in names}
        found[part] = sorted(names, key=lambda name: (places[name] < 0, places[name]))
    found["cli"] = ["cli"] * (root / "nbs/cli.ipynb").exists()
    return {part: names for part, names in found.items() if names}


def write_library(root: Path, source: Path) -> None:
    "The list of library notebooks, and the reference of each module."
    (source / "api").mkdir()
    library, reference = ["# Library notebooks"], ["# API reference"]
    library.append("Each notebook is the source of one module: definitions, examples and checks.")
    for part, names in part_notebooks(root).items():
        modules = [
            f"/api/{module}" for name in names if (module := write_module(root, source, name))
        ]
        library += [f"## {part}", toctree(f"/{name}" for name in names)]
        reference += [f"## {part}", toctree(modules, ":titlesonly:")]
    (source / "library.md").write_text("\n\n".join(library), encoding="utf-8")
    (source / "api/index.md").write_text("\n\n".join(reference), encoding="utf-8")


def write_module(root: Path, source: Path, notebook: str) -> str:
    "The reference of the module that a notebook makes; returns its name, '' if there is none."
    file = notebook.removeprefix("core/")  # modules of `core` lie in the package itself
    path = root / f"atm_sae/{file}.py"
    if not path.exists():
        return ""
    module = f"atm_sae.{file}".replace("/", ".")
    page = module_page(path, module, f"{notebook}.ipynb")
    (source / f"api/{module}.md").write_text(page, encoding="utf-8")
    return module


def write_results(root: Path, source: Path, pages: Iterable[Page]) -> None:
    "The list of experiments, by group."
    known = {page.name for page in pages}
    lines = ["# Results", "The [page of results](site:reports/index.html) shows all figures."]
    lines.append(sample_link(root, "results"))
    groups: dict[str, list[str]] = {}
    for entry in objects(root):
        names = [f"experiments/{at}{entry['name']}" for at in ("", "full/")]
        shown = groups.setdefault(entry["group"], [])
        titles = {names[0]: entry["title"], names[1]: f"{entry['title']} (profile full)"}
        shown += [f"{titles[name]} </{name}>" for name in names if name in known]
    for group, found in groups.items():
        lines += [f"## {group}", toctree(found)]
    (source / "results.md").write_text("\n\n".join(lines), encoding="utf-8")


def contents(root: Path, pages: Iterable[Page]) -> str:
    "The contents of the site, for the sidebar: every page that no other list names."
    listed = {"index", *(name for names in part_notebooks(root).values() for name in names)}
    folders: dict[str, list[str]] = {}
    for page in pages:
        folder = page.name.partition("/")[0]
        if page.name not in listed and folder not in ("experiments", "reports"):
            folders.setdefault(folder, []).append(f"/{page.name}")
    parts = {"Tutorial": folders.pop("tutorial", []), "Results": ["/results"]}
    parts |= {"Guide": folders.pop("guide", [])}
    parts |= {"Reference": ["/library", "/api/index", *itertools.chain(*folders.values())]}
    lists = [
        toctree(p, f":hidden:\n:titlesonly:\n:caption: {name}") for name, p in parts.items() if p
    ]
    return "\n\n".join(lists)


def write_page(
    root: Path, source: Path, page: Page, change: Callable[[str], str], end: str = ""
) -> None:
    "One page of the project for Sphinx; `end` is Markdown that a notebook ends with."
    path = root / page.source
    target = (source / page.name).with_suffix(path.suffix)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        head = "---\norphan: true\n---\n\n" if page.name.startswith("reports/") else ""
        target.write_text(head + change(text), encoding="utf-8")
        return
    notebook = json.loads(text)
    notebook["cells"] = site_cells(notebook, change)
    if end:
        notebook["cells"].append(dict(cell_type="markdown", metadata={}, source=end))
    notebook |= dict(nbformat=4, nbformat_minor=4)  # a version in which cells have no id
    for cell in notebook["cells"]:
        cell.pop("id", None)
    target.write_text(json.dumps(notebook), encoding="utf-8")


def write_source(root: Path, source: Path) -> tuple[dict[str, str], set[str]]:
    "The folder that Sphinx reads; returns the names of pages and the files they link to."
    pages = site_pages(root)
    names, used = page_names(root, pages), set()
    for page in pages:
        change = partial(with_site_links, page=page, root=root, names=names, used=used)
        ends = {"index": contents(root, pages), SAMPLE_OF: sample_link(root, SAMPLE_OF)}
        write_page(root, source, page, change, ends.get(page.name, ""))
    write_library(root, source)
    write_results(root, source, pages)
    for path in used:
        if path.endswith((".png", ".svg")):
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / path, source / path)
    return names, used


# ---- the site


def copy_files(root: Path, site: Path, names: dict[str, str], used: Iterable[str]) -> None:
    "The pages of the reports with their pictures, and other files that pages link to."
    for path in sorted((root / "reports").glob("**/*")):
        place = path.relative_to(root)
        wanted = path.is_file() and "smoke" not in place.parts and path.suffix not in PAGE_SUFFIXES
        if wanted:
            (site / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, site / place)
    for path in used:
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        if not (site / path).exists() and (root / path).suffix not in PAGE_SUFFIXES:
            shutil.copy(root / path, site / path)
    for page in (site / "reports").glob("**/index.html"):
        text = page.read_text(encoding="utf-8")
        folder = page.parent.relative_to(site).as_posix()
        page.write_text(with_page_links(text, folder, names), encoding="utf-8")


class Links(HTMLParser):
    "The links of a page, and the places on it that a link can lead to."

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("href", "src") and not urlsplit(value).scheme:
                self.links.add(value)
            if value and name == "id":
                self.places.add(value)


def broken_links(site: Path) -> list[str]:
    "Links of all pages that lead to no file or to no place on its page."
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            target, _, place = link.partition("#")
            target = unquote(target.partition("?")[0])
            found = Path(os.path.normpath(path.parent / target)) if target else path
            is_state = "=" in place  # such as #word=short: what a page shows, no place on it
            lost = not is_state and found in pages and unquote(place) not in pages[found].places
            if lost or not found.is_file():
                broken.append(f"{path.relative_to(site)}: {link}")
    return sorted(broken)


def build(root: Path = ROOT, site: Path | None = None) -> Path:
    "Build the site of the project at `root`; exits with what went wrong."
    site = site or root / "_docs"
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "source"), Path(folder, "site")
        source.mkdir()
        names, used = write_source(root, source)
        sphinx = [sys.executable, "-m", "sphinx", "-b", "html", "-c", str(Path(__file__).parent)]
        sphinx += ["-q", "-W", "--keep-going", "-j", "auto", "-d", f"{folder}/doctrees"]
        status = subprocess.run([*sphinx, str(source), str(made)]).returncode
        if status:
            sys.exit(status)
        copy_files(root, made, names, used)
        if sample_link(root, "index"):
            write_sample(made / SAMPLE)
        if broken := broken_links(made):
            sys.exit("links that lead nowhere:\n  " + "\n  ".join(broken))
        shutil.rmtree(site, ignore_errors=True)
        shutil.move(made, site)
    return site


if __name__ == "__main__":
    print(f"open {build() / 'index.html'}")
