"""The records of the learners of one start, which the supervisor follows: a learner that crashed may have a successor."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from grpo_actors.errors import RunError
from grpo_actors.observe.follow import Follower
from grpo_actors.observe.reading import session_of
from grpo_actors.observe.records import Record
from grpo_actors.rundir.folder import ENDPOINTS_FILE
from grpo_actors.transport.events import EventSubscriber
from grpo_actors.transport.keys import read_run_key
from grpo_actors.transport.sockets import Endpoints


class LearnerRecords:
    """Follows the records from the time at which the first learner listens."""

    def __init__(self, run_dir: Path, endpoint: str) -> None:
        """Keep the paths; `endpoint` is the address of the events."""
        self._run_dir, self._endpoint = run_dir, endpoint
        self._stack = contextlib.ExitStack()
        self._follower: Follower | None = None
        #: Process id of the last learner that has written its endpoints.
        self._listening_pid: int | None = None
        #: Sessions of the learners of this start. A resumed run has shown the records of others before.
        self._sessions: set[str] = set()
        #: Monotonic time at which the first learner was found to listen; None before.
        self.listening_since_s: float | None = None

    def look_for(self, learner_pid: int) -> bool:
        """Follow the learner with this process id if it listens; return whether it is the first, found just now."""
        if learner_pid == self._listening_pid or not (self._run_dir / ENDPOINTS_FILE).exists():
            return False
        with contextlib.suppress(RunError):  # it has just ended
            written = Endpoints.read(self._run_dir)
            if written.pid == learner_pid:  # else a killed run has left them
                self._listening_pid = learner_pid
                self._sessions.add(written.session)
        if self._listening_pid is None or self._follower is not None:
            return False
        # Not earlier: a subscriber that cannot connect retries after longer and longer pauses.
        events = EventSubscriber(self._endpoint, key=read_run_key(self._run_dir))
        self._follower = self._stack.enter_context(Follower(self._stack.enter_context(events), self._run_dir))
        self.listening_since_s = time.monotonic()
        return True

    def receive(self, wait_s: float) -> Iterator[Record]:
        """Yield the new records; wait up to `wait_s` for the first."""
        if self._follower is None:
            time.sleep(wait_s)
            return
        while (record := self._follower.receive(wait_s)) is not None:
            if session_of(record) in self._sessions:
                yield record
            wait_s = 0.0

    def close(self) -> None:
        """Disconnect."""
        self._stack.close()
