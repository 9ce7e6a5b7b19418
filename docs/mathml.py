"""A Sphinx extension: formulas become MathML while the site is built.

Browsers draw MathML themselves, so the site needs neither MathJax nor a network."""

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx


def inline(writer, node: nodes.math) -> None:
    "A formula in a sentence."
    writer.body.append(convert(node.astext(), display="inline"))
    raise nodes.SkipNode


def block(writer, node: nodes.math_block) -> None:
    "A formula on lines of its own."
    formula = convert(node.astext(), display="block")
    writer.body.append(f'<div class="formula">{formula}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)
