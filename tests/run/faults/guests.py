"""Workers that attach to a run, and are killed at will."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from runs import Run, kill, wait_until

#: Seconds in which many workers that start at the same time have joined, on a machine that has other work too.
CROWD_S = 1800.0


class Guests:
    """The workers that have attached to one run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        nursery = [str(Path(__file__).with_name("nursery.py")), str(run.folder)]
        self._nursery = run._spawn(nursery, stdin=subprocess.PIPE)
        #: Names and process ids of those that have not been killed.
        self.alive: dict[str, int] = {}

    def attach(self, *names: str) -> None:
        """Start workers."""
        for name in names:
            self._nursery.stdin.write(f"{name}\n".encode())
            self._nursery.stdin.flush()
            self.alive[name] = int(self._nursery.stdout.readline())

    def wait_until_joined(self, *names: str) -> None:
        def missing() -> set[str]:
            return set(names) - {record["worker"] for record in self._run.records("worker", state="joined")}

        wait_until(lambda: not missing(), "all have joined", CROWD_S)

    def kill(self, *names: str) -> None:
        for name in names:
            kill(self.alive.pop(name))

    def let_no_more_in(self) -> None:
        """Make the nursery end when those who are here have left."""
        self._nursery.stdin.close()

    def end(self) -> None:
        """Kill whoever is still here."""
        if self._nursery.poll() is None:
            self._nursery.stdin.close()
            for name in list(self.alive):
                with contextlib.suppress(ProcessLookupError):  # it has left meanwhile
                    self.kill(name)


@contextlib.contextmanager
def guests_of(run: Run) -> Iterator[Guests]:
    guests = Guests(run)
    try:
        yield guests
    finally:
        guests.end()
