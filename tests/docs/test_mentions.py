"""What the pages tell a reader to set or type, also in the middle of a sentence, exists."""

import importlib.util
import re

import pytest
from pages import PAGES, ROOT

from grpo_actors.__main__ import COMMANDS
from grpo_actors.config.schema import OWNER

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
#: Names of files that a reader makes.
THEIRS = {"your", "mac", "gpu"}


@each_page
def test_settings_that_are_set_exist(page):
    keys = re.findall(r"--set '?([a-z_.]+)=", page.source)
    assert [key for key in keys if key.rpartition(".")[2] not in OWNER] == []


@each_page
def test_programs_of_the_package_exist(page):
    modules = set(re.findall(r"python -m (grpo_actors(?:\.[a-z_]+)*)", page.source))
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


@each_page
def test_commands_exist(page):
    code = re.findall(r"`grpo ([a-z]\w*)|^ *grpo ([a-z]\w*)", page.source, re.MULTILINE)
    assert [name for name in map("".join, code) if name not in COMMANDS] == []


@each_page
def test_configurations_that_are_named_exist(page):
    names = re.findall(r"(?:--config |grpo (?:train|trial) )([a-z0-9_]+)(?:\.toml)?(?=[ `\n])", page.source)
    assert [
        name for name in names if not (ROOT / "configs" / f"{name}.toml").is_file() and name not in THEIRS
    ] == []


def test_pages_that_the_package_names_exist():
    files = [
        *(ROOT / "grpo_actors").rglob("*.py"),
        *(ROOT / "configs").glob("*.toml"),
        *(ROOT / "tests").rglob("*.py"),
    ]
    named = {name for file in files for name in re.findall(r"(?<![\w/])docs/[\w/-]+\.md", file.read_text())}
    assert named != set()
    assert [name for name in named if not (ROOT / name).is_file()] == []
