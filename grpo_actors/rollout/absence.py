"""Where a worker's learner is, and how long the worker waits for one that is gone. Imports nothing heavy."""

import contextlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpo_actors.errors import RunError
from grpo_actors.process import is_supervised

if TYPE_CHECKING:
    from grpo_actors.transport.keys import ClientKey

#: Seconds without a learner after which the worker says so and looks for it elsewhere. It looks again after twice as long,
#: and at least every LONGEST_LOOK_S.
ABSENT_S = 2.0
LONGEST_LOOK_S = 30.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a learner is."""

    #: Address of its control socket.
    endpoint: str
    #: What its sockets ask for; None: nothing.
    key: "ClientKey | None" = None


@dataclass
class Absence:
    """The learner's absence, during which a worker waits."""

    find: Callable[[], Place]
    #: Where the learner was.
    place: Place
    patience_s: float
    #: Length of the absence at which it is looked for again; its double the next time.
    _next_s: float = ABSENT_S

    def look(self, gone_s: float) -> Place | None:
        """Return where the learner is now, if it has moved; `gone_s`: seconds since it could be reached.

        Raises:
            RunError: it has been gone for too long.
        """
        if gone_s > self.patience_s:
            raise RunError(f"{self.place.endpoint}: the learner has been gone for {self.patience_s:g} s")
        if gone_s < ABSENT_S:
            if self._next_s > ABSENT_S:
                print_by_hand("the learner is back")
            self._next_s = ABSENT_S
            return None
        if gone_s < self._next_s:
            return None
        if self._next_s == ABSENT_S:
            until = "" if self.patience_s == math.inf else f" for up to {self.patience_s:g} s (--patience)"
            print_by_hand(f"the learner is gone; waiting{until}")
        self._next_s = min(2 * gone_s, gone_s + LONGEST_LOOK_S)
        return self.find_other()

    def find_other(self) -> Place | None:
        """Return where the learner is now, if it is elsewhere or has another key."""
        with contextlib.suppress(RunError):  # there is none yet
            found = self.find()
            return None if found == self.place else found
        return None


def print_by_hand(text: str) -> None:
    """Print a line if a user started this worker by hand; a worker of launch.py leaves this to the records."""
    if not is_supervised():
        print(text, file=sys.stderr)
