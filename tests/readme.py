"""README.md is nbs/index.ipynb as Markdown. Write it with `python tests/notebooks.py readme`."""

import json
import posixpath
import re
from pathlib import Path

from atm_sae.report.figures import figure_text

ROOT = Path(__file__).resolve().parent.parent


def relink(text: str, folder: str = "nbs") -> str:
    "Relative links and pictures of a notebook in `folder`, as seen from the project's root."

    def move(match: re.Match) -> str:
        target = match[2]
        if re.match(r"[a-z]+:|[#/]", target):
            return match[0]
        return match[1] + posixpath.normpath(posixpath.join(folder, target))

    return re.sub(r'(\]\(|src=")([^)"\s]+)', move, text)


def described(text: str, root: Path = ROOT) -> str:
    "Pictures of `relink`ed text with the text alternative that their file holds, if it holds one."

    def fill(match: re.Match) -> str:
        path = root / match[2]
        alt = figure_text(path).alt if path.is_file() else ""
        return f"![{alt or match[1]}]({match[2]})"

    return re.sub(r"!\[([^\]]*)\]\(([^)\s]+\.png)\)", fill, text)


def fenced(text: str, language: str = "") -> str:
    "`text` as a code block."
    return f"```{language}\n{text.rstrip()}\n```"


def output_markdown(output: dict, name: str) -> str:
    "One output of a code cell as Markdown; ValueError for a picture, which a README cannot hold."
    if output["output_type"] == "stream":
        return fenced("".join(output["text"]))
    if output["output_type"] == "error":
        error = output["ename"]
        raise ValueError(f"{name} ended with {error}: mend it before it becomes the README")
    data = output["data"]
    if any(kind.startswith("image/") for kind in data):
        raise ValueError(
            f"{name} draws a picture: show the file in reports/figures"
            " with ![](../reports/figures/NAME.png) instead"
        )
    if "text/markdown" in data:
        return relink("".join(data["text/markdown"])).strip()
    return fenced("".join(data["text/plain"]))


def joined(outputs: list[dict]) -> list[dict]:
    "Outputs of a cell, with what it printed in pieces in one."
    out: list[dict] = []
    for output in outputs:
        if out and output["output_type"] == out[-1]["output_type"] == "stream":
            out[-1] = out[-1] | {"text": [*out[-1]["text"], *output["text"]]}
        else:
            out.append(output)
    return out


def directive(text: str) -> str:
    "Pattern of a line that tells nbdev something: `#| text`, or as ruff writes it `# | text`."
    return rf"^#\s*\|\s*{text}" + (r"\s*$" if text else "")


def cell_markdown(cell: dict, name: str) -> list[str]:
    "The blocks that one cell gives: none if it is hidden."
    source = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown":
        return [described(relink(source))] if source else []
    if cell["cell_type"] != "code" or re.search(directive("hide"), source, re.M):
        return []
    lines = [line for line in source.splitlines() if not re.match(directive(""), line)]
    code = "\n".join(lines).strip()
    shown = bool(code) and not re.search(directive(r"echo:\s*false"), source, re.M)
    blocks = [fenced(code, "python")] if shown else []
    return blocks + [output_markdown(output, name) for output in joined(cell["outputs"])]


def readme_text(path: str | Path = ROOT / "nbs" / "index.ipynb") -> str:
    """The notebook at `path` as Markdown. Cells with `#| hide` are left out; of cells with
    `#| echo: false` only the output stays."""
    path = Path(path)
    blocks = []
    for i, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        blocks += cell_markdown(cell, f"{path.name}, cell {i}")
    return "\n\n".join(blocks) + "\n"


def write_readme() -> None:
    "Write the README."
    (ROOT / "README.md").write_text(readme_text(), encoding="utf-8")
