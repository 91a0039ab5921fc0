"""ACTOR: takes batches of groups, updates the policy, pushes the weights, writes checkpoints.

    python -m grpo_actors.learner RUN_DIR      what launch.py starts; RUN_DIR/config.json is its input

The update itself is `grpo`, in one file that reads as the algorithm. Sockets, leases and records are
`exchange`, a thread of this process. This file is the order of events between them: take a batch,
update, publish, record, perhaps write a checkpoint, and at the end wait for the last evaluation.
"""

import argparse
import contextlib
import fcntl
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grpo_actors import __version__
from grpo_actors.checkpoints import best, mark_best, newest_sound, prune, read_state
from grpo_actors.command import run_command
from grpo_actors.config import Config, read_config
from grpo_actors.errors import ConfigError, RunError
from grpo_actors.exchange import BEAT_S, Exchange, Supply
from grpo_actors.groups import SampledGroup
from grpo_actors.grpo import Grpo
from grpo_actors.messages import Evaluation, Welcome
from grpo_actors.objective.objective import Objective
from grpo_actors.observe.sinks import METRICS_FILE, Journal
from grpo_actors.policy.checkpoint import restore, write_checkpoint
from grpo_actors.policy.model import Policy, load_policy
from grpo_actors.policy.weights import pack
from grpo_actors.process import StopRequest, bound_memory, enter_process
from grpo_actors.report import ledger, samples
from grpo_actors.rollout import RolloutWorker, introduce, sampling_params
from grpo_actors.schedule.leases import Cursor, LeaseTable
from grpo_actors.schedule.order import ProblemOrder
from grpo_actors.tasks.registry import chosen_rewards, load_task
from grpo_actors.tasks.scoring import Scorer
from grpo_actors.tasks.task import Problem, Task
from grpo_actors.transport.control import ControlClient
from grpo_actors.transport.sockets import (
    CHUNK_BYTES,
    Endpoints,
    plan_endpoints,
    remove_endpoints,
    zmq_context,
)

CONFIG_FILE = "config.json"
LOCK_FILE = "lock"

#: How long the end of a run waits for an evaluator that is not there (it may be restarting).
EVALUATOR_ABSENT_S = 20.0
#: Longest wait for a batch or an evaluation before the stop flag is looked at.
POLL_S = 0.1


