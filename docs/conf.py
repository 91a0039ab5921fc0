"""How Sphinx builds the site: ``make docs``. Everything comes from this folder and the package; nothing from the network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import grpo_actors

project = "grpo_actors"
copyright = "the authors of grpo_actors"  # noqa: A001 - Sphinx reads this name
release = version = grpo_actors.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "site_builder.sphinx",
]
exclude_patterns = ["site_builder", "concepts/curves"]
# The anchors of headings are GitHub's, so that a link works there and here.
myst_heading_anchors = 4
myst_enable_extensions = ["attrs_block"]
# `name` in a docstring is code.
default_role = "code"
autodoc_typehints = "description"
autodoc_member_order = "bysource"

smartquotes = False  # a text setting is "in straight quotes"

html_theme = "furo"
html_title = "grpo_actors"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
# Pygments has no lexer for some texts shown as they are printed; those blocks are `text`.
highlight_language = "text"
