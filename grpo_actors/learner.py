"""ACTOR: takes batches of groups, updates the policy, pushes the weights, writes checkpoints.

    python -m grpo_actors.learner RUN_DIR                    what launch.py starts; RUN_DIR/config.json is its input
    python -m grpo_actors.learner RUN_DIR --replay SOURCE    trains on recorded groups instead (`replay`)

The update itself is `grpo`, in one file that reads as the algorithm. Sockets, leases and records are
`exchange`, a thread of this process; what is told and kept of the run is `history`. This file is the order
of events between them: take a batch, update, publish, record, perhaps write a checkpoint, and at the end
wait for the last evaluation.
"""

import argparse
import contextlib
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from grpo_actors.archive import Archive
from grpo_actors.config import Config, read_config
from grpo_actors.episodes import episodes
from grpo_actors.exchange.exchange import BEAT_S, LOST_S, Exchange
from grpo_actors.groups import SampledGroup
from grpo_actors.history import History, load_grpo
from grpo_actors.joining import introduce
from grpo_actors.messages import Welcome
from grpo_actors.observe.sinks import Journal
from grpo_actors.opening import lease_table, selection_of, supply_of
from grpo_actors.policy.decoding.step import require_fit
from grpo_actors.policy.decoding.turns import encode_reply
from grpo_actors.policy.sampling import NO_ENVIRONMENT
from grpo_actors.process import StopRequest, bound_memory, enter_process, is_supervised, run_command
from grpo_actors.publishing import Publisher
from grpo_actors.replay import replay
from grpo_actors.rundir.claim import total_updates, with_rewards
from grpo_actors.rundir.folder import CONFIG_FILE, locked
from grpo_actors.tasks.registry import load_task
from grpo_actors.tasks.scoring import open_scorer
from grpo_actors.tasks.task import Task
from grpo_actors.transport.control import ControlClient
from grpo_actors.transport.sockets import Endpoints, plan_endpoints, remove_endpoints, zmq_context
from grpo_actors.worker import RolloutWorker, sampling_params

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
    #: Where to listen, if the supervisor has chosen.
    endpoints: Endpoints | None = None

    def run(self) -> int:
        """Train until the end or until asked to stop: 0 in both cases; 1 where an alarm has ended the run."""
        with ExitStack() as stack:
            stack.enter_context(locked(self.run_dir))
            task = load_task(self.config.data, seed=self.config.run.seed)
            self.config = with_rewards(self.config, task)
            total = total_updates(self.config, len(task.problems("train")))
            self._archive = Archive(self.run_dir, self.config, uuid.uuid4().hex[:12])
            if note := self._archive.completion(total):
                print(note, file=sys.stderr)
                return 0
            self._grpo = load_grpo(self.config, total)
            # Of the base model: taken before a checkpoint's weights come.
            self._identity = self._grpo.policy.identity
            self._check_model()
            self._archive.restore(self._grpo)
            endpoints = self._endpoints()
            self._exchange = self._open_exchange(endpoints, task)
            self._history = History(self.run_dir, self.config, self._grpo, self._archive, self._exchange)
            stack.enter_context(contextlib.closing(self._history))
            stack.callback(remove_endpoints, self.run_dir, endpoints)
            stack.enter_context(contextlib.closing(self._exchange))
            self._exchange.start()
            self._publisher = stack.enter_context(contextlib.closing(Publisher(self._exchange.publish)))
            endpoints.write(self.run_dir)
            self._history.begin()
            if bias := sampling_params(self.config).bias:
                self._exchange.record("log", level="warning", text=bias)
            self._publish([])
            local = (
                stack.enter_context(self._local_worker(endpoints))
                if self.config.rollout.workers == 0
                else None
            )
            self._train(local)
            return self._finish()

    # --- before -----------------------------------------------------------------------------------

    def _check_model(self) -> None:
        """Refuse settings that this model cannot follow."""
        policy = self._grpo.policy
        if self.config.rollout.in_flight_updates:
            require_fit(policy, "rollout.in_flight_updates: must be false")
        if self.config.data.environment:
            require_fit(policy, NO_ENVIRONMENT)
            encode_reply(policy, {"role": "user", "content": "?"}, after_stop_token=True)

    def _endpoints(self) -> Endpoints:
        if self.endpoints is not None:
            return replace(self.endpoints, pid=os.getpid())
        transport = self.config.transport
        return plan_endpoints(self.run_dir, transport.scheme, transport.host, transport.port)

    def _open_exchange(self, endpoints: Endpoints, task: Task) -> Exchange:
        config, policy = self.config, self._grpo.policy
        archive = self._archive
        supply = supply_of(config, task.problems("train"), policy)
        self._welcome = Welcome(
            run_id=archive.run_id,
            config=config.model_dump_json(),
            identity=json.dumps(asdict(self._identity)),
            weights_endpoint=endpoints.weights,
            beat_s=BEAT_S,
        )
        return Exchange(
            endpoints=endpoints,
            table=lease_table(
                config,
                version=self._grpo.version,
                total_updates=self._grpo.total_updates,
                cursor=archive.cursor,
            ),
            supply=supply,
            selection=selection_of(config, task, supply, archive.success_rates),
            welcome=self._welcome,
            # A reward that may take long keeps its worker silent for as long.
            lost_s=max(LOST_S, config.reward.reward_timeout_s + 10 * BEAT_S),
            open_journal=lambda publisher: Journal(
                self.run_dir,
                seq=archive.records,
                log_jsonl=config.metrics.log_jsonl,
                publish=publisher.publish,
            ),
        )

    @contextlib.contextmanager
    def _local_worker(self, endpoints: Endpoints) -> Iterator[RolloutWorker]:
        """With rollout.workers = 0: the same worker, in this thread, sampling with the learner's own policy."""
        config = self.config
        with (
            zmq_context() as context,
            open_scorer(config.reward.functions, config.reward) as scorer,
            episodes(config, self._grpo.policy) as turns,
        ):
            control = ControlClient(context, endpoints.control, "local")
            welcome = introduce(control, "rollout", self.stop, patience_s=10) or self._welcome
            yield RolloutWorker(
                control,
                welcome,
                config,
                self._grpo.policy,
                scorer,
                episodes=turns,
                stop=self.stop,
                version=self._grpo.version,
            )

    # --- during -----------------------------------------------------------------------------------

    def _train(self, local: RolloutWorker | None) -> None:
        grpo, history = self._grpo, self._history
        while grpo.version < grpo.total_updates and not self.stop and history.ended_by is None:
            started_s = time.monotonic()
            groups = self._wait_for_batch(local)
            if groups is None:
                break
            wait_s = time.monotonic() - started_s
            told = grpo.update(groups)
            self._publish([group.lease for group in groups])
            if local is not None:
                local.version = grpo.version
            update_s = time.monotonic() - started_s
            sampled_per_s = self._exchange.take_tokens() / update_s
            history.tell(groups, told, update_s=update_s, wait_s=wait_s, rollout_tokens_per_s=sampled_per_s)
            if alarm := self._exchange.selection_alarm():
                history.heed(f"no signal: {alarm}")
            history.save_if_due()
            self._take_evaluations()
        history.save()

    def _wait_for_batch(self, local: RolloutWorker | None) -> list[SampledGroup] | None:
        """The next update's groups; None: asked to stop."""
        while not self.stop:
            groups = self._exchange.next_batch(0 if local else POLL_S)
            if groups is not None:
                return groups
            if local is not None:
                local.turn(wait_s=0.01)
                while local.busy:  # no batch is taken, so that no weights change, under open completions
                    local.turn(wait_s=0)
            self._take_evaluations()
        return None

    def _publish(self, consumed: list[int]) -> None:
        self._exchange.consume(consumed)
        self._publisher.publish(self._grpo.version, self._grpo.policy.trainable())

    def _take_evaluations(self) -> None:
        self._archive.take_evaluations(self._exchange, self._exchange.take_evaluations())

    # --- after ------------------------------------------------------------------------------------

    def _finish(self) -> int:
        """Let everyone leave in order; returns the exit code."""
        self._publisher.wait()
        self._exchange.dismiss("rollout", "the run is over")
        self._wait_for_evaluations()
        self._exchange.dismiss("evaluator", "the run is over")
        self._exchange.wait_for_goodbyes()
        if self._history.ended_by is not None and not is_supervised():  # the supervisor shows the record
            print(f"ended by an alarm: {self._history.ended_by}", file=sys.stderr)
        done = self._grpo.version >= self._grpo.total_updates
        return self._history.end(
            "all updates done" if done else f"asked to stop after update {self._grpo.version}"
        )

    def _wait_for_evaluations(self) -> None:
        """Until the last checkpoint has its score, unless someone presses Ctrl-C or no evaluator is there."""
        last_seen_s = time.monotonic()
        while (
            self._archive.unevaluated()
            and not self.stop
            and time.monotonic() - last_seen_s < EVALUATOR_ABSENT_S
        ):
            if self._exchange.evaluator_present():
                last_seen_s = time.monotonic()
            self._take_evaluations()
            time.sleep(POLL_S)


