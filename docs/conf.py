"Settings of Sphinx for the site; docs/make_site.py says which folder it reads."

import sys
from importlib.resources import files
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "atm-sae"
author = "The atm-sae developers"
copyright = "2026 onwards, the atm-sae developers"
extensions = ["myst_nb", "mathml"]

# the outputs that the notebooks were saved with
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 4
# `site:PATH` is a file of the site that is no page
myst_url_schemes = {"http": None, "https": None, "mailto": None, "site": {"url": "{{path}}"}}
# "ref.python": two modules have a class Experiment
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "ref.python"]

html_theme = "furo"
html_title = "atm-sae"
# the font of formulas: without one, browsers place exponents badly
FONT = files("ziamath") / "fonts/STIXTwoMath-Regular.ttf"
html_static_path = [str(Path(__file__).parent / "site.css"), str(FONT)]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False
html_copy_source = False
# a browser reads no excerpts of other pages from file://
html_show_search_summary = False
maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True
