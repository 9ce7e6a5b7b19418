"A small project in a temporary folder, for the tests of manifest, page and runner."

import contextlib
import io
import textwrap
import nbformat
import pytest
from atm_sae.cli import main
from atm_sae.artefacts import file_sha256
from atm_sae.report.manifest import ManifestError, load_manifest
from atm_sae.report.runner import RunError, reproduce

DECLARED = """
profile: str = "smoke"  # size of the run
out: str = ""           # where to write
steps: int = 2          # how far to count
rate: float = 0.5
"""
COUNT = """
from pathlib import Path
lines = [
    "world,method,sparsity,metric,mean,low,high,n,l0,l0_low,l0_high",
    f"w,topk,8,total,{sum(range(steps + 1))},5.5,6.5,3,8,8,8",
    "w,atm - topk,8,total,-2,-3,-1,3,8,8,8",
]
Path(out, "tables/count-summary.csv").write_text("\\n".join([*lines, ""]));
"""
DOUBLE = """
from pathlib import Path
text = Path(out, "tables/count-summary.csv").read_text()
Path(out, "tables/double.md").write_text(f"{len(text)} characters\\n");
"""
MANIFEST = """
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
"""


def notebook(path, *code, parameters=DECLARED, tags=(["parameters"],)):
    cells = [nbformat.v4.new_code_cell(parameters.strip(), metadata={"tags": t}) for t in tags]
    cells += [nbformat.v4.new_code_cell(textwrap.dedent(c).strip()) for c in code]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Toy"), *cells])
    for i, cell in enumerate(nb.cells):
        cell["id"] = f"c{i}"
    nbformat.write(nb, path)


class Toy:
    "A small project in a temporary folder."

    def __init__(self, folder):
        self.folder, self.path, self.out = (
            folder,
            folder / "exp" / "manifest.yaml",
            folder / "reports",
        )
        self.path.parent.mkdir()
        self.write(MANIFEST)
        notebook(self.path.parent / "10_count.ipynb", COUNT)
        notebook(self.path.parent / "20_double.ipynb", DOUBLE)

    def write(self, text):
        self.path.write_text(text)

    def replace(self, old, new):
        assert old in self.path.read_text()
        self.write(self.path.read_text().replace(old, new))

    def run(self, **more):
        lines = []
        done = reproduce(
            **{"profile": "smoke", "out": self.out, "manifest": self.path, "say": lines.append}
            | more
        )
        return {n: s.state for n, s in done.items()}, "\n".join(lines)

    def cli(self, *args):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(
                [
                    "reproduce",
                    "--profile",
                    "smoke",
                    "--out",
                    str(self.out),
                    "--manifest",
                    str(self.path),
                    *args,
                ]
            )
        return code, out.getvalue(), err.getvalue()

    def error(self):
        with pytest.raises(ManifestError) as e:
            load_manifest(self.path)
        return str(e.value)

    def hashes(self, *but):
        return {
            p.relative_to(self.out).as_posix(): file_sha256(p)
            for p in self.out.rglob("*")
            if p.is_file() and p.parent.name not in but
        }


def stand_in(path, parameters, target, label):
    "Executes the cells in this process, as papermill would in a kernel."
    nb, space = nbformat.read(path, as_version=4), {}
    for cell in [c for c in nb.cells if c.cell_type == "code"]:
        try:
            exec(cell.source, space)
        except Exception as e:
            nbformat.write(nb, target)
            raise RunError(f"{type(e).__name__}: {e}") from None
        if "parameters" in cell.metadata.get("tags", []):
            space.update(parameters)
    return nb
