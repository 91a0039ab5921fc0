"""The command ``grpo``: gives its arguments to one of the package's commands, each of which has a parser of its own.

A command's modules are imported when it is called, so that ``--help`` answers at once.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from grpo_actors import __version__
from grpo_actors.errors import ConfigError, nearest
from grpo_actors.invocation import SCRIPT
from grpo_actors.out_of_memory import Role
from grpo_actors.process import run_command


@dataclass(frozen=True, slots=True)
class Command:
    """Where a command is, and what it does."""

    #: The folder with its ``__main__.py``.
    folder: str
    help: str
    #: Names in that file: the function that runs it, and the one that builds its parser.
    main: str = "main"
    parser: str = "parser"
    role: Role | None = None

    def get(self, name: str) -> Callable[..., object]:
        """Import the command and return one of its functions."""
        function: Callable[..., object] = getattr(
            importlib.import_module(f"grpo_actors.{self.folder}.__main__"), name
        )
        return function


#: In the order in which a user meets them.
COMMANDS: Mapping[str, Command] = {
    "init": Command("init", "write settings, a reward and a data sample for a task of your own"),
    "trial": Command("train", "try a run before it starts, and say what to change", "trial", "trial_parser"),
    "train": Command("train", "train, or continue a run"),
    "watch": Command("tail", "watch a run, live or ended; --web: in a browser, several overlaid"),
    "report": Command("report", "write the page of a run as one HTML file"),
    "runs": Command("runs", "list the runs below a folder, with scores, and how to continue each"),
    "worker": Command("rollout", "add a rollout worker to a live run", role="worker"),
    "eval": Command("evaluator", "score checkpoints, runs or models on the same problems", role="evaluator"),
    "chat": Command("generate", "chat with a model or a run's best checkpoint", "chat_main", "chat_parser"),
    "generate": Command("generate", "answer one prompt, or a file of prompts"),
    "export": Command("export", "write a model folder, an adapter or a GGUF file of a run"),
    "convert": Command("convert", "make a model folder of a hub model, a GGUF file or nanochat's checkpoint"),
    "replay": Command(
        "learner",
        "train on a run's recorded groups, with another objective",
        "replay",
        "replay_parser",
        "learner",
    ),
    "keys": Command("keys", "let workers and readers on other hosts in"),
    "bench": Command("bench", "measure the parts of a run on this machine"),
}


def parser() -> argparse.ArgumentParser:
    """Build the command line of ``grpo`` itself."""
    width = max(map(len, COMMANDS))
    command = argparse.ArgumentParser(
        prog=SCRIPT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"{SCRIPT} COMMAND …",
        description="Train language models with GRPO on MLX.\n\ncommands:\n"
        + "".join(f"  {name:{width}}  {each.help}\n" for name, each in COMMANDS.items()),
        epilog=f"{SCRIPT} COMMAND --help shows its options. First try: {SCRIPT} train quickstart",
    )
    command.add_argument("--version", action="version", version=__version__)
    command.add_argument(
        "--print-completion",
        metavar="SHELL",
        choices=("bash", "zsh", "tcsh"),
        help="print the completion of a shell: bash, zsh or tcsh",
    )
    return command


def main(arguments: Sequence[str]) -> int:
    """Run the command that the command line names; return its exit code.

    Raises:
        GrpoActorsError: there is no such command, or what the command raises.
    """
    name, *rest = arguments or ["--help"]
    if name.startswith("-"):
        print(completion(parser().parse_args(arguments or ["--help"]).print_completion))
        return 0
    if name not in COMMANDS:
        raise ConfigError(
            f"{SCRIPT} has no command {name}{nearest(name, COMMANDS)}; {SCRIPT} --help lists them"
        )
    command = COMMANDS[name]
    code = command.get(command.main)(rest, f"{SCRIPT} {name}")
    assert isinstance(code, int)
    return code


def completion(shell: str) -> str:
    """Return the script that completes commands, options and files in a shell.

    Raises:
        ConfigError: the package shtab is not installed.
    """
    try:
        import shtab  # noqa: PLC0415 - nothing else needs it
    except ImportError:
        raise ConfigError("--print-completion: shtab is not installed; pip install shtab") from None
    whole = argparse.ArgumentParser(prog=SCRIPT)
    parts = whole.add_subparsers()
    for name, command in COMMANDS.items():
        part = command.get(command.parser)(f"{SCRIPT} {name}")
        assert isinstance(part, argparse.ArgumentParser)
        parts.add_parser(name, help=command.help, parents=[part], add_help=False)
    return str(shtab.complete(whole, shell))


def console() -> None:
    """Run ``grpo`` and leave the process with its exit code."""
    arguments = sys.argv[1:]
    named = COMMANDS.get(arguments[0]) if arguments else None
    run_command(partial(main, arguments), named.role if named else None)


if __name__ == "__main__":
    console()
