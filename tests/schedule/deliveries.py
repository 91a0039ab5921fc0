"""A group on its way into the lease table, as the dispatcher brings it in."""

from typing import TypeVar

from grpo_actors.schedule.group_criteria import UNJUDGED, Appraisal
from grpo_actors.schedule.lease import Granted, Verdict
from grpo_actors.schedule.leases import LeaseTable

G = TypeVar("G")


def deliver(
    table: LeaseTable[G], granted: Granted, oldest_version: int, group: G, appraisal: Appraisal = UNJUDGED
) -> Verdict:
    verdict = table.judge(granted.lease, granted.attempt, oldest_version)
    if verdict.new:
        table.accept(verdict, group, appraisal)
    elif not verdict.accepted:
        table.refuse(verdict.lease, verdict.attempt)
    return verdict
