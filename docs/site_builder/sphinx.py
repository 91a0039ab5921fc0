"""The extension that Sphinx loads (`conf.py`)."""

import html
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

from grpo_actors.config.schema import OWNER
from site_builder import completed

#: A setting as the pages write it: ``key``, ``section.key``, or one of these with `` = value``.
_SETTING = re.compile(r"(?:([a-z]+)\.)?([a-z0-9_]+)(?: ?=.*)?")
#: What an SVG file has before its root element.
_PROLOGUE = re.compile(r"^.*?(?=<svg\b)", re.DOTALL)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the generated texts, the settings as objects, and inline drawings."""
    app.connect("source-read", _complete)
    app.connect("doctree-read", _link_settings)
    app.connect("doctree-resolved", _inline_drawings)
    app.add_object_type("setting", "setting", objname="setting", parse_node=_parse_setting)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def _complete(_app: Sphinx, _page: str, source: list[str]) -> None:
    source[0] = completed(source[0])


def _parse_setting(_env: BuildEnvironment, text: str, node: addnodes.desc_signature) -> str:
    """Show ``section.leaf = default``; the leaf, which is unique, is the name."""
    name, _, default = text.partition(" = ")
    section, _, leaf = name.partition(".")
    node += addnodes.desc_addname("", f"{section}.")
    node += addnodes.desc_name("", leaf)
    node += addnodes.desc_annotation("", f" = {default}")
    return leaf


def _link_settings(app: Sphinx, document: nodes.document) -> None:
    """Make each mention of a setting a link to its entry.

    A short name, such as `loss`, is also that of other things: it counts only with its section.
    """
    for node in list(document.findall(nodes.literal)):
        match = _SETTING.fullmatch(node.astext())
        if match is None or node.parent is None or isinstance(node.parent, nodes.reference):
            continue
        section, leaf = match.groups()
        if OWNER.get(leaf) is None or not (section == OWNER[leaf] or (section is None and "_" in leaf)):
            continue
        link = addnodes.pending_xref(
            "", reftype="setting", refdomain="std", reftarget=leaf, refdoc=app.env.docname, refwarn=True
        )
        node.replace_self(link)
        link += node


def _inline_drawings(app: Sphinx, document: nodes.document, _page: str) -> None:
    """Put the drawings into the page: an image of its own does not know whether the reader has chosen light or dark."""
    if app.builder.format != "html":
        return
    for image in list(document.findall(nodes.image)):
        if not image["uri"].endswith(".svg"):
            continue
        text = _PROLOGUE.sub("", (Path(app.srcdir) / image["uri"]).read_text())
        label = html.escape(image.get("alt", ""), quote=True)
        text = text.replace("<svg ", f'<svg class="drawing" role="img" aria-label="{label}" ', 1)
        image.replace_self(nodes.raw("", text, format="html"))
