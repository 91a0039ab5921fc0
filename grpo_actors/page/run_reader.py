"""One run of the page: a thread that follows its records and its samples, and answers with what it knows.

The records come from the run folder; while the run lives, its events socket wakes the reader, so that a record is there
within milliseconds.
"""

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_actors.errors import DataError, GrpoActorsError, RunError
from grpo_actors.page.run_state import RunState
from grpo_actors.page.sample_filter import SampleFilter
from grpo_actors.page.samples import Samples
from grpo_actors.page.settings import config_of
from grpo_actors.page.views import run_view
from grpo_actors.rundir.folder import GROUPS_FILE
from grpo_actors.targets import RunFolder

#: Longest wait for a record in seconds; then the run's files and its process are looked at.
TICK_S = 0.25
#: Seconds for which records or groups are read before a reader of the page gets its turn.
SLICE_S = 0.05
#: Groups listed at a time.
GROUPS_LISTED = 200


class RunReader:
    """A run that is read in the background; its methods may be called from any thread."""

    def __init__(self, folder: Path, changed: Callable[[], None]) -> None:
        """Open a run folder.

        Args:
            folder: The run folder.
            changed: Called in the reader's thread when there is something new.

        Raises:
            RunError: There is no run.
        """
        self.folder = folder
        self.name = folder.resolve().name
        self.state = RunState()
        #: Guards all fields.
        self.lock = threading.Lock()
        self._target = RunFolder(folder)
        self._changed = changed
        self._over: str | None = None
        self._samples: Samples | None = None
        self._reading_samples = False
        self._stopping = threading.Event()
        self._caught_up = threading.Event()
        self._error: GrpoActorsError | None = None
        self._thread = threading.Thread(target=self._read, name=f"reader of {self.name}", daemon=True)

    def start(self) -> None:
        """Start to read; return once everything that was there has been read. Raises what the reader raised."""
        self._thread.start()
        self._caught_up.wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread and close the files."""
        self._stopping.set()
        self._thread.join()
        self._target.close()
        if self._samples is not None:
            self._samples.close()

    def view(self, first: float = -math.inf, last: float = math.inf) -> dict[str, Any]:
        """Return everything but the samples (`run_view`)."""
        with self.lock:
            return run_view(self.state, over=self._over, first=first, last=last)

    def groups(self, wanted: SampleFilter) -> dict[str, Any]:
        """Return the newest groups that match: ``groups``, their number ``matching``, of ``total``; ``unit`` and ``reading``."""
        with self.lock:
            samples = self._samples
            found = [] if samples is None else samples.find(wanted)
            return {
                "groups": [] if samples is None else [samples.listed(one) for one in found[:GROUPS_LISTED]],
                "matching": len(found),
                "total": 0 if samples is None else len(samples.entries),
                "unit": "tokens" if samples is None else samples.unit,
                "reading": self._reading_samples,
            }

    def group(self, position: int) -> dict[str, Any]:
        """Return one group. Raises `DataError` if there is none."""
        with self.lock:
            if self._samples is None:
                raise DataError(f"{self.name}: has no samples yet, got position {position}")
            return self._samples.read(position).as_json()

    def _read(self) -> None:
        try:
            while not self._stopping.is_set():
                self._turn()
        except GrpoActorsError as error:
            self._end_with(error)
        except OSError as error:
            self._end_with(RunError(f"{self.folder}: cannot be read: {error}"))
        finally:
            self._caught_up.set()

    def _end_with(self, error: GrpoActorsError) -> None:
        """Tell why nothing more is read: else the page would show for ever that the run goes on."""
        self._error = error
        with self.lock:
            self._over = str(error)
        self._changed()

    def _turn(self) -> None:
        """Read what is new; wait if nothing is."""
        waits = self._caught_up.is_set() and not self._reading_samples
        follower = self._target.follower
        record = follower.receive(TICK_S if waits else 0.0)
        if record is None and waits and follower.source is None:
            self._stopping.wait(TICK_S)  # without events nothing has waited
        is_news = record is not None
        with self.lock:
            deadline = time.monotonic() + SLICE_S
            while record is not None:
                self.state.apply(record)
                record = follower.receive(0.0) if time.monotonic() < deadline else None
            if not is_news:
                over = self._target.why_over()
                is_news, self._over = over != self._over, over
                is_news |= self._read_samples()
                self._caught_up.set()
        if is_news and self._caught_up.is_set():
            self._changed()
        if self._reading_samples:
            # A lock goes to the first that asks: without a pause, that is this thread again.
            self._stopping.wait(SLICE_S / 4)

    def _read_samples(self) -> bool:
        """Add new groups to the index for a while; return whether there were any."""
        self._choose_samples()
        if self._samples is None:
            return False
        before = len(self._samples.entries)
        self._reading_samples = self._samples.catch_up(SLICE_S)
        return len(self._samples.entries) != before

    def _choose_samples(self) -> None:
        """Open the samples once the settings are known; open them again when recorded groups become readable."""
        start = self.state.view.start
        if start is None or (self._samples is not None and self._samples.has_tokens):
            return
        if self._samples is not None and not (self.folder / GROUPS_FILE).is_file():
            return
        opened = Samples(self.folder, config_of(start))
        if self._samples is None or opened.has_tokens:
            self._samples, former = opened, self._samples
        else:
            former = opened
        if former is not None:
            former.close()
