"The glossary of the tutorial, and the links from its pages to the reports."

import json
import re
from pathlib import Path

import pytest
from atm_sae.evals.absorption import AbsorptionConfig

FOLDER = Path(__file__).resolve().parent.parent / "nbs" / "tutorial"
GLOSSARY = FOLDER / "glossary.md"
PAGES = sorted([*FOLDER.glob("[1-9]_*.ipynb"), *FOLDER.glob("*.md")])


def prose(path):
    "All text of a chapter or of a page in Markdown."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_out_of_the_tutorial_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)\)", prose(path))
    outside = [link for link in links if link.startswith("../")]
    assert [link for link in outside if not (FOLDER / link).exists()] == []


@pytest.mark.parametrize("path", sorted(FOLDER.glob("[1-9]_*.ipynb")), ids=lambda path: path.stem)
def test_the_marker_of_a_method_names_its_architecture(path):
    "`method_style` gives all bases one marker; `curve_style` gives each its own."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    assert "method_style" not in code


def test_the_glossary_has_one_sentence_for_each_term():
    rows = re.findall(r"^\| \*\*(.+)\*\* \| (.+) \|$", prose(GLOSSARY), re.M)
    terms = [term for term, _ in rows]
    assert len(terms) >= 50 and len(set(terms)) == len(terms)
    assert [m for _, m in rows if not m.endswith(".") or re.search(r"\. [A-Z]", m)] == []


def test_the_glossary_names_the_thresholds_of_the_scores():
    config = AbsorptionConfig()
    assert f"by more than {config.jump}" in prose(GLOSSARY)
    assert f"at least {config.share:.0%} of the projection" in prose(GLOSSARY)
