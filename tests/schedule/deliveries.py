"""Deliver a group to the lease table as the dispatcher does."""

from typing import TypeVar

from grpo_actors.schedule.group_criteria import NOT_FILTERED, FilterResult
from grpo_actors.schedule.lease import Granted, Verdict
from grpo_actors.schedule.leases import LeaseTable

G = TypeVar("G")


def deliver(
    table: LeaseTable[G],
    granted: Granted,
    oldest_version: int,
    group: G,
    filter_result: FilterResult = NOT_FILTERED,
) -> Verdict:
    verdict = table.judge(granted.lease, granted.attempt, oldest_version)
    if verdict.new:
        table.accept(verdict, group, filter_result)
    elif not verdict.accepted:
        table.refuse(verdict.lease, verdict.attempt)
    return verdict
