"""Write the page of a run as one file: ``grpo report RUN [--output FILE]``; a run does so at its end."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo_actors.errors import RunError
from grpo_actors.page.extra import check_installed
from grpo_actors.process import run_command
from grpo_actors.rundir.folder import REPORT_FILE

PROGRAM = "python -m grpo_actors.report"


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """Build the command line; import nothing slow."""
    command = argparse.ArgumentParser(
        prog=prog,
        description="Write the page of a run as one HTML file that needs no network and names no personal path.",
    )
    command.add_argument("run", type=Path, metavar="RUN", help="a run's output folder")
    command.add_argument(
        "--output", type=Path, metavar="FILE", help=f"the file to write (default: RUN/{REPORT_FILE})"
    )
    # For a run that ends: imports and a first drawing, which take seconds, are done by then.
    command.add_argument("--when-told", action="store_true", help=argparse.SUPPRESS)
    return command


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Write the report and return the exit code."""
    options = parser(prog).parse_args(arguments)
    check_installed()
    from grpo_actors.report.writing import build_report, write_report  # noqa: PLC0415 - an extra, and takes seconds to import

    if options.when_told:
        with contextlib.suppress(RunError):  # no record is there yet
            build_report(options.run)  # what it draws first takes twenty times as long as what it draws again
        sys.stdin.read()
    file = options.output or options.run / REPORT_FILE
    size = write_report(options.run, file)
    print(f"{file} ({size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    run_command(main)
