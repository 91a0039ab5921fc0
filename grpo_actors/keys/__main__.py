"""Let other hosts in, on the learner's host: ``grpo keys new NAME | list | revoke NAME``.

``new`` writes one file, which the other host gives with ``--key FILE``. It holds that host's own key and the learner's
public key, and it is secret. ``revoke`` takes effect at once, also for a peer that is connected.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from grpo_actors.errors import RunError, os_errors_in_one_line
from grpo_actors.process import run_command
from grpo_actors.transport.keys import ROLES, KeyFolder

PROGRAM = "python -m grpo_actors.keys"
#: Longest name of a key.
MAX_NAME = 100


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """Build the command line."""
    command = argparse.ArgumentParser(
        prog=prog,
        description="Let workers, evaluators and readers on other hosts in.",
    )
    command.add_argument(
        "--keys-dir",
        type=Path,
        metavar="FOLDER",
        help="transport.keys_dir of the run (default: the default of that setting)",
    )
    what = command.add_subparsers(dest="what", required=True, metavar="new|list|revoke")
    new = what.add_parser("new", help="make a key, and let its holder in")
    new.add_argument("name", metavar="NAME", help="name of the host or person that gets it")
    new.add_argument(
        "--role", choices=ROLES, default=ROLES[0], help="all that its holder may be (default: %(default)s)"
    )
    new.add_argument(
        "--output", type=Path, metavar="FILE", help="the file to give away (default: NAME.key in this folder)"
    )
    what.add_parser("list", help="show the keys that are let in")
    revoke = what.add_parser("revoke", help="let a key in no more, from now on")
    revoke.add_argument("name", metavar="NAME")
    return command


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run the command and return its exit code."""
    given = parser(prog).parse_args(arguments)
    from grpo_actors.config import Config  # noqa: PLC0415 - pydantic is too slow for --help

    folder = KeyFolder(given.keys_dir or Path(Config().transport.keys_dir))
    if given.what == "new":
        _new(folder, given.name, given.role, given.output)
    elif given.what == "revoke":
        folder.revoke(given.name)
        print(f"{given.name} is let in no more")
    else:
        for public, entry in folder.listed().items():
            print(f"{entry.name}  {entry.role}  since {entry.since}  {public}")
    return 0


@os_errors_in_one_line()
def _new(folder: KeyFolder, name: str, role: str, output: Path | None) -> None:
    if not 0 < len(name) <= MAX_NAME or not name.isprintable() or "/" in name or name.startswith("."):
        raise RunError(f"NAME must have 1 to {MAX_NAME} printable characters and no slash, got {name[:40]!r}")
    path = output or Path(f"{name}.key")
    if path.exists():
        raise RunError(f"{path}: is there already; choose another --output, or remove it")
    if not path.parent.is_dir():
        raise RunError(f"{path.parent}: is no folder; choose another --output")
    key = folder.new(name, role)
    try:
        key.write(path)
    except OSError as error:
        folder.revoke(name)  # nobody has it
        raise RunError(f"{path}: cannot be written ({error.strerror}); choose another --output") from None
    print(f"{path}: give it to {name} only, and keep it at mode 600 there. It lets its holder in as {role}.")


if __name__ == "__main__":
    run_command(main)
