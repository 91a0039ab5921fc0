"""A run that this program has started: its events, its end, its results.

The run is a process of its own, ``grpo train``, with the actors as its children. It writes its events to a file that has no
name, so that nobody has to read them in time, and follows this process through a pipe (`train.caller`). Loads no MLX.
"""

import atexit
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from grpo_actors.config import Config
from grpo_actors.errors import RunError, os_errors_in_one_line
from grpo_actors.observe.sinks import read_records
from grpo_actors.observe.status import StatusLine
from grpo_actors.rundir.checkpoints import best
from grpo_actors.rundir.folder import METRICS_FILE
from grpo_actors.score import Score
from grpo_actors.tasks.own.caller import ADDRESS
from grpo_actors.tasks.own.child_process import search_path
from grpo_actors.tasks.own.serving import Serving

#: Seconds between two looks at the file of events.
LOOK_S = 0.05
#: Begins the line with which a process of this package refuses or fails.
_ERROR = "error: "

Event = dict[str, Any]

#: Runs that have not ended: leaving this process stops them.
_live: "set[Run]" = set()


class Run:
    """A training that `train` has started.

    Iterate over it for its events, in order and from the first one, also afterwards and more than once. It ends when the
    run ends. An event is a dict with ``time`` and ``topic``: the records of ``metrics.jsonl`` (``start``, ``metrics``,
    ``eval``, ``checkpoint``, ``sample``, ``alarm``, ``stop`` …), and ``phase``, ``note`` and ``closing``, which are meant
    for people.

        >>> for event in run:                                              # doctest: +SKIP
        ...     if event["topic"] == "metrics":
        ...         print(event["update"], event["reward_mean"])

    The run goes on next to this program until it ends, `stop` is called, or this program ends.
    """

    #: The run folder, an absolute path.
    folder: Path
    #: The settings, resolved.
    config: Config
    #: Name -> function of this program that the run calls.
    functions: Mapping[str, Callable[..., Any]]

    def __init__(self, config: Config, functions: Mapping[str, Callable[..., Any]]) -> None:
        """Start the run; `train` calls this.

        Raises:
            RunError: The system has no process or no temporary file for it.
            RewardError: The functions cannot be served.
        """
        self.folder = Path(config.run.output_dir).absolute()
        self.config = config
        self.functions = dict(functions)
        self._owner = os.getpid()
        self._opened_s = time.time()
        self._stops = 0
        self._ended = threading.Event()
        #: Bytes of events that `wait` has shown.
        self._shown = 0
        with os_errors_in_one_line(), contextlib.ExitStack() as opened:
            # Files without names: nothing is left of them, however this process ends.
            self._events = opened.enter_context(tempfile.TemporaryFile())
            self._errors = opened.enter_context(tempfile.TemporaryFile())
            self._serving = opened.enter_context(Serving(self.functions)) if self.functions else None
            served = {} if self._serving is None else {ADDRESS: self._serving.address}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "grpo_actors.train", "--caller"],
                stdin=subprocess.PIPE,
                stdout=self._events,
                stderr=self._errors,
                env={**os.environ, **served, "PYTHONPATH": search_path()},
                # Neither Ctrl-C nor the end of the terminal reaches it: this process decides.
                start_new_session=True,
            )
            # Not at the exit, where the run is to be stopped before.
            weakref.finalize(self, opened.pop_all().close).atexit = False
        _live.add(self)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; its error says why
            self._process.stdin.write(config.model_dump_json().encode() + b"\n")
            self._process.stdin.flush()
        threading.Thread(target=self._watch, name="grpo-actors-run", daemon=True).start()

    @property
    def is_live(self) -> bool:
        """Whether the run has not ended."""
        return not self._ended.is_set()

    @property
    def best(self) -> Path | None:
        """The folder of the checkpoint that scored best so far; None before there is one that beats the base model."""
        marked = best(self.folder)
        return self.folder / marked.checkpoint if marked is not None and marked.update else None

    @property
    def score(self) -> Score | None:
        """The best score so far, with ``value``, ``low`` and ``high`` (95 %), also of the base model; None before the first."""
        marked = best(self.folder)
        return None if marked is None else marked.score

    def metrics(self) -> Any:
        """Return the figures of all updates so far: a pandas frame if pandas is installed, else a list of dicts.

        Each update has a row. Its columns are the fields of the ``metrics`` records in ``metrics.jsonl``; those with several
        values are spread, as ``rewards/correctness``. The updates before a resume are included.
        """
        file = self.folder / METRICS_FILE
        records = read_records(file) if file.is_file() else self._parsed(self._lines(deadline_s=0.0))
        rows = [_flat(record) for record in records if record["topic"] == "metrics"]
        try:
            import pandas as pd  # noqa: PLC0415 - optional, and takes half a second
        except ImportError:
            return rows
        return pd.DataFrame(rows).set_index("update") if rows else pd.DataFrame()

    def wait(self, timeout_s: float | None = None, *, show: bool = True) -> Self:
        """Wait until the run ends; return this object.

        If it is interrupted (Ctrl-C, the stop button of a notebook), the run goes on: wait again, or `stop` it.

        Args:
            timeout_s: Seconds to wait at most; None: no limit.
            show: Whether to print the run's progress to standard error meanwhile, as ``grpo train`` does.

        Raises:
            RunError: The run has failed. The text has its folder and its own error.
            TimeoutError: It has not ended within `timeout_s`; it goes on.
        """
        deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        if show:
            self._show(deadline_s)
        left_s = None if timeout_s is None else max(0.0, deadline_s - time.monotonic())
        if not self._ended.wait(left_s):
            raise TimeoutError(f"{self.folder}: the run goes on after {timeout_s:g} s")
        self._raise_if_failed()
        return self

    def stop(self) -> Self:
        """Stop the run and wait for its end; return this object. The first call lets it finish its step and write a checkpoint.

        If that takes too long, interrupt the call and call it again: the second one stops the run at once. A run that
        has ended stays as it is.

        Raises:
            RunError: The run has failed before, or did so meanwhile.
        """
        self._ask_to_stop()
        self._ended.wait()
        self._raise_if_failed()
        return self

    def __iter__(self) -> Iterator[Event]:
        """Yield the events until the run ends. Raises RunError at the end of a run that has failed."""
        yield from self._parsed(self._lines())
        self._raise_if_failed()

    def __repr__(self) -> str:
        state = "live" if self.is_live else f"ended with {self._process.returncode}"
        return f"<Run {self.folder}, {state}>"

    def begin(self) -> None:
        """Return once the checks of the start are passed; `train` calls this.

        Raises:
            RunError: The run was refused. The text has its folder and the reason.
        """
        lines = self._lines()
        # The first event says that the checks begin. Without a second one the run has ended.
        if next(lines, None) is None or next(lines, None) is None:
            self._raise_if_failed()

    def _ask_to_stop(self) -> None:
        if self.is_live:
            self._stops += 1
            self._process.send_signal(signal.SIGTERM)

    def _watch(self) -> None:
        """Wait for the process, and release what the run has needed."""
        self._process.wait()
        if self._serving is not None:
            self._serving.close()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        _live.discard(self)
        self._ended.set()

    def _lines(self, offset: int = 0, deadline_s: float = math.inf) -> Iterator[tuple[int, bytes]]:
        """Yield the complete lines of the events from `offset` on, each with the offset of its end.

        Ends with the run, or after the monotonic time `deadline_s` once all lines that are there are read.
        """
        rest = b""
        while True:
            # Asked before the read: what was written until then is read.
            is_over = self._ended.is_set() or time.monotonic() >= deadline_s
            data = os.pread(self._events.fileno(), 2**16, offset + len(rest))
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                offset += len(line) + 1
                yield offset, line
            if not data:
                if is_over:
                    return
                self._ended.wait(LOOK_S)

    @staticmethod
    def _parsed(lines: Iterator[tuple[int, bytes]]) -> Iterator[Event]:
        for _, line in lines:
            yield json.loads(line)

    def _show(self, deadline_s: float) -> None:
        """Print the run's progress until it ends, or the monotonic time `deadline_s`."""
        settings, now_s = self.config, self._opened_s

        def clock() -> float:
            return now_s

        with StatusLine(
            settings.learner.max_updates or None,
            every_updates=settings.metrics.logging_steps,
            clock=clock,
        ) as status:
            for offset, line in self._lines(self._shown, deadline_s):
                event = json.loads(line)
                self._shown, now_s = offset, event["time"]
                match event["topic"]:
                    case "phase":
                        status.begin(event["text"])
                    case "note":
                        status.print_line(event["text"])
                    case "closing":
                        status.print_closing(event["facts"], event["commands"])
                    case "headcount":
                        pass  # a note has said so
                    case _:
                        status.show(event)

    def _raise_if_failed(self) -> None:
        code = self._process.returncode
        was_killed = self._stops > 1 or (self._stops and code == -signal.SIGTERM)
        if not code or was_killed:
            return
        raise RunError(f"{self.folder}: {self._error() or f'the run ended with {code}'}")

    def _error(self) -> str:
        """Return the run's last error line, or else the last line that it has printed."""
        size = os.fstat(self._errors.fileno()).st_size
        printed = os.pread(self._errors.fileno(), 2**16, max(0, size - 2**16)).decode(errors="replace")
        said = [
            event["text"] for event in self._parsed(self._lines(deadline_s=0.0)) if event["topic"] == "note"
        ]
        lines = [line for line in [*said, *printed.splitlines()] if line.strip()]
        # An actor's line begins with its name, the learner's does not.
        errors = [line for line in lines if line.startswith(_ERROR)] or [
            line for line in lines if f": {_ERROR}" in line
        ]
        last: str = (errors or lines or [""])[-1]
        return last.removeprefix(_ERROR)


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a record by name; those of an inner mapping as ``rewards/correctness``."""
    row: dict[str, Any] = {"update": record["update"]}
    for name, value in record.items():
        if isinstance(value, Mapping):
            row |= {f"{name}/{inner}": item for inner, item in value.items()}
        elif name not in ("topic", "session") and not isinstance(value, list):
            row[name] = value
    return row


@atexit.register
def _stop_all() -> None:
    """Stop the runs of this process, which ends: all of them as after one Ctrl-C, after another Ctrl-C at once."""
    runs = [run for run in tuple(_live) if run._owner == os.getpid()]  # noqa: SLF001 - of this module, as all below
    for run in runs:
        print(
            f"{run.folder}: the program ends, so the run finishes its step, writes a checkpoint and stops",
            file=sys.stderr,
        )
        run._ask_to_stop()  # noqa: SLF001
    try:
        for run in runs:
            run._ended.wait()  # noqa: SLF001
    except KeyboardInterrupt:
        for run in runs:
            run._ask_to_stop()  # noqa: SLF001
    for run in runs:
        try:
            run._ended.wait()  # noqa: SLF001
            run._raise_if_failed()  # noqa: SLF001
        except RunError as error:
            print(f"{_ERROR}{error}", file=sys.stderr)
