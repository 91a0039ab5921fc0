"""Watch a run: ``python -m grpo_actors.tail RUN_DIR|ENDPOINT [--json]``.

Reads only: the run folder's files and the events socket. It may come late, leave, be stopped or be
started fifty times; the run does not notice. It ends by itself when the run has ended.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from grpo_actors.errors import GrpoActorsError, RunError
from grpo_actors.rundir.folder import ENDPOINTS_FILE, METRICS_FILE

if TYPE_CHECKING:
    from rich.console import RenderableType

    from grpo_actors.observe.follow import Follower
    from grpo_actors.observe.records import Record
    from grpo_actors.observe.view import RunView
    from grpo_actors.transport.events import EventSubscriber

#: Between two looks at the screen and at whether the run is still there.
TICK_S = 0.25
#: A learner that died may be started again: so long is waited for it.
RESTART_GRACE_S = 15.0


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 0 when the run ended or the user did, 2 for a wrong target."""
    options = _parser().parse_args(arguments)
    try:
        with closing(_target(options.target)) as target:
            _watch(target, _display(as_json=options.json))
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        # The reader of the pipe has had enough. Python would flush once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except GrpoActorsError as error:
        print(f"tail: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m grpo_actors.tail", description="Watch a run, live or ended."
    )
    parser.add_argument(
        "target", metavar="RUN_DIR|ENDPOINT", help="a run's output folder, or ipc://… or tcp://…"
    )
    parser.add_argument("--json", action="store_true", help="one record a line, for pipes")
    return parser


class Target(Protocol):
    """What is watched."""

    follower: "Follower"

    def why_over(self) -> str | None:
        """Asked in each quiet moment: a line if nothing more can come, else None."""
        ...

    def close(self) -> None:
        """Let go of files and sockets."""
        ...


class _Endpoint:
    """A run of which only the address is known: another host's, for example."""

    def __init__(self, address: str) -> None:
        from grpo_actors.observe.follow import Follower  # noqa: PLC0415
        from grpo_actors.transport.events import EventSubscriber  # noqa: PLC0415

        self._subscriber = EventSubscriber(address)
        self.follower = Follower(self._subscriber, None)

    def why_over(self) -> str | None:
        return None  # silence proves nothing: the link may be cut

    def close(self) -> None:
        self._subscriber.close()


class _RunFolder:
    """A run on this host: its history, its events, and whether its process lives."""

    def __init__(self, folder: Path) -> None:
        from grpo_actors.observe.follow import Follower  # noqa: PLC0415

        if not folder.is_dir():
            raise RunError(f"{folder} is not there; give a run's output folder or an address like ipc://…")
        self._path = folder / ENDPOINTS_FILE
        if not self._path.exists() and not (folder / METRICS_FILE).exists():
            raise RunError(
                f"{folder} has no {ENDPOINTS_FILE}: no run has started there; give its output folder"
            )
        self._subscriber: EventSubscriber | None = None
        self._pid: int | None = None
        self.follower = Follower(None, folder)
        self._connect()
        alive = self._pid is not None and _is_alive(self._pid)
        self._last_alive = time.monotonic() if alive else float("-inf")

    def why_over(self) -> str | None:
        self._connect()
        now = time.monotonic()
        if self._pid is not None and _is_alive(self._pid):
            self._last_alive = now
        if now - self._last_alive < RESTART_GRACE_S:
            return None
        return "the run is over: its process is gone and left no word why"

    def close(self) -> None:
        self.follower.close()
        if self._subscriber is not None:
            self._subscriber.close()

    def _connect(self) -> None:
        """Subscribe where endpoints.json says; anew when a resumed run has moved."""
        address, self._pid = _read_endpoints(self._path)
        if address is None or (self._subscriber is not None and self._subscriber.endpoint == address):
            return
        from grpo_actors.transport.events import EventSubscriber  # noqa: PLC0415

        if self._subscriber is not None:
            self._subscriber.close()
        self._subscriber = self.follower.source = EventSubscriber(address)


def _target(text: str) -> Target:
    return _Endpoint(text) if "://" in text else _RunFolder(Path(text))


def _read_endpoints(path: Path) -> tuple[str | None, int | None]:
    """Address of the events and process id; both None where there is no such file."""
    try:
        endpoints: Any = json.loads(path.read_bytes())
        return str(endpoints["events"]), int(endpoints["pid"])
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(
            f"{path} must name events and pid ({error}); start the run anew or give its address"
        ) from error


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # alive, and another user's
        return True
    return True


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
            display.say(reason)


def _records(target: Target) -> Iterator["Record | None"]:
    """Records as they come, None for each quiet tick; ends with the run."""
    stopped = False
    while True:
        # After a stop only what is already here: a resumed run's history goes on behind it.
        record = target.follower.receive(0.0 if stopped else TICK_S)
        yield record
        if record is not None:
            stopped = record["topic"] == "stop"
        elif stopped or target.why_over() is not None:
            return


class Display(Protocol):
    """One way to show a run."""

    def show(self, view: "RunView", record: "Record | None") -> None:
        """The view after `record`; None when only time has passed."""
        ...

    def say(self, text: str) -> None:
        """A last word."""
        ...

    def close(self) -> None:
        """Leave the last state standing."""
        ...


class _JsonLines:
    """Records as they stand in metrics.jsonl, samples with their texts; flushed one by one."""

    def show(self, view: "RunView", record: "Record | None") -> None:  # noqa: ARG002
        from grpo_actors.observe.records import encode  # noqa: PLC0415

        if record is not None:
            sys.stdout.buffer.write(encode(record) + b"\n")
            sys.stdout.buffer.flush()

    def say(self, text: str) -> None:
        print(f"tail: {text}", file=sys.stderr)

    def close(self) -> None:
        pass


class _PlainLines:
    """A status line an update, and a line for each event that matters."""

    def show(self, view: "RunView", record: "Record | None") -> None:
        from grpo_actors.observe.status import permanent_note  # noqa: PLC0415
        from grpo_actors.observe.text import status_line  # noqa: PLC0415

        if record is None:
            return
        note = permanent_note(record)
        if note is not None:
            self.say(note[0])
        elif record["topic"] == "metrics":
            self.say(status_line(view))

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


class _Screen:
    """The whole view, redrawn in place; its last state stays when it ends."""

    def __init__(self) -> None:
        from rich.console import Console  # noqa: PLC0415
        from rich.live import Live  # noqa: PLC0415

        self._console = Console(highlight=False)
        self._live = Live(console=self._console, screen=True, auto_refresh=False)
        self._view: RunView | None = None
        self._drawn_at = float("-inf")
        self._live.start()

    def show(self, view: "RunView", record: "Record | None") -> None:
        self._view = view
        now = time.monotonic()
        # History comes in thousands of records a second; a screen is read a few times a second.
        if record is None or now - self._drawn_at >= TICK_S:
            self._drawn_at = now
            self._live.update(self._panel(view, self._console.height), refresh=True)

    def say(self, text: str) -> None:
        self.close()
        self._console.print(text, style="yellow", markup=False)

    def close(self) -> None:
        self._live.stop()
        if self._view is not None:
            self._console.print(self._panel(self._view, self._console.height - 1))
            self._view = None

    def _panel(self, view: "RunView", height: int) -> "RenderableType":
        from grpo_actors.observe.panel import panel  # noqa: PLC0415

        return panel(view, self._console.width, height, time.time())


def _display(*, as_json: bool) -> Display:
    if as_json:
        return _JsonLines()
    return _Screen() if sys.stdout.isatty() else _PlainLines()


if __name__ == "__main__":
    sys.exit(main())
