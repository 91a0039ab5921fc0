"""Look at runs in a browser: ``grpo watch --web RUN… [--open] [--port N]``.

It only reads. The address works on this host only, holds a token, and is closed when the command ends.
"""

import argparse
import importlib.util
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from grpo_actors.errors import ConfigError
from grpo_actors.process import run_command
from grpo_actors.tail.targets import check_run_folder

PROGRAM = "python -m grpo_actors.page"
#: The packages of the extra.
EXTRA = ("bokeh", "starlette", "uvicorn")


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """Build the command line; import nothing slow."""
    command = argparse.ArgumentParser(
        prog=prog,
        description="Look at runs, live or ended, in a browser on this host.",
    )
    command.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's output folder; several are overlaid"
    )
    command.add_argument("--open", action="store_true", help="open the browser")
    command.add_argument(
        "--port", type=int, default=0, metavar="N", help="port on 127.0.0.1 (default: any free one)"
    )
    return command


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Serve until Ctrl-C; return the exit code."""
    options = parser(prog).parse_args(arguments)
    check_installed()
    for run in options.runs:
        check_run_folder(run)
    from grpo_actors.page.server import serve  # noqa: PLC0415 - an extra, and takes seconds to import

    def show(address: str) -> None:
        print(f"{address}\nCtrl-C ends it", flush=True)
        if options.open:
            webbrowser.open(address)

    try:
        serve(options.runs, options.port, show)
    except KeyboardInterrupt:
        return 0
    return 0


def check_installed() -> None:
    """Check that the extra is installed. Raises `ConfigError` with the command that installs it."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the page needs {', '.join(missing)}: pip install 'grpo-actors[page]'")


if __name__ == "__main__":
    run_command(main)
