"""Opening a live run: build each of its parts, once and in order, up to the first batch."""

import contextlib
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from grpo_actors import consent
from grpo_actors.config import Config
from grpo_actors.learner.archive import Archive
from grpo_actors.learner.exchange.exchange import Exchange
from grpo_actors.learner.exchange_setup import build_exchange, build_supply, build_welcome
from grpo_actors.learner.following import check_together, give_state
from grpo_actors.learner.grpo import Grpo
from grpo_actors.learner.history import History
from grpo_actors.learner.loading import check_sampling, load_model, turn_end_note
from grpo_actors.learner.local_worker import open_local_worker
from grpo_actors.learner.loop import Run
from grpo_actors.learner.prompts import PromptLimit
from grpo_actors.learner.publishing import Publisher
from grpo_actors.learner.ranks import joined
from grpo_actors.learner.rendering import first_prompt
from grpo_actors.learner.source import LiveSource
from grpo_actors.policy.model import Policy
from grpo_actors.process import EVALUATOR_TOKEN, StopRequest, removed_at_once, take_secret
from grpo_actors.rollout.worker import sampling_params
from grpo_actors.rundir.claim import total_updates, with_rewards
from grpo_actors.rundir.data import claim_data
from grpo_actors.rundir.folder import locked
from grpo_actors.tasks.registry import open_task
from grpo_actors.tasks.task import Task
from grpo_actors.transport.access import Access
from grpo_actors.transport.keys import KeyFolder, read_run_key, run_key
from grpo_actors.transport.sockets import Endpoints, plan_endpoints, remove_endpoints


@contextlib.contextmanager
def open_live(
    run_dir: Path,
    config: Config,
    stop: StopRequest,
    endpoints: Endpoints | None = None,
    run_id: str | None = None,
) -> Iterator[Run | None]:
    """Open the run in a folder, new or continued; yield None if nothing is left to do.

    Args:
        run_dir: The run folder.
        config: Its settings.
        stop: Set by the first signal.
        endpoints: The addresses to bind, chosen by the supervisor; None: choose them here.
        run_id: The id if this is a new run; the supervisor gives each learner that it starts the same, so that workers
            stay with the run also if the first one left no checkpoint. None: choose it here.
    """
    evaluator_token = take_secret(EVALUATOR_TOKEN)
    with ExitStack() as stack:
        stack.enter_context(locked(run_dir))
        ranks = stack.enter_context(joined(config))
        task = open_task(config)
        config = with_rewards(config, task)
        claim_data(run_dir, task)
        archive = Archive(run_dir, config, run_id or uuid.uuid4().hex[:12])
        # An upper bound: the length of prompts is known once there is a tokenizer.
        if _is_complete(archive, config, task):
            yield None
            return
        policy = load_model(config, ranks.collectives)
        check_sampling(config, policy, task.problems("train")[0])
        left_out = PromptLimit(policy, config.data.max_prompt_length).apply(task)
        if left_out and _is_complete(archive, config, task):
            yield None
            return
        # Of the base model: taken before `restore` loads a checkpoint's weights.
        identity = policy.identity
        grpo = Grpo(config, policy, total_updates(config, len(task.problems("train"))), ranks=ranks)
        archive.restore(grpo)
        give_state(grpo)
        listening, access = _listen(stack, run_dir, config, endpoints)
        welcome = build_welcome(config, archive.run_id, identity, listening, total_updates=grpo.total_updates)
        exchange = build_exchange(
            config,
            task,
            grpo,
            archive,
            run_dir=run_dir,
            endpoints=listening,
            welcome=welcome,
            access=access,
            evaluator_token=evaluator_token,
        )
        history = stack.enter_context(
            contextlib.closing(History(run_dir, config, grpo, archive, records=exchange))
        )
        publisher = _start(stack, exchange, run_dir, listening)
        history.begin()
        for level, text in _first_lines(config, task, policy, archive, left_out):
            exchange.record("log", level=level, text=text)
        publisher.publish(grpo.version, grpo.policy.trainable())
        # The workers sample their first groups meanwhile.
        if note := check_together(grpo, policy.chat.encode(task.problems("train")[0].messages)):
            exchange.record("log", level="warning", text=note)
        grpo.warm_up()
        local = (
            stack.enter_context(open_local_worker(config, grpo, listening, welcome, stop, run_dir=run_dir))
            if config.rollout.workers == 0
            else None
        )
        yield Run(grpo, LiveSource(exchange, publisher, archive, stop, local), history, stop)


def _start(stack: ExitStack, exchange: Exchange, run_dir: Path, listening: Endpoints) -> Publisher:
    """Start the exchange and let others find it; at the end of the stack, and after a second signal, nothing is left of it."""
    stack.enter_context(removed_at_once(partial(remove_endpoints, run_dir, listening)))
    stack.callback(remove_endpoints, run_dir, listening)
    stack.enter_context(contextlib.closing(exchange))
    exchange.start()
    publisher = stack.enter_context(contextlib.closing(Publisher(exchange.publish)))
    stack.enter_context(removed_at_once(publisher.unlink))
    listening.write(run_dir)
    return publisher


def _first_lines(
    config: Config, task: Task, policy: Policy, archive: Archive, left_out: str | None
) -> Iterator[tuple[str, str]]:
    """Yield what the user should know before the first update: level and text."""
    yield "info", task.describe_splits()
    if archive.resumed is None:
        yield "info", first_prompt(policy, config.data, build_supply(config, task, policy))
    else:
        yield "info", f"continues after update {archive.update}, from {archive.resumed.path.name}"
    notes = (*task.notes, left_out, sampling_params(config).bias, turn_end_note(config, policy))
    for note in filter(None, notes):
        yield "warning", note


def _is_complete(archive: Archive, config: Config, task: Task) -> bool:
    """Return whether nothing is left to do, and then say so."""
    note = archive.note_if_complete(total_updates(config, len(task.problems("train"))))
    if note:
        print(note, file=sys.stderr)
        archive.put_settings_back()
    return note is not None


def _listen(
    stack: ExitStack, run_dir: Path, config: Config, chosen: Endpoints | None
) -> tuple[Endpoints, Access]:
    """Return the addresses to bind and who may use them; a learner without a supervisor chooses both here."""
    transport = config.transport
    folder = KeyFolder(Path(transport.keys_dir)) if transport.uses_keys else None
    if chosen is None:
        if transport.warning:
            print(transport.warning, file=sys.stderr)
        stack.enter_context(run_key(run_dir, folder))
        chosen = plan_endpoints(
            *(run_dir, transport.scheme, transport.host, transport.port),
            keys=transport.uses_keys,
            options=consent.options_for(config),
        )
    endpoints = replace(chosen, pid=os.getpid(), session=uuid.uuid4().hex[:8])
    return endpoints, Access(folder, read_run_key(run_dir))
