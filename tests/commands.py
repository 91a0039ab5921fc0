"""The package's commands, run within the process of the tests: a process of their own imports for seconds.

For what a command answers. Signals, pipes, terminals and what a fresh process loads need a real one; so does each command
once.
"""

import contextlib
import faulthandler
import importlib.util
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from grpo_actors.process import PRINT_STACKS, run_command

ROOT = Path(__file__).parents[1]
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_here(
    main: Callable[[], int],
    *arguments: object,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> "CompletedProcess[str]":
    """Run a command as its process would, to its exit code; nothing that it changes in this process stays."""
    words = [str(argument) for argument in arguments]
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
        _restored(["command", *words], environment or os.environ),
        contextlib.chdir(cwd or Path.cwd()),
    ):
        # Files, not texts in memory: a command may give a descriptor of theirs away.
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            run_command(main)
        printed = [(stream.seek(0), stream.read())[1] for stream in (out, err)]
    return CompletedProcess(words, ended.value.code, *printed)


def launch_here(
    *arguments: object, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> "CompletedProcess[str]":
    """Run launch.py so. For what it refuses or only prints: its actors would be children of the tests."""
    return run_here(partial(_launch().main, prog="launch.py"), *arguments, cwd=cwd, environment=environment)


def _launch():
    spec = importlib.util.spec_from_file_location("launch", ROOT / "launch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _restored(argv: list[str], environment: Mapping[str, str]) -> Iterator[None]:
    """Set what a new process is given; put back what was there."""
    before = sys.argv, dict(os.environ), tempfile.tempdir
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    sys.argv = argv
    _replace_environment(environment)
    tempfile.tempdir = None  # that of TMPDIR
    try:
        yield
    finally:
        faulthandler.unregister(PRINT_STACKS)
        sys.argv, _, tempfile.tempdir = before
        _replace_environment(before[1])
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _replace_environment(values: Mapping[str, str]) -> None:
    values = dict(values)
    os.environ.clear()
    os.environ.update(values)
