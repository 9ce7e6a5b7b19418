"""README.md is nbs/index.ipynb as Markdown. Write it with `python tests/readme.py`."""

import json, posixpath, re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def relink(text, folder="nbs"):
    "Relative links and pictures of a notebook in `folder`, as seen from the project's root."

    def move(match):
        target = match[2]
        if re.match(r"[a-z]+:|[#/]", target):
            return match[0]
        return match[1] + posixpath.normpath(posixpath.join(folder, target))

    return re.sub(r'(\]\(|src=")([^)"\s]+)', move, text)


def fenced(text, language=""):
    "`text` as a code block."
    return f"```{language}\n{text.rstrip()}\n```"


def output_markdown(output, where):
    "One output of a code cell as Markdown; ValueError for a picture, which a README cannot hold."
    if output["output_type"] == "stream":
        return fenced("".join(output["text"]))
    if output["output_type"] == "error":
        raise ValueError(
            f"{where} ended with {output['ename']}: mend it before it becomes the README"
        )
    data = output["data"]
    if any(kind.startswith("image/") for kind in data):
        raise ValueError(
            f"{where} draws a picture: show the file in reports/figures with ![](../reports/figures/NAME.png) instead"
        )
    if "text/markdown" in data:
        return relink("".join(data["text/markdown"])).strip()
    return fenced("".join(data["text/plain"]))


def joined(outputs):
    "Outputs of a cell, with what it printed in pieces in one."
    out = []
    for o in outputs:
        if out and o["output_type"] == out[-1]["output_type"] == "stream":
            out[-1] = out[-1] | {"text": [*out[-1]["text"], *o["text"]]}
        else:
            out.append(o)
    return out


def cell_markdown(cell, where):
    "The blocks that one cell gives: none if it is hidden."
    source = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown":
        return [relink(source)] if source else []
    if cell["cell_type"] != "code" or re.search(r"^#\|\s*hide\s*$", source, re.M):
        return []
    code = "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip()
    shown = bool(code) and not re.search(r"^#\|\s*echo:\s*false\s*$", source, re.M)
    return [fenced(code, "python")] * shown + [
        output_markdown(o, where) for o in joined(cell["outputs"])
    ]


def readme_text(path=ROOT / "nbs" / "index.ipynb"):
    "The notebook at `path` as Markdown; cells with `#| hide` are left out, of cells with `#| echo: false` only the output stays."
    path = Path(path)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    blocks = [
        block
        for i, cell in enumerate(cells)
        for block in cell_markdown(cell, f"{path.name}, cell {i}")
    ]
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme_text(), encoding="utf-8")
