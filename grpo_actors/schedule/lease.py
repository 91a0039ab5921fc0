"""One lease: its state, and the records that the lease table returns about it. The table is in `leases`.

Every grant raises the attempt number of the lease, and the table takes only a group of the last attempt (fencing).
A lease whose worker dies is granted again unchanged, with the same seeds::

    grant("a") -> lease 7, attempt 1     worker "a" falls silent: release("a")
    grant("b") -> lease 7, attempt 2
    judge(7, attempt=1) -> refused       the late group of "a"; the group of attempt 2 is accepted
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from grpo_actors.schedule.group_criteria import NOT_FILTERED, FilterResult

G = TypeVar("G")

#: A lease that lost this many workers is set aside: its problem may be what kills them.
MAX_LOSSES = 3


@dataclass(frozen=True, slots=True)
class Granted:
    """One lease granted to a worker: the worker samples its group with a policy of at least `min_version`."""

    lease: int
    attempt: int
    min_version: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision about the group of one attempt. Accepted with a reason: a repeat of a group already taken."""

    lease: int
    attempt: int
    #: Oldest policy version that sampled a token of the group.
    oldest_version: int
    accepted: bool
    reason: str = ""

    @property
    def new(self) -> bool:
        """Return whether the group is to be kept: it is the first for its lease."""
        return self.accepted and not self.reason


@dataclass(frozen=True, slots=True)
class Cursor:
    """The point from which a resumed run continues.

    Every position before `position` was consumed, passed over, set aside, left out or skipped.
    """

    position: int = 0
    #: Positions at or after `position` that killed their workers; they must not be sampled again.
    set_aside: tuple[int, ...] = ()


#: The cursor of a new run.
START = Cursor()


@dataclass(frozen=True, slots=True)
class Settled:
    """A group with a final outcome: it was trained or passed over."""

    position: int
    filter_result: FilterResult
    #: False if the group was passed over.
    trained: bool


@dataclass(frozen=True, slots=True)
class Consumption:
    """The effect of one update on the table."""

    #: Groups that were trained or passed over, in the order of their positions.
    settled: Sequence[Settled] = ()
    #: Number of positions whose problem was not posed.
    skipped: int = 0
    #: Number of groups, sampled or being sampled, that became too old and are sampled again.
    outdated: int = 0


@dataclass(frozen=True, slots=True)
class Out:
    """The worker that holds a lease, and its deadline."""

    worker: str
    since_s: float
    deadline_s: float


@dataclass(slots=True)
class State(Generic[G]):
    """The state of an open lease: it waits, is out at a worker, or has its group."""

    attempt: int = 0
    losses: int = 0
    out: Out | None = None
    group: G | None = None
    #: Oldest version that sampled the group; while the lease is out, the oldest version that may sample it.
    oldest_version: int = 0
    filter_result: FilterResult = NOT_FILTERED

    @property
    def waiting(self) -> bool:
        """Return whether no worker holds the lease and it has no group."""
        return self.out is None and self.group is None

    @property
    def suspect(self) -> bool:
        """Return whether the lease must be granted alone.

        One loss is bad luck. After two, the lease may kill its worker, and no other lease should be lost with it.
        """
        return self.losses == MAX_LOSSES - 1

    def take_back(self) -> None:
        """Discard the group, present or expected, so that the lease is sampled again.

        The new attempt number makes the table refuse a group of the old attempt that is still on its way.
        """
        self.attempt += 1
        self.out = self.group = None
        self.filter_result = NOT_FILTERED
