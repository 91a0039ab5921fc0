"""The pages lead somewhere, say for whom they are, and are as short as they promise."""

import re
from collections import Counter

import pytest
from pages import DOCS, PAGES, SITE, Page

GUIDES = [page for page in SITE if page.path.parent.name in ("tutorials", "howto", "concepts")]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@each_page
def test_links_and_anchors_lead_somewhere(page):
    by_path = {other.path: other for other in PAGES}
    broken = []
    for link in page.links:
        name, _, anchor = link.partition("#")
        if "://" in name:
            continue  # the network is another matter: `python -m sphinx -b linkcheck docs build/linkcheck`
        target = (page.path.parent / name).resolve() if name else page.path
        other = by_path.get(target)
        if not target.exists() or (anchor and (other is None or anchor not in other.anchors)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_tutorials_howtos_and_concepts_have_less_than_1500_words(page):
    assert len(page.source.split()) < 1500


@pytest.mark.parametrize("page", SITE, ids=lambda page: page.name)
def test_each_page_says_in_its_first_lines_for_whom_it_is(page):
    # The front page offers each reader a way; security and contributing stand beside the README, as their readers expect.
    if page.path == DOCS / "index.md" or page.source.startswith("```{include}"):
        return
    title, _, *opening = page.source.splitlines()
    assert title.startswith("# ")
    assert re.match(r"For (anyone|users|whoever) ", opening[0])


def test_each_page_stands_in_one_table_of_contents():
    listed = Counter(
        str((page.path.parent / f"{name}.md").relative_to(DOCS))
        for page in SITE
        for block in page.blocks
        if block.language == "{toctree}"
        for name in block.text.split("\n\n", 1)[1].split()
    )
    assert listed == Counter(
        str(page.path.relative_to(DOCS)) for page in SITE if page.name != "docs/index.md"
    )


def test_pictures_are_drawn_for_light_and_dark_and_described():
    pictures = [(page, picture) for page in PAGES for picture in page.pictures]
    assert pictures != []
    for page, picture in pictures:
        assert "prefers-color-scheme:dark" in (page.path.parent / picture).read_text()
        assert re.search(rf"!\[[^\]]{{20,}}\]\({re.escape(picture)}\)", page.source)


def test_the_slug_of_a_heading_is_githubs():
    page = Page(DOCS / "development" / "performance.md")
    assert "without-draining-rolloutin_flight_updates" in page.anchors
