"""Building the exchange of a run from its settings: its lease table, supply of problems and selection."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from math import ceil
from pathlib import Path

from grpo_actors.config import Config
from grpo_actors.learner.archive import Archive
from grpo_actors.learner.exchange.exchange import (
    BEAT_S,
    Exchange,
    Quarantine,
    SamplingRules,
    Selection,
    Supply,
)
from grpo_actors.learner.group_filter import group_filter
from grpo_actors.learner.groups import SampledGroup
from grpo_actors.learner.grpo import Grpo
from grpo_actors.learner.judged import judged_text
from grpo_actors.observe.records import numbers_only
from grpo_actors.observe.sinks import Journal, Publish
from grpo_actors.policy.identity import Identity
from grpo_actors.policy.model import Policy
from grpo_actors.progress import scoring_patience_s
from grpo_actors.schedule.curriculum import Curriculum
from grpo_actors.schedule.lease import Cursor
from grpo_actors.schedule.leases import LeaseTable
from grpo_actors.schedule.mixture import MixtureOrder, turns_of
from grpo_actors.schedule.order import ProblemOrder
from grpo_actors.tasks.task import Task
from grpo_actors.transport.access import Access
from grpo_actors.transport.events import EventPublisher
from grpo_actors.transport.sockets import Endpoints
from grpo_actors.wire.messages import Welcome


def build_welcome(
    config: Config, run_id: str, identity: Identity, endpoints: Endpoints, *, total_updates: int
) -> Welcome:
    """Build the answer to every peer that joins; `identity` is that of the base model."""
    return Welcome(
        run_id=run_id,
        config=config.model_dump_json(),
        identity=json.dumps(asdict(identity)),
        weights_endpoint=endpoints.weights,
        beat_s=BEAT_S,
        total_updates=total_updates,
    )


def build_exchange(
    config: Config,
    task: Task,
    grpo: Grpo,
    archive: Archive,
    *,
    run_dir: Path,
    endpoints: Endpoints,
    welcome: Welcome,
    access: Access,
    evaluator_token: str,
) -> Exchange:
    """Build the exchange of a run that continues from its archive; it is not started yet."""
    supply = build_supply(config, task, grpo.policy)
    return Exchange(
        endpoints=endpoints,
        table=build_lease_table(
            config, version=grpo.version, total_updates=grpo.total_updates, cursor=archive.cursor
        ),
        supply=supply,
        selection=build_selection(config, task, supply, grpo.policy, archive.success_rates),
        quarantine=Quarantine(config.health.max_logprob_gap),
        welcome=welcome,
        access=access,
        evaluator_token=evaluator_token,
        lost_s=scoring_patience_s(config.reward.reward_timeout_s),
        open_journal=lambda publisher: Journal(
            run_dir,
            seq=archive.records,
            log_jsonl=config.metrics.log_jsonl,
            publish=_publish(config, publisher),
            session=endpoints.session,
        ),
    )


def _publish(config: Config, publisher: EventPublisher) -> Publish:
    """Return what sends a record to the readers: as it is, or with its numbers only if other hosts may be listening."""
    if config.transport.is_local or config.transport.events_text:
        return publisher.publish
    return lambda topic, line: publisher.publish(topic, numbers_only(line))


def build_lease_table(
    config: Config, *, version: int, total_updates: int, cursor: Cursor
) -> LeaseTable[SampledGroup]:
    """Build the lease table of a run that has done `version` of its updates."""
    groups, selection = config.groups_per_update, config.selection
    replaces = selection.replaces_groups
    return LeaseTable(
        groups_per_update=groups,
        max_staleness=config.rollout.max_staleness,
        batch_groups=config.rollout.batch_groups,
        # The clock starts at the grant, and a run of leases waits for the other runs that its worker holds.
        lease_timeout_s=config.rollout.lease_timeout_s * (config.rollout.runs_held - 1),
        version=version,
        # Later problems replace those that are set aside, so the version ends the run, not the position.
        last_version=total_updates,
        cursor=cursor,
        refill_limit=selection.refill_limit * groups if replaces else 0,
        ahead=ceil(selection.oversampling * groups) if replaces else groups,
    )


def build_supply(config: Config, task: Task, policy: Policy) -> Supply:
    """Build the supply of problems, which encodes them as the policy's tokens."""
    return Supply(
        problems=task.problems("train"),
        order=build_order(config, task),
        seed=config.run.seed,
        num_generations=config.rollout.num_generations,
        max_prompt_length=config.data.max_prompt_length,
        encode_chat=policy.chat.encode,
        rules=build_sampling_rules(config, policy),
    )


def build_order(config: Config, task: Task) -> ProblemOrder | MixtureOrder:
    """Build the order of the training problems: that of a mixture if they come from named sources."""
    counts = tuple(map(len, task.train_sources().values()))
    seed, shuffle = config.run.seed, config.data.shuffle
    if not config.data.sources:
        return ProblemOrder(counts[0], seed, shuffle)
    weights = [source.weight for source in config.data.sources if source.weight is not None]
    # Without weights a block has every problem once.
    return MixtureOrder(counts, turns_of(weights) if weights else counts, seed, shuffle)


def build_sampling_rules(config: Config, policy: Policy) -> SamplingRules:
    """Build the rules that the completions of a run follow."""
    rollout = config.rollout
    return SamplingRules(
        vocabulary=policy.vocabulary,
        max_new_tokens=rollout.max_new_tokens,
        max_turns=rollout.max_turns if config.environments else 1,
        stop_tokens=policy.stop_tokens,
        ends=lambda turn: policy.ends(turn, rollout.stop),
        closing=policy.thinking.closing if rollout.think_tokens else (),
        rewards=frozenset(config.reward.functions),
    )


def build_selection(
    config: Config, task: Task, supply: Supply, policy: Policy, success_rates: Mapping[str, float]
) -> Selection:
    """Build the selection of section [selection]; `success_rates` are those of the checkpoint."""
    selection = config.selection
    curriculum = Curriculum(config.run.seed, selection.curriculum_floor, dict(success_rates))
    return Selection(
        supply.problem,
        group_filter(config, task, partial(judged_text, policy, config.reward.grade)),
        curriculum if selection.curriculum else None,
    )
