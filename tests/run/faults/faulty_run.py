"""A run that must survive what a test does to it, and that is checked when it is over."""

import contextlib
import re
import signal
from collections.abc import Sequence

from checker import broken_promises
from runs import Run

from grpo_actors.errors import RunError
from grpo_actors.transport.sockets import Endpoints
from grpo_actors.transport.weights.shared_memory import MEMORY, PREFIX

#: Seconds that workers which have joined a run may take to leave when it is over.
PATIENCE_S = 60.0
#: A defect shows one; that of a user's own reward stands within a warning.
TRACEBACK = re.compile(r"^([\w-]+: )?Traceback", re.MULTILINE)
#: Starts of one run: more are needed only if it never ends.
MAX_STARTS = 20


class FaultyRun(Run):
    """A run that is started again, by the same command, as often as a fault ends it."""

    def __init__(self, *arguments, **settings) -> None:
        super().__init__(*arguments, record_groups=True, **settings)
        #: Exit codes of all starts that have ended.
        self.exit_codes: list[int] = []
        #: Process ids of all learners that have listened.
        self.learners: set[int] = set()
        #: Of every start.
        self.arguments: Sequence[str] = ()

    def start(self, *arguments: str) -> Run:
        return super().start(*self.arguments, *arguments)

    def wait_for_update(self, update: int) -> None:
        super().wait_for_update(update)
        with contextlib.suppress(RunError):  # it has ended meanwhile
            self.learners.add(Endpoints.read(self.folder).pid)

    def end(self, deadline_s: float = 900.0) -> int:
        """Wait for launch.py, and check the words with which it ended."""
        code = super().end(deadline_s)
        self.exit_codes.append(code)
        assert not TRACEBACK.search(self.stderr), self.stderr
        return code

    def end_well(self) -> None:
        """Let the run reach its last update, starting it again if it ends before; check all promises."""
        while self.end():
            assert len(self.exit_codes) < MAX_STARTS, self.stderr
            self.start()
        assert self.updates() == self.settings["max_updates"]
        self.check_promises()

    def stop_well(self) -> None:
        """Stop the run as Ctrl-C does; check all promises."""
        self.signal(signal.SIGINT)
        assert self.end() == 0, self.stderr
        self.check_promises()

    def check_promises(self) -> None:
        for process in self._started:
            process.wait(PATIENCE_S)
        assert broken_promises(self.folder) == []
        self.assert_nothing_left()
        left = {path.name for learner in self.learners for path in MEMORY.glob(f"{PREFIX}{learner}-*")}
        assert left == set()
