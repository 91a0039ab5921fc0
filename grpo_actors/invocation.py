"""How a user calls this program: the commands that it prints work when they are pasted into the same shell.

The environment may not be activated, the package not installed, and several environments may exist. Imports nothing
heavy.
"""

import importlib.metadata
import json
import os
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path

#: The console script.
SCRIPT = "grpo"

_FOLDER = Path(__file__).parents[1]


def pasted(*words: object, within: Path | None = None) -> str:
    """Return the command line of ``grpo WORDS`` as the user's shell takes it now: ``.venv/bin/grpo watch outputs/run``.

    Args:
        words: The command and its arguments.
        within: The folder to go to before; None: the working folder.
    """
    here = Path.cwd()
    there = here if within is None else within.resolve()
    command = shlex.join([*_program(there), *map(str, words)])
    return command if there == here else f"cd {shlex.quote(str(within))} && {command}"


@cache
def _program(folder: Path) -> tuple[str, ...]:
    """Return the words that start this program in a folder."""
    script, python = (Path(sys.executable).with_name(name) for name in (SCRIPT, "python"))
    if _is_installed() and os.access(script, os.X_OK):
        return (_called(script, folder),)
    found = _is_installed() or folder == _FOLDER
    return (
        *(() if found else ("env", f"PYTHONPATH={_FOLDER}")),
        _called(python, folder),
        "-m",
        "grpo_actors",
    )


def _called(program: Path, folder: Path) -> str:
    """Return a program as a shell in this folder takes it: its name if that is found, else a path."""
    if shutil.which(program.name) == str(program):
        return program.name
    return str(program.relative_to(folder) if program.is_relative_to(folder) else program)


def _is_installed() -> bool:
    """Return whether this package belongs to the environment, and does not come from PYTHONPATH or launch.py's folder."""
    try:
        found = importlib.metadata.distribution("grpo-actors")
    except importlib.metadata.PackageNotFoundError:
        return False
    editable = json.loads(found.read_text("direct_url.json") or "{}").get("url")
    return editable == _FOLDER.as_uri() or Path(str(found.locate_file(""))) == _FOLDER
