"""What a reader watches: a run folder on this host, or the address of a run on another one.

It only reads. Everything heavy is imported when a target is opened: a command's ``--help`` needs none of it.
"""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from grpo_actors.errors import RunError
from grpo_actors.rundir.folder import ENDPOINTS_FILE, METRICS_FILE, is_locked

if TYPE_CHECKING:
    from grpo_actors.observe.follow import Follower
    from grpo_actors.transport.events import EventSubscriber

#: Seconds to wait for a learner that died and may be restarted.
RESTART_GRACE_S = 15.0


class Target(Protocol):
    """A run to watch."""

    follower: "Follower"

    def why_over(self) -> str | None:
        """Return a line of explanation if no more records can come, else None; called after each quiet tick."""
        ...

    def close(self) -> None:
        """Close files and sockets."""
        ...


class Endpoint:
    """A run known only by its address, for example one on another host."""

    def __init__(self, address: str, key_file: Path | None) -> None:
        from grpo_actors.observe.follow import Follower  # noqa: PLC0415
        from grpo_actors.transport.events import EventSubscriber  # noqa: PLC0415
        from grpo_actors.transport.keys import ClientKey  # noqa: PLC0415

        self._subscriber = EventSubscriber(address, key=ClientKey.read(key_file) if key_file else None)
        self.follower = Follower(self._subscriber, None)

    def why_over(self) -> str | None:
        """Return None always."""
        return None  # silence proves nothing: the connection may be interrupted

    def close(self) -> None:
        """Close the socket."""
        self._subscriber.close()


class RunFolder:
    """A run on this host: its history, its events, and whether its process is alive."""

    def __init__(self, folder: Path) -> None:
        from grpo_actors.observe.follow import Follower  # noqa: PLC0415

        check_run_folder(folder)
        self._folder = folder
        self._subscriber: EventSubscriber | None = None
        self._pid: int | None = None
        self.follower = Follower(None, folder)
        self._connect()
        self._last_alive = time.monotonic() if self._lives() else float("-inf")

    def why_over(self) -> str | None:
        """Return a line once the process has been gone for `RESTART_GRACE_S`; connect again if it is back."""
        self._connect()
        now = time.monotonic()
        if self._lives():
            self._last_alive = now
        if now - self._last_alive < RESTART_GRACE_S:
            return None
        return "the run is over: its process is gone and left no word why"

    def close(self) -> None:
        """Close the files and the socket."""
        self.follower.close()
        if self._subscriber is not None:
            self._subscriber.close()

    def _lives(self) -> bool:
        """Return whether the run's learner is alive, or a run that has none yet holds the folder's lock."""
        return (self._pid is not None and _is_alive(self._pid)) or is_locked(self._folder)

    def _connect(self) -> None:
        """Subscribe to the address in endpoints.json; again when a resumed run has another address."""
        address, self._pid = _read_endpoints(self._folder)
        if address is None or (self._subscriber is not None and self._subscriber.endpoint == address):
            return
        from grpo_actors.transport.events import EventSubscriber  # noqa: PLC0415
        from grpo_actors.transport.keys import read_run_key  # noqa: PLC0415

        if self._subscriber is not None:
            self._subscriber.close()
        key = read_run_key(self._folder)
        self._subscriber = self.follower.source = EventSubscriber(address, key=key)


def check_run_folder(folder: Path) -> None:
    """Check that a run has started in a folder, or is starting. Raises `RunError` with what is missing."""
    if not folder.is_dir():
        raise RunError(f"{folder} is not there; give a run's output folder or an address like ipc://…")
    if not is_locked(folder) and not any((folder / name).exists() for name in (ENDPOINTS_FILE, METRICS_FILE)):
        raise RunError(f"{folder} has no {ENDPOINTS_FILE}: no run has started there; give its output folder")


def open_target(text: str, key_file: Path | None) -> Target:
    """Open a run folder, or an address, which has ``://``.

    Raises:
        RunError: There is no run.
    """
    return Endpoint(text, key_file) if "://" in text else RunFolder(Path(text))


def _read_endpoints(folder: Path) -> tuple[str | None, int | None]:
    """Read the address of the events and the process id; both None if the folder has no live run."""
    if not (folder / ENDPOINTS_FILE).exists():
        return None, None
    from grpo_actors.transport.sockets import Endpoints  # noqa: PLC0415

    try:
        endpoints = Endpoints.read(folder)
    except RunError:
        if (folder / ENDPOINTS_FILE).exists():
            raise
        return None, None  # the run ended just now
    return endpoints.events, endpoints.pid


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # alive, and another user's
        return True
    return True
