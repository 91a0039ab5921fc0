"""The command `grpo`: it hands its arguments to the package's commands, and answers for help at once."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from bounds import HANG_S

from grpo_actors import __version__
from grpo_actors.__main__ import COMMANDS, completion, main, parser
from grpo_actors.errors import ConfigError

ROOT = Path(__file__).parents[1]
HEAVY = {"pydantic", "rich", "mlx", "numpy", "msgpack", "transformers", "datasets"}


def python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=HANG_S
    )


def test_the_parsers_of_all_commands_import_nothing_heavy():
    # An interpreter with these modules takes a second and more; one without them a tenth.
    code = (
        "import sys\nfrom grpo_actors.__main__ import COMMANDS, parser\nparser()\n"
        "for command in COMMANDS.values(): command.get(command.parser)('grpo x').format_help()\n"
        "print(*sys.modules)"
    )
    assert HEAVY & set(python("-c", code).stdout.split()) == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_answers_under_its_own_name(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: grpo {name} ")


def test_each_program_of_the_package_answers_under_its_own_name_too():
    for folder in {command.folder for command in COMMANDS.values()}:
        done = python("-m", f"grpo_actors.{folder}", "--help")
        assert done.stdout.startswith(f"usage: python -m grpo_actors.{folder} "), done.stderr


@pytest.mark.parametrize(
    ("name", "needed"),
    [("eval", []), ("export", ["run"]), ("worker", ["--attach", "run"]), ("replay", ["run", "new"])],
)
def test_code_is_allowed_by_name_as_often_as_needed(name, needed):
    command = COMMANDS[name]
    command_line = command.get(command.parser)("grpo")
    allowed = command_line.parse_args([*needed, "--allow", "own.py:f", "--allow", "code_tests"]).allow
    assert (allowed, command_line.parse_args(needed).allow) == (["own.py:f", "code_tests"], [])


@pytest.mark.parametrize(
    ("arguments", "begins"),
    [([], "usage: grpo "), (["--help"], "usage: grpo "), (["--version"], __version__)],
)
def test_without_a_command_it_answers_for_itself(arguments, begins, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(begins)


def test_help_lists_every_command():
    listed = re.findall(r"^  (\w+)  ", parser().format_help(), re.MULTILINE)
    assert listed == list(COMMANDS)


def test_an_unknown_command_is_one_line():
    with pytest.raises(
        ConfigError, match=r"^grpo has no command tran; did you mean train\?; grpo --help lists them$"
    ):
        main(["tran"])
    done = python("-m", "grpo_actors", "tran")
    told = "error: grpo has no command tran; did you mean train?; grpo --help lists them\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_the_exit_code_of_a_command_is_that_of_the_process(tmp_path):
    assert main(["runs", str(tmp_path)]) == 0


def test_a_lack_of_memory_in_an_actors_command_names_the_setting_to_lower():
    code = (
        "import sys\nfrom grpo_actors import __main__ as grpo\nfrom grpo_actors.rollout import __main__ as worker\n"
        "def lacking(*_): raise MemoryError('no more')\nworker.main = lacking\n"
        "sys.argv = ['grpo', 'worker', '--attach', 'run']\ngrpo.console()"
    )
    done = python("-c", code)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: out of memory (no more); lower rollout.")


def test_without_the_package_that_writes_completions_its_name_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)  # Python's own mark: find and import nothing
    with pytest.raises(ConfigError, match=r"^--print-completion: shtab is not installed; pip install shtab$"):
        completion("bash")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_the_completion_of_a_shell_knows_every_command_and_its_options(shell, capsys):
    script = completion(shell)
    assert main(["--print-completion", shell]) == 0
    assert capsys.readouterr().out == f"{script}\n"
    assert [name for name in COMMANDS if name not in script] == []
    for option in ("--dry-run", "--attach", "--peft", "--against"):
        assert option in script or option.removeprefix("--") in script
