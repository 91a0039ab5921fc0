"""Write the files of a new task: ``grpo init [FOLDER]``.

Settings with comments, a reward and a sample of problems. They train as they are, so that every change can be tried
against something that works.
"""

import argparse
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from grpo_actors.errors import RunError
from grpo_actors.process import run_command

PROGRAM = "python -m grpo_actors.init"
#: Files that are copied, and the sample of problems, which is made.
COPIED = ("grpo.toml", "rewards.py")
PROBLEMS = "problems.jsonl"
#: Problems of the sample.
COUNT = 320


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """Build the command line."""
    command = argparse.ArgumentParser(
        prog=prog,
        description="Write settings, a reward and a data sample for a task of your own; they train as they are.",
    )
    command.add_argument(
        "folder",
        nargs="?",
        default=Path(),
        type=Path,
        metavar="FOLDER",
        help="folder to write to (default: this one)",
    )
    return command


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Write the files; all or none."""
    folder: Path = parser(prog).parse_args(arguments).folder
    for name in (*COPIED, PROBLEMS):
        if (folder / name).exists():
            raise RunError(f"{folder / name}: is there already; choose another FOLDER, or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in COPIED:
            (folder / name).write_bytes((files(__package__) / "files" / name).read_bytes())
        (folder / PROBLEMS).write_text(sample(), encoding="utf-8")
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror}); choose another FOLDER") from error
    from grpo_actors.invocation import pasted  # noqa: PLC0415 - importlib.metadata costs as much as --help may

    print(
        f"{folder / COPIED[0]}       settings, with comments\n"
        f"{folder / COPIED[1]}      a reward of yours\n"
        f"{folder / PROBLEMS}  {COUNT} problems with answers\n"
        "They train as they are. Change them, and try each change:"
    )
    print("\n".join(f"  {pasted(command, within=folder)}" for command in ("trial", "train")))
    return 0


def sample() -> str:
    """Return the problems as JSON Lines: sums in words that the embedded model has met."""
    from grpo_actors.tasks.arithmetic import Arithmetic  # noqa: PLC0415 - not for --help

    lines = []
    for problem in Arithmetic(seed=0, train_size=COUNT).problems("train"):
        (question,) = problem.messages
        row = {"question": question["content"], "answer": int(problem.answer)}
        lines.append(f"{json.dumps(row, ensure_ascii=False)}\n")
    return "".join(lines)


if __name__ == "__main__":
    run_command(main)
