"""The pages that a user reads: their code blocks, links and headings, with the generated texts in place."""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

from site_builder import completed  # noqa: E402 - found in docs/

_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A code block: its language, its text, and where it begins."""

    language: str
    text: str
    where: str


class Page:
    """A Markdown file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path.relative_to(ROOT))
        self.source = path.read_text()

    @cached_property
    def text(self) -> str:
        """The source, with what is generated."""
        return completed(self.source)

    @cached_property
    def blocks(self) -> list[Block]:
        """All code blocks that are written by hand."""
        return [
            Block(found[1], found[2], f"{self.name}:{self.source.count(chr(10), 0, found.start()) + 1}")
            for found in _FENCE.finditer(self.source)
        ]

    @cached_property
    def prose(self) -> str:
        """The source without its code blocks."""
        return _FENCE.sub("", self.source)

    @cached_property
    def links(self) -> list[str]:
        """The targets of all links and pictures."""
        return _LINK.findall(re.sub(r"`[^`\n]*`", "", self.prose))

    @cached_property
    def pictures(self) -> list[str]:
        """The targets of all pictures."""
        return _IMAGE.findall(self.prose)

    @cached_property
    def anchors(self) -> set[str]:
        """The anchors that GitHub, and the site, give to the headings."""
        slugs: Counter[str] = Counter()
        anchors = set()
        for heading in _HEADING.findall(_FENCE.sub("", self.text)):
            words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
            slug = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
            anchors.add(f"{slug}-{slugs[slug]}" if slugs[slug] else slug)
            slugs[slug] += 1
        return anchors


SITE = [Page(path) for path in sorted(DOCS.rglob("*.md"))]
PAGES = [
    *(Page(ROOT / name) for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *SITE,
    *(Page(path) for path in sorted((ROOT / "examples").rglob("*.md"))),
]
