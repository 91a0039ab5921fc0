"""Run the conversion tool as its command line does."""

import pytest

from grpo_actors.convert import __main__ as convert
from grpo_actors.process import run_command


def run(*arguments: object) -> int:
    """Run the tool; returns the exit code."""
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: convert.main([str(argument) for argument in arguments]))
    return ended.value.code


def refusal(capsys, *arguments: object) -> str:
    """Run the tool, which must end with exit code 2 and one line; returns the line."""
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err