@dataclass
class Learner:
    """One run of the actor, from its folder to its exit code."""

    run_dir: Path
    config: Config
    stop: StopRequest
    _evaluated: set[int] = field(default_factory=set)
    _last_saved: int = -1

    def run(self) -> int:
        """Train until the end or until asked to stop; 0 in both cases."""
        with ExitStack() as stack:
            stack.enter_context(locked(self.run_dir))
            task = load_task(self.config.data, seed=self.config.run.seed)
            self.config = with_rewards(self.config, task)
            problems = task.problems("train")
            self._prepare(problems)
            endpoints = plan_endpoints(
                self.run_dir, self.config.transport.scheme, self.config.transport.host, self.config.transport.port
            )
            self._exchange = self._open_exchange(endpoints, problems)
            stack.callback(remove_endpoints, self.run_dir, endpoints)
            stack.enter_context(contextlib.closing(self._exchange))
            self._exchange.start()
            endpoints.write(self.run_dir)
            self._record_start()
            self._publish([])
            local = stack.enter_context(self._local_worker(endpoints)) if self.config.rollout.workers == 0 else None
            self._train(local)
            self._finish()
        return 0

    # --- before -----------------------------------------------------------------------------------

    def _prepare(self, problems: Sequence[Problem]) -> None:
        """Model, optimizer, schedule: from the newest sound checkpoint, or from the start."""
        config = self.config
        policy = load_policy(config.model, seed=config.run.seed)
        self._identity = policy.identity
        self._total = total_updates(config, len(problems))
        self._grpo = Grpo(config, policy, self._load_reference(policy), objective(config), self._total)
        self._cursor, self._records, self._run_id = Cursor(), 0, uuid.uuid4().hex[:12]
        checkpoint, self._complaints = newest_sound(self.run_dir)
        if checkpoint is not None:
            state = read_state(checkpoint)
            restore(checkpoint, policy, self._grpo.training)
            self._grpo.version = self._last_saved = checkpoint.update
            self._grpo.skipped = state["skipped_steps"]
            self._cursor = Cursor(state["cursor"]["position"], tuple(state["cursor"]["set_aside"]))
            self._records, self._run_id = state["records"], state["run_id"]

    def _load_reference(self, policy: Policy) -> Policy | None:
        """A frozen base, loaded only where the KL term needs one and no adapter can be switched off."""
        if self.config.learner.kl_coeff == 0 or policy.has_adapter:
            return None
        reference = load_policy(self.config.model, seed=self.config.run.seed)
        reference.model.freeze()
        return reference

    def _open_exchange(self, endpoints: Endpoints, problems: Sequence[Problem]) -> Exchange:
        config, policy = self.config, self._grpo.policy
        groups = config.groups_per_update
        table: LeaseTable[SampledGroup] = LeaseTable(
            groups_per_update=groups,
            max_staleness=config.rollout.max_staleness,
            batch_groups=config.rollout.batch_groups,
            lease_timeout_s=config.rollout.lease_timeout_s,
            version=self._grpo.version,
            # Problems that are set aside are made up for by later ones: only versions end the run.
            last_version=self._total,
            cursor=self._cursor,
        )
        supply = Supply(
            problems=problems,
            order=ProblemOrder(len(problems), config.run.seed, config.data.shuffle),
            seed=config.run.seed,
            num_generations=config.rollout.num_generations,
            max_prompt_length=config.data.max_prompt_length,
            encode_chat=policy.encode_chat,
        )
        self._welcome = Welcome(
            run_id=self._run_id,
            config=config.model_dump_json(),
            identity=json.dumps(asdict(self._identity)),
            weights_endpoint=endpoints.weights,
            beat_s=BEAT_S,
        )
        return Exchange(
            endpoints=endpoints,
            table=table,
            supply=supply,
            welcome=self._welcome,
            open_journal=lambda publisher: Journal(
                self.run_dir, seq=self._records, log_jsonl=config.metrics.log_jsonl, publish=publisher.publish
            ),
        )

    def _record_start(self) -> None:
        """Say what runs; learn from the kept records which checkpoints were evaluated before."""
        metrics = self.run_dir / METRICS_FILE
        if self._records and metrics.is_file():
            records = map(json.loads, metrics.read_text().splitlines())
            self._evaluated = {r["update"] for r in records if r["topic"] == "eval" and r["seq"] <= self._records}
        self._exchange.record(
            "start",
            run_name=self.config.run.run_name,
            run_id=self._run_id,
            model_name=self.config.model.model_name,
            total_updates=self._total,
            update=self._grpo.version,
            config=self.config.model_dump(mode="json"),
            version=__version__,
        )
        if bias := sampling_params(self.config).bias:
            self._exchange.record("log", level="warning", text=bias)
        for complaint in self._complaints:
            self._exchange.record("alarm", name="checkpoint unreadable", text=complaint)

    @contextlib.contextmanager
    def _local_worker(self, endpoints: Endpoints) -> Iterator[RolloutWorker]:
        """Workers = 0: the same worker, in this thread, sampling with the learner's own policy."""
        config = self.config
        with (
            zmq_context() as context,
            contextlib.closing(
                Scorer(config.reward.functions, timeout_s=config.reward.reward_timeout_s)
            ) as scorer,
        ):
            control = ControlClient(context, endpoints.control, "local")
            welcome = introduce(control, "rollout", self.stop, patience_s=10) or self._welcome
            yield RolloutWorker(control, welcome, config, self._grpo.policy, scorer, version=self._grpo.version)

    # --- during -----------------------------------------------------------------------------------

    def _train(self, local: RolloutWorker | None) -> None:
        while self._grpo.version < self._total and not self.stop:
            started_s = time.monotonic()
            groups = self._wait_for_batch(local)
            if groups is None:
                break
            wait_s = time.monotonic() - started_s
            told = self._grpo.update(groups)
            self._publish([group.lease for group in groups])
            if local is not None:
                local.version = self._grpo.version
            self._record_update(groups, told, wait_s, time.monotonic() - started_s)
            if self._checkpoint_due():
                self._save()
            self._take_evaluations()
        if self._last_saved != self._grpo.version:
            self._save()

    def _wait_for_batch(self, local: RolloutWorker | None) -> list[SampledGroup] | None:
        """The next update's groups; None: asked to stop."""
        while not self.stop:
            groups = self._exchange.next_batch(0 if local else POLL_S)
            if groups is not None:
                return groups
            if local is not None:
                local.turn(wait_s=0.01)
            self._take_evaluations()
        return None

    def _publish(self, consumed: list[int]) -> None:
        manifest, data = pack(self._grpo.version, self._grpo.policy.trainable(), CHUNK_BYTES)
        self._exchange.publish(manifest, data, consumed)

    def _record_update(self, groups: list[SampledGroup], told: Mapping[str, Any], wait_s: float, update_s: float) -> None:
        update = self._grpo.version
        self._exchange.record(
            "metrics",
            update=update,
            total_updates=self._total,
            epoch=groups[-1].epoch,
            **told,
            rollout_tokens_per_s=self._exchange.take_tokens() / update_s,
            update_s=update_s,
            wait_s=wait_s,
            ledger=ledger(groups),
        )
        for sample in samples(groups, self.config.metrics.log_completions, self.config.reward.functions):
            self._exchange.record("sample", update=update, **sample)

    # --- checkpoints and evaluations --------------------------------------------------------------

    def _checkpoint_due(self) -> bool:
        """At every multiple of save_steps, and where an evaluation is due: it scores checkpoints."""
        periods = (self.config.run.save_steps, self.config.evaluator.eval_every_updates)
        return any(period and self._grpo.version % period == 0 for period in periods)

    def _save(self) -> None:
        snapshot = self._exchange.snapshot()
        state = {
            "run_id": self._run_id,
            "cursor": asdict(snapshot.cursor),
            "records": snapshot.records,
            "skipped_steps": self._grpo.skipped,
        }
        checkpoint = write_checkpoint(
            self.run_dir, self._grpo.version, self._grpo.policy, self._grpo.training, state
        )
        self._last_saved = checkpoint.update
        self._exchange.record(
            "checkpoint", update=checkpoint.update, path=str(checkpoint.path), bytes=checkpoint.bytes
        )
        prune(self.run_dir, self.config.run.keep_checkpoints, frozenset(self._unevaluated()))

    def _unevaluated(self) -> set[int]:
        """Updates whose checkpoint the evaluator has not scored yet."""
        if not self.config.evaluator.eval_every_updates:
            return set()
        folders = (path.name.removeprefix("checkpoint-") for path in self.run_dir.glob("checkpoint-*"))
        return {int(number) for number in folders if number.isdigit()} - self._evaluated

    def _take_evaluations(self) -> None:
        for evaluation in self._exchange.take_evaluations():
            if evaluation.update in self._evaluated:
                continue
            self._evaluated.add(evaluation.update)
            self._record_evaluation(evaluation)

    def _record_evaluation(self, evaluation: Evaluation) -> None:
        score = evaluation.accuracy if evaluation.sampled_accuracy is None else evaluation.sampled_accuracy
        marked = best(self.run_dir)
        is_best = marked is None or score > marked["accuracy"]
        if is_best and evaluation.update:
            mark_best(self.run_dir, evaluation.update, score)
        self._exchange.record("eval", **evaluation.model_dump(exclude={"kind"}), best=is_best)

    # --- after ------------------------------------------------------------------------------------

    def _finish(self) -> None:
        self._exchange.dismiss("rollout", "the run is over")
        self._wait_for_evaluations()
        self._exchange.dismiss("evaluator", "the run is over")
        done = self._grpo.version >= self._total
        reason = "all updates done" if done else f"asked to stop after update {self._grpo.version}"
        self._exchange.record("stop", reason=reason, exit_code=0)

    def _wait_for_evaluations(self) -> None:
        """Until the last checkpoint has its score, unless someone presses Ctrl-C or no evaluator is there."""
        last_seen_s = time.monotonic()
        while self._unevaluated() and not self.stop and time.monotonic() - last_seen_s < EVALUATOR_ABSENT_S:
            if self._exchange.evaluator_present():
                last_seen_s = time.monotonic()
            self._take_evaluations()
            time.sleep(POLL_S)


