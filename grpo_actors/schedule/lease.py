"""One lease: its state, and the records that the lease table returns about it. The table is in `leases`.

Every grant raises the attempt number of the lease and draws a random token. The table takes a group only from the
worker of the last grant, and only with its token (fencing). A lease whose worker dies is granted again unchanged, with
the same seeds::

    grant("a") -> lease 7, attempt 1, token 83     worker "a" falls silent: release("a")
    grant("b") -> lease 7, attempt 2, token 19
    judge("a", 7, attempt 1, token 83) -> refused  the late group of "a"
    judge("c", 7, attempt 2, token 44) -> refused  invented by "c", and the lease stays with "b"
    judge("b", 7, attempt 2, token 19) -> accepted
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from grpo_actors.schedule.group_criteria import NOT_FILTERED, FilterResult

G = TypeVar("G")

#: A lease that lost this many workers, or groups with wrong contents, is set aside: its problem may be the cause.
MAX_LOSSES = 3


@dataclass(frozen=True, slots=True)
class Granted:
    """One lease granted to a worker: the worker samples its group with a policy of at least `min_version`."""

    lease: int
    attempt: int
    min_version: int
    #: Random: only its worker can return it.
    token: int


@dataclass(frozen=True, slots=True)
class Claim:
    """What comes with a group: its sender, the grant that it claims to answer, and the versions that sampled it."""

    worker: str
    lease: int
    attempt: int
    token: int
    #: Oldest policy version that sampled a token of the group.
    oldest_version: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision about a claim. Accepted with a reason: a repeat of a group already taken."""

    claim: Claim
    accepted: bool
    reason: str = ""
    #: Whether there was no such grant: no fault of the network explains the claim.
    forged: bool = False

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
    """The time of a grant whose group is awaited, and its deadline."""

    since_s: float
    deadline_s: float


@dataclass(slots=True)
class State(Generic[G]):
    """The state of an open lease: it waits, is out at a worker, or has its group."""

    attempt: int = 0
    #: The worker of the last grant, also while its group is here; "" once the lease was given back or refused.
    worker: str = ""
    token: int = 0
    losses: int = 0
    #: Workers whose groups for it were faulty.
    faulted: set[str] = field(default_factory=set)
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

    def is_out_at(self, worker: str) -> bool:
        """Return whether the group of this worker is awaited."""
        return self.out is not None and self.worker == worker

    def was_granted(self, claim: Claim) -> bool:
        """Return whether the claim answers the last grant: its attempt, with its token."""
        return (self.attempt, self.token) == (claim.attempt, claim.token)

    def give_back(self) -> None:
        """End the last grant without a loss: its group is not taken any more."""
        self.out, self.worker = None, ""

    def take_back(self) -> None:
        """Discard the group, present or expected, so that the lease is sampled again.

        The new attempt number tells the worker of a group that is still on its way why it is refused.
        """
        self.give_back()
        self.attempt += 1
        self.group = None
        self.filter_result = NOT_FILTERED
