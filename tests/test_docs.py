"""What README and docs/ tell a reader to type, click or set exists."""

import importlib.util
import re
from pathlib import Path

import pytest

from grpo_actors.__main__ import COMMANDS
from grpo_actors.config.schema import OWNER

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("**/*.md")),
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@each_page
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@each_page
def test_settings_that_are_set_exist(page):
    keys = re.findall(r"--set ([a-z_.]+)=", page.read_text())
    assert [key for key in keys if key.rpartition(".")[2] not in OWNER] == []


@each_page
def test_programs_of_the_package_exist(page):
    modules = set(re.findall(r"python -m (grpo_actors[\w.]*)", page.read_text()))
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


@each_page
def test_commands_exist(page):
    code = re.findall(r"`grpo ([a-z]\w*)|^ *grpo ([a-z]\w*)", page.read_text(), re.MULTILINE)
    assert [name for name in map("".join, code) if name not in COMMANDS] == []


@each_page
def test_configurations_that_are_named_exist(page):
    text = page.read_text()
    names = re.findall(r"--config ([a-z0-9_]+)\.toml", text) + re.findall(
        r"grpo (?:train|trial) ([a-z0-9_]+)", text
    )
    assert [
        name for name in names if not (ROOT / "configs" / f"{name}.toml").is_file() and name != "your"
    ] == []
