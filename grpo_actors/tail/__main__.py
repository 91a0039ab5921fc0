"""Watch a run: ``grpo watch RUN_DIR|ENDPOINT [--key FILE] [--json]``, or in a browser: ``grpo watch RUN_DIR… --web``.

It only reads: the run folder's files and the events socket. It may start late, stop, or be started many
times without any effect on the run. It exits when the run has ended; the page stays until Ctrl-C, and its address works on
this host only, with its token.
"""

import argparse
import os
import sys
import time
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from grpo_actors.errors import GrpoActorsError
from grpo_actors.targets import Target, check_run_folder, open_target

if TYPE_CHECKING:
    from rich.console import RenderableType

    from grpo_actors.observe.records import Record
    from grpo_actors.observe.view import RunView

PROGRAM = "python -m grpo_actors.tail"
#: Seconds between redraws, and between checks whether the run is still alive.
TICK_S = 0.25


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run the command and return its exit code: 0 if the run or the user ended it, 2 for a wrong target."""
    options = _parse(parser(prog), arguments)
    try:
        if options.web:
            _serve([Path(target) for target in options.targets], options.port or 0, opens=options.open)
        else:
            [one] = options.targets
            with closing(open_target(one, options.key)) as target:
                _watch(target, _display(as_json=options.json))
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        # The reader of the pipe has closed it. Python would flush once more at exit, and report an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except GrpoActorsError as error:
        print(f"tail: {error}", file=sys.stderr)
        return 2
    return 0


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """Build the command line; import nothing slow."""
    command = argparse.ArgumentParser(prog=prog, description="Watch a run, live or ended.")
    command.add_argument(
        "targets",
        nargs="+",
        metavar="RUN_DIR|ENDPOINT",
        help="a run's output folder, or ipc://… or tcp://…; with --web: folders, several are overlaid",
    )
    command.add_argument(
        "--key", metavar="FILE", type=Path, help="key of the role reader, for a run on another host"
    )
    command.add_argument("--json", action="store_true", help="print one record per line, for pipes")
    command.add_argument(
        "--web", action="store_true", help="show a page in a browser on this host, until Ctrl-C"
    )
    command.add_argument("--open", action="store_true", help="with --web: open the browser")
    command.add_argument(
        "--port", type=int, metavar="N", help="with --web: port on 127.0.0.1 (default: any free one)"
    )
    return command


def _parse(command: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; refuse options that do not go together."""
    options = command.parse_args(arguments)
    if options.web and (options.json or options.key):
        command.error("--web goes without --json and --key")
    if options.web and (addresses := [target for target in options.targets if "://" in target]):
        command.error(f"--web needs run folders of this host, got {addresses[0]}")
    if not options.web and (options.open or options.port is not None):
        command.error("--open and --port go with --web")
    if not options.web and len(options.targets) > 1:
        command.error("one run, or several with --web")
    return options


def _serve(folders: Sequence[Path], port: int, *, opens: bool) -> None:
    """Show the page of run folders; raises KeyboardInterrupt at Ctrl-C."""
    from grpo_actors.page.extra import check_installed  # noqa: PLC0415

    check_installed()
    for folder in folders:
        check_run_folder(folder)
    from grpo_actors.page.server import serve  # noqa: PLC0415 - an extra, and takes seconds to import

    def show(address: str) -> None:
        print(f"{address}\nCtrl-C ends it", flush=True)
        if opens:
            webbrowser.open(address)

    serve(folders, port, show)


def _watch(target: Target, display: "Display") -> None:
    """Show record after record until the run is over."""
    from grpo_actors.observe.view import RunView  # noqa: PLC0415

    view = RunView()
    with closing(display):
        for record in _records(target):
            if record is not None:
                view = view.apply(record)
            display.show(view, record)
        if view.stop is None and (reason := target.why_over()) is not None:
            display.print_line(reason)


def _records(target: Target) -> Iterator["Record | None"]:
    """Yield records as they arrive, and None for each quiet tick; end with the run."""
    stopped = False
    while True:
        # After a stop, read only what is already there: in a resumed run's file more records follow it.
        record = target.follower.receive(0.0 if stopped else TICK_S)
        yield record
        if record is not None:
            stopped = record["topic"] == "stop"
        elif stopped or target.why_over() is not None:
            return


class Display(Protocol):
    """One way to show a run."""

    def show(self, view: "RunView", record: "Record | None") -> None:
        """Show the view after `record`; `record` is None if only time has passed."""
        ...

    def print_line(self, text: str) -> None:
        """Print one line of text."""
        ...

    def close(self) -> None:
        """Close the display and leave its last state visible."""
        ...


class _JsonLines:
    """JSON output: records as in metrics.jsonl, samples with their texts, flushed one by one."""

    def show(self, view: "RunView", record: "Record | None") -> None:  # noqa: ARG002
        from grpo_actors.observe.records import encode  # noqa: PLC0415

        if record is not None:
            sys.stdout.buffer.write(encode(record) + b"\n")
            sys.stdout.buffer.flush()

    def print_line(self, text: str) -> None:
        print(f"tail: {text}", file=sys.stderr)

    def close(self) -> None:
        pass


class _PlainLines:
    """Plain output: a status line per update, and a line for each important event."""

    def __init__(self) -> None:
        from grpo_actors.observe.view import RunView  # noqa: PLC0415

        #: The view before the record that is to be shown.
        self._before = RunView()

    def show(self, view: "RunView", record: "Record | None") -> None:
        from grpo_actors.observe.status import permanent_note  # noqa: PLC0415
        from grpo_actors.observe.text import status_line  # noqa: PLC0415

        if record is None:
            return
        note = permanent_note(record, self._before)
        self._before = view
        if note is not None:
            self.print_line(note[0])
        elif record["topic"] == "metrics":
            self.print_line(status_line(view))

    def print_line(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


class _Screen:
    """Terminal output: the whole view, redrawn in place; its last state stays visible at the end."""

    def __init__(self) -> None:
        from rich.console import Console  # noqa: PLC0415
        from rich.live import Live  # noqa: PLC0415

        self._console = Console(highlight=False)
        self._live = Live(console=self._console, screen=True, auto_refresh=False)
        self._view: RunView | None = None
        self._drawn_at = float("-inf")
        #: Monotonic time of the last record. Its own time is that of a clock on another host, perhaps, or set back since.
        self._heard_at = time.monotonic()
        self._live.start()

    def show(self, view: "RunView", record: "Record | None") -> None:
        self._view = view
        now = time.monotonic()
        self._heard_at = self._heard_at if record is None else now
        # History arrives at thousands of records a second; a few redraws a second are enough.
        if record is None or now - self._drawn_at >= TICK_S:
            self._drawn_at = now
            self._live.update(self._panel(view, self._console.height), refresh=True)

    def print_line(self, text: str) -> None:
        self.close()
        self._console.print(text, style="yellow", markup=False)

    def close(self) -> None:
        self._live.stop()
        if self._view is not None:
            self._console.print(self._panel(self._view, self._console.height - 1))
            self._view = None

    def _panel(self, view: "RunView", height: int) -> "RenderableType":
        from grpo_actors.tail.panel import panel  # noqa: PLC0415

        return panel(view, self._console.width, height, time.monotonic() - self._heard_at)


def _display(*, as_json: bool) -> Display:
    if as_json:
        return _JsonLines()
    return _Screen() if sys.stdout.isatty() else _PlainLines()


if __name__ == "__main__":
    sys.exit(main())
