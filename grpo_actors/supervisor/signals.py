"""The signals that ask a run to stop, or to pause with all its processes."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from grpo_actors.process import ignores_hangup
from grpo_actors.supervisor.children import Actor


@dataclass
class Signals:
    """The requests to stop that were received. Their handlers only count; the loop acts, where no work is cut in half."""

    count: int = 0
    #: Returns the children that stop and go on with this process.
    family: Callable[[], Sequence[Actor]] = tuple

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count SIGINT, SIGTERM and SIGHUP within the block, and halt at SIGTSTP; then restore the former handlers."""
        handlers = {signal.SIGINT: self._count, signal.SIGTERM: self._count}
        if signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            handlers[signal.SIGTSTP] = self._halt
        if not ignores_hangup():
            handlers[signal.SIGHUP] = self._hang_up
        former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _count(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.count += 1

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        # Shell and kernel may both send it: it never counts as the second Ctrl-C.
        self.count = max(self.count, 1)

    def _halt(self, number: int, frame: FrameType | None) -> None:
        """Stop with all children; return when this process goes on."""
        del frame
        # The children are in groups of their own, which Ctrl-Z does not reach.
        for child in self.family():
            child.halt()
        handler = signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # stops here, unless no shell could let it go on
        signal.signal(number, handler)
        for child in self.family():
            child.go_on()
