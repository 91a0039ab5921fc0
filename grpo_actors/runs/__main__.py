"""List runs: ``grpo runs [FOLDER] [--json]``. It reads only the files of the runs, live or ended."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo_actors.errors import GrpoActorsError, RunError
from grpo_actors.process import run_command

PROGRAM = "python -m grpo_actors.runs"
#: Where the shipped settings put their runs.
OUTPUTS = Path("outputs")


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """Build the command line."""
    command = argparse.ArgumentParser(
        prog=prog, description="List the runs in a folder: state, updates, scores, and how to continue each."
    )
    command.add_argument(
        "folder",
        nargs="?",
        type=Path,
        metavar="FOLDER",
        help=f"folder of runs, or one run (default: {OUTPUTS}, or this folder if there is none)",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object per run")
    return command


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Print the runs, the newest last."""
    given = parser(prog).parse_args(arguments)
    folder: Path = given.folder or (OUTPUTS if OUTPUTS.is_dir() else Path())
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; give one that holds runs")
    from grpo_actors.runs.listing import find_runs, listed  # noqa: PLC0415 - pydantic is too slow for --help

    found = []
    for run_dir in find_runs(folder):
        try:
            found.append(listed(run_dir))
        except GrpoActorsError as error:
            print(f"note: {error}", file=sys.stderr)
    for run in sorted(found, key=lambda run: run.at):
        print(run.as_json() if given.json else "\n".join(run.lines()))
    if not found and not given.json:
        print(f"no run in {folder}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
