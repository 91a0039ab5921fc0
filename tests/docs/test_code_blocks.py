"""Every code block of the pages is what it claims to be: commands parse, settings load, programs run."""

import argparse
import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import PAGES, ROOT, Block

from grpo_actors.__main__ import COMMANDS
from grpo_actors.config import load_config
from grpo_actors.config.load import find_config
from grpo_actors.errors import ConfigError
from grpo_actors.observe.records import encode, make_record

BLOCKS = [block for page in PAGES for block in page.blocks]
#: Languages that hold no program: printed texts, drawings that GitHub makes, and Sphinx's own directives.
OTHERS = {"text", "mermaid", "{toctree}", "{include}", "{eval-rst}"}
#: Program of a command line -> why its arguments are not checked here.
PROGRAMS = {
    "pip": "installs; the names of our extras are checked below",
    "python3": "makes a virtual environment",
    "source": "enters it",
    "cd": "enters a folder of the repository",
    "jupyter": "opens a notebook; it is no dependency",
    "mlx.launch": "starts a command on several hosts; a part of MLX",
    "unzip": "unpacks a wheel of others",
    "tensorboard": "a tracker's own command",
    "uv": "installs",
}
#: Module that a page runs -> why its arguments are not checked here.
MODULES = {
    "mlx_lm": "mlx-lm's own commands",
    "venv": "Python's own",
    "pytest": "CONTRIBUTING's way to run one test",
    "grpo_actors.kernels": "its parser is inside its main function",
}
#: First line of a Python block -> why it is compiled but not run.
NOT_RUN = {
    "from grpo_actors.api import evaluate, generate, train": "is a whole run: tests/run/test_api_run.py executes it",
    'run = train(model="Qwen/Qwen2.5-0.5B-Instruct", data=rows, rewards=[brevity], max_updates=100)': "needs the hub",
    'model = load(run)  # or "outputs/mine", a checkpoint, a model folder, a hub id': "needs a run",
    "from peft import AutoPeftModelForCausalLM": "needs peft and a trained adapter",
    "import json, zmq": "follows a live run without end",
    "from trl.rewards import get_soft_overlong_punishment": "needs TRL",
    "@pytest.mark.faults  # without it, a test of this folder also runs in `make test`": "is a whole run with a fault",
}
#: Text in a Python block that is a piece of a file of ours -> that file, whose names it uses.
PIECES = {
    "def spo_loss": "grpo_actors.objective.losses",
    "LOSSES: dict": "grpo_actors.config.objective",
    "TASKS: dict": "grpo_actors.config.data",
}


def of(*languages: str) -> "pytest.MarkDecorator":
    blocks = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", blocks, ids=lambda block: block.where)


def test_each_block_names_its_language():
    known = {"sh", "toml", "python", "json", *OTHERS}
    assert [block.where for block in BLOCKS if block.language not in known] == []


@of("sh")
def test_commands_parse_and_their_settings_load(block, adapter, monkeypatch):
    monkeypatch.chdir(adapter)
    for line in _commands(block):
        for words in _split_at_and(shlex.split(line, comments=True)):
            _check(words, block)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Return a folder with the adapter that a page starts from: settings that name one are read from it."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "adapters" / "sft").mkdir(parents=True)
    (folder / "adapters" / "sft" / "adapters.safetensors").touch()
    described = {"num_layers": -1, "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0}}
    (folder / "adapters" / "sft" / "adapter_config.json").write_text(json.dumps(described))
    return folder


@of("toml")
def test_settings_load(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.toml").write_text(block.text)
    load_config(tmp_path / "settings.toml")


@of("json")
def test_json_is_json(block):
    for line in block.text.splitlines():
        json.loads(line)


@of("python")
def test_programs_run(block, tmp_path, monkeypatch):
    text = textwrap.dedent(block.text)
    if "return" in text and not re.search(r"^(async )?def |^class ", text, re.MULTILINE):
        text = "def piece(A, r, name, numbers):\n" + textwrap.indent(text, "    ")
    compile(ast.parse(text), block.where, "exec")
    if text.splitlines()[0] in NOT_RUN:
        return
    names = {"__name__": "block"}
    for start, module in PIECES.items():
        if start in text:
            names |= vars(importlib.import_module(module))
    _make_run(tmp_path / "outputs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    exec(compile(text, block.where, "exec"), names)  # noqa: S102 - our own examples


def test_what_is_not_run_is_still_there():
    firsts = {block.text.splitlines()[0] for block in BLOCKS if block.language == "python"}
    assert NOT_RUN.keys() <= firsts


def test_extras_that_are_installed_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        extra
        for page in PAGES
        for names in re.findall(r"grpo-actors\[([\w,]+)\]", page.source)
        for extra in names.split(",")
    }
    assert named - extras.keys() == set()


def _commands(block: Block) -> Iterator[str]:
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line


def _split_at_and(words: list[str]) -> Iterator[list[str]]:
    start = 0
    for index, word in enumerate([*words, "&&"]):
        if word == "&&":
            yield words[start:index]
            start = index + 1


def _check(words: list[str], block: Block) -> None:
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    if program == "grpo":
        _parse(arguments)
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in arguments if "=" not in word} <= targets
    elif program == "python" and arguments[:1] == ["-m"]:
        name, *arguments = arguments[1:]
        if name not in MODULES:
            _parse_with(importlib.import_module(f"{name}.__main__").parser(), arguments)
    elif program == "python":
        assert (ROOT / arguments[0]).is_file()
    else:
        assert program in PROGRAMS, f"{block.where}: {program} is not known here"


def _parse(arguments: list[str]) -> None:
    name, *rest = arguments
    if name.startswith("-"):
        return
    command = COMMANDS[name]
    parsed = _parse_with(command.get(command.parser)(f"grpo {name}"), rest)
    config = getattr(parsed, "config", None) or getattr(parsed, "config_option", None)
    load_config(_shipped(config or ""), getattr(parsed, "overrides", []))


def _parse_with(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    with contextlib.redirect_stderr(io.StringIO()) as complaint:
        try:
            return parser.parse_args(arguments)
        except SystemExit:
            pytest.fail(complaint.getvalue())


def _shipped(config: str) -> Path | None:
    """Return the settings that a command line names; None, the defaults, if they are a file that the reader makes."""
    try:
        return find_config(config) if config else None
    except ConfigError:
        return None


def _make_run(run_dir: Path) -> None:
    """Write what a block reads of a run."""
    run_dir.mkdir(parents=True)
    record = make_record(1, 0.0, "metrics", {"update": 1, "reward_mean": 0.5})
    (run_dir / "metrics.jsonl").write_bytes(encode(record) + b"\n")