def total_updates(config: Config, problems: int) -> int:
    """Updates that will really happen: max_updates, or what the epochs give."""
    if config.learner.max_updates:
        return config.learner.max_updates
    updates = config.learner.num_epochs * problems // config.groups_per_update
    if updates == 0:
        raise ConfigError(
            f"learner.num_epochs: {config.learner.num_epochs} × {problems} problems are fewer than the "
            f"{config.groups_per_update} of one update; set learner.max_updates or a smaller learner.batch_size"
        )
    return updates


def with_rewards(config: Config, task: Task) -> Config:
    """The configuration with its rewards named: the task's own where it names none."""
    rewards = {"functions": chosen_rewards(config.reward.functions, task)}
    return config.model_copy(update={"reward": config.reward.model_copy(update=rewards)})


def objective(config: Config) -> Objective:
    """The menu's choice, from section [learner]."""
    learner = config.learner
    return Objective(
        advantage=learner.advantage,
        loss=learner.loss,
        aggregation=learner.aggregation,
        clip_eps=learner.clip_eps,
        clip_eps_high=learner.clip_eps_high,
        kl_coeff=learner.kl_coeff,
        mask_truncated=learner.mask_truncated,
        # A quantised worker is another policy than the learner's: its ratio would not start at 1.
        ratio="recomputed" if config.rollout.quantize_for_rollouts else "recorded",
        correction="token_truncate" if config.rollout.quantize_for_rollouts else "none",
    )


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run folder: a second ipc bind on one path would steal it silently."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"run.output_dir: {run_dir} is in use by a live run; stop it, or choose another folder"
            ) from None
        yield


def main() -> int:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m grpo_actors.learner", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="run folder with config.json")
    args = parser.parse_args()
    stop = enter_process()
    bound_memory()
    return Learner(args.run_dir, read_config(args.run_dir / CONFIG_FILE), stop).run()


if __name__ == "__main__":
    run_command(main)
