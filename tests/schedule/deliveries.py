"""Deliver a group to the lease table as the dispatcher does."""

from typing import TypeVar

from grpo_actors.schedule.group_criteria import NOT_FILTERED, FilterResult
from grpo_actors.schedule.lease import Claim, Granted, Verdict
from grpo_actors.schedule.leases import LeaseTable

G = TypeVar("G")


def deliver(
    table: LeaseTable[G],
    granted: Granted,
    oldest_version: int,
    group: G,
    filter_result: FilterResult = NOT_FILTERED,
    *,
    worker: str = "w",
) -> Verdict:
    made = claim(granted, oldest_version, worker)
    verdict = table.judge(made)
    if verdict.new:
        table.accept(verdict, group, filter_result)
    elif not verdict.accepted:
        table.refuse(made)
    return verdict


def claim(granted: Granted, oldest_version: int = 0, worker: str = "w") -> Claim:
    return Claim(worker, granted.lease, granted.attempt, granted.token, oldest_version)