def main() -> int:
    """Parse the command line and train."""
    args = _parse_arguments()
    stop = enter_process()
    if args.replay is not None:
        return replay(args.run_dir, args.replay, args.config, args.overrides, stop)
    bound_memory()
    endpoints = Endpoints(**json.loads(args.endpoints)) if args.endpoints else None
    return Learner(args.run_dir, read_config(args.run_dir / CONFIG_FILE), stop, endpoints).run()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m grpo_actors.learner",
        description="Take batches of groups, update the policy, write checkpoints.",
        epilog="--replay trains without a worker or an evaluator; the same command goes on from the last checkpoint.",
    )
    parser.add_argument("run_dir", type=Path, help="run folder with config.json; with --replay: a new one")
    parser.add_argument(
        "--replay",
        type=Path,
        metavar="SOURCE",
        help="train on the groups that a run recorded with metrics.record_groups = true: its folder, or a groups.jsonl",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="with --replay: settings, as launch.py takes them; left out: those of the recorded run",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="with --replay: override a setting, as algorithm=gspo; repeatable",
    )
    parser.add_argument("--endpoints", help=argparse.SUPPRESS)  # JSON: what launch.py has told the others
    args = parser.parse_args()
    if args.replay is None and (args.config or args.overrides):
        parser.error("--config and --set need --replay; without it RUN_DIR/config.json has the settings")
    return args


if __name__ == "__main__":
    run_command(main)
