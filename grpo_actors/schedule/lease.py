"""One lease: its states, and what is said about it. The table of all of them is `leases`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from grpo_actors.schedule.group_criteria import NOT_FILTERED, FilterResult

G = TypeVar("G")

#: A lease that lost this many workers is set aside with its problem: it may be what kills them.
MAX_LOSSES = 3


@dataclass(frozen=True, slots=True)
class Granted:
    """What a worker is told to sample."""

    lease: int
    attempt: int
    min_version: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of the group of one attempt at a lease; an accepted one with a reason was taken before."""

    lease: int
    attempt: int
    #: That sampled a token of the group.
    oldest_version: int
    accepted: bool
    reason: str = ""

    @property
    def new(self) -> bool:
        """The group is to be kept: it is the first for its lease."""
        return self.accepted and not self.reason


@dataclass(frozen=True, slots=True)
class Cursor:
    """What a resumed run needs: everything before `position` was consumed, passed over, set aside or left out."""

    position: int = 0
    #: Positions at or after `position` that killed their workers, and must not be sampled again.
    set_aside: tuple[int, ...] = ()


#: Of a new run.
START = Cursor()


@dataclass(frozen=True, slots=True)
class Settled:
    """A group that will not be looked at again."""

    position: int
    filter_result: FilterResult
    #: False: it was passed over.
    trained: bool


@dataclass(frozen=True, slots=True)
class Consumption:
    """What one update did to the table."""

    #: In the order of their positions.
    settled: Sequence[Settled] = ()
    #: Positions whose problem was not posed.
    skipped: int = 0
    #: Groups, sampled or under way, that have become too old and are sampled again.
    outdated: int = 0


@dataclass(frozen=True, slots=True)
class Out:
    """A lease is at a worker."""

    worker: str
    since_s: float
    deadline_s: float


@dataclass(slots=True)
class State(Generic[G]):
    """Where an open lease stands: it waits, is out, or has its group."""

    attempt: int = 0
    losses: int = 0
    out: Out | None = None
    group: G | None = None
    #: Of the group; of one that is out, the oldest version that may sample it.
    oldest_version: int = 0
    filter_result: FilterResult = NOT_FILTERED

    @property
    def waiting(self) -> bool:
        """Nobody has it, and it has no group."""
        return self.out is None and self.group is None

    @property
    def suspect(self) -> bool:
        """One loss is bad luck; after two the lease travels alone, so that no other dies with it."""
        return self.losses == MAX_LOSSES - 1

    def take_back(self) -> None:
        """Its group, had or expected, is of no use: sample it again, and refuse what is still on its way."""
        self.attempt += 1
        self.out = self.group = None
        self.filter_result = NOT_FILTERED
