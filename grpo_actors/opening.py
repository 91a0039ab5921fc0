"""What an exchange is opened with, from a run's settings: its lease table, its problems, its selection."""

from collections.abc import Mapping, Sequence
from math import ceil

from grpo_actors.appraisal import appraiser
from grpo_actors.config import Config
from grpo_actors.exchange.exchange import Selection, Supply
from grpo_actors.groups import SampledGroup
from grpo_actors.policy.model import Policy
from grpo_actors.schedule.curriculum import Curriculum
from grpo_actors.schedule.lease import Cursor
from grpo_actors.schedule.leases import LeaseTable
from grpo_actors.schedule.order import ProblemOrder
from grpo_actors.tasks.task import Problem, Task


def lease_table(
    config: Config, *, version: int, total_updates: int, cursor: Cursor
) -> LeaseTable[SampledGroup]:
    """The ledger of a run that has done `version` of its updates."""
    groups, selection = config.groups_per_update, config.selection
    replaces = selection.replaces_groups
    return LeaseTable(
        groups_per_update=groups,
        max_staleness=config.rollout.max_staleness,
        batch_groups=config.rollout.batch_groups,
        # The clock runs from the grant, and a run waits for as many as its worker holds besides.
        lease_timeout_s=config.rollout.lease_timeout_s * (config.rollout.runs_held - 1),
        version=version,
        # Problems that are set aside are made up for by later ones: only versions end the run.
        last_version=total_updates,
        cursor=cursor,
        refill_limit=selection.refill_limit * groups if replaces else 0,
        ahead=ceil(selection.oversampling * groups) if replaces else groups,
    )


def supply_of(config: Config, problems: Sequence[Problem], policy: Policy) -> Supply:
    """The problems of a run, as the policy's tokens."""
    return Supply(
        problems=problems,
        order=ProblemOrder(len(problems), config.run.seed, config.data.shuffle),
        seed=config.run.seed,
        num_generations=config.rollout.num_generations,
        max_prompt_length=config.data.max_prompt_length,
        max_new_tokens=config.rollout.max_new_tokens,
        vocab_size=policy.architecture.get("vocab_size", 2**31),
        rewards=frozenset(config.reward.functions),
        encode_chat=policy.encode_chat,
    )


def selection_of(config: Config, task: Task, supply: Supply, success_rates: Mapping[str, float]) -> Selection:
    """Section [selection]; `success_rates` are those of the checkpoint."""
    selection = config.selection
    curriculum = Curriculum(config.run.seed, selection.curriculum_floor, dict(success_rates))
    return Selection(supply.problem, appraiser(config, task), curriculum if selection.curriculum else None)
