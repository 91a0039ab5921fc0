"""The built site: no warning, no request that leaves it, a search that finds a setting, no page wider than a phone."""

import importlib.util
import subprocess
import sys

import pytest
from browser import browser, needs_browser
from pages import DOCS, SITE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(
            importlib.util.find_spec(name) is None
            for name in ("sphinx", "myst_parser", "furo", "sphinx_copybutton")
        ),
        reason="needs the extra docs",
    ),
]
SHOWN = (
    "index",
    "tutorials/first-run",
    "howto/data",
    "concepts/curves",
    "reference/settings",
    "reference/memory",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    options = (
        "--quiet",
        "--fail-on-warning",
        "--keep-going",
        "--builder",
        "html",
        "-d",
        str(folder / "trees"),
    )
    command = [sys.executable, "-m", "sphinx", *options, str(DOCS), str(folder / "html")]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (built.returncode, built.stderr) == (0, "")
    return folder / "html"


def test_each_page_is_built(site):
    pages = [site / page.path.relative_to(DOCS).with_suffix(".html") for page in SITE]
    assert [page for page in pages if not page.is_file()] == []


@needs_browser
def test_the_site_works_from_the_file_system_and_asks_nobody_else(site):
    with browser() as new_tab:
        tab = new_tab()
        for name in SHOWN:
            _open(tab, f"file://{site}/{name}.html")
        _open(tab, f"file://{site}/search.html?q=max_staleness")
        # A setting is an object of its own, and comes first.
        tab.wait(
            "document.querySelector('#search-results li a')?.href.endsWith('settings.html#setting-max_staleness')"
        )
        assert [
            address for address in tab.requests if not address.startswith((f"file://{site}/", "data:"))
        ] == []
        assert tab.errors == []
        tab.close()


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_no_page_is_wider_than_a_phone_and_drawings_follow_the_theme(site, dark):
    with browser() as new_tab:
        tab = new_tab()
        tab.size(390, 844, phone=True)
        tab.dark(on=dark)
        for name in SHOWN:
            _open(tab, f"file://{site}/{name}.html")
            assert tab.evaluate("document.documentElement.scrollWidth") <= 390, name
        _open(tab, f"file://{site}/concepts/actors.html")
        ink, page = (
            tab.evaluate(
                f"getComputedStyle(document.querySelector('{where}')).{what}.match(/\\d+/g).map(Number)"
            )
            for where, what in (("svg.drawing text", "fill"), ("body", "backgroundColor"))
        )
        assert (sum(ink) > sum(page)) is dark
        tab.close()


def _open(tab, address):
    tab.call("Page.navigate", url=address)
    tab.wait(f"document.readyState === 'complete' && location.href === '{address}'")
