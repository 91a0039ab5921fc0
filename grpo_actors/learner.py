"""ACTOR: takes batches of groups, updates the policy, pushes the weights, writes checkpoints.

    python -m grpo_actors.learner RUN_DIR      what launch.py starts; RUN_DIR/config.json is its input

The update itself is `grpo`, in one file that reads as the algorithm. Sockets, leases and records are
`exchange`, a thread of this process; checkpoints and their scores are `archive`. This file is the order
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from grpo_actors import __version__
from grpo_actors.archive import Archive
from grpo_actors.command import run_command
from grpo_actors.config import Config, read_config
from grpo_actors.exchange.exchange import BEAT_S, LOST_S, Exchange, Supply
from grpo_actors.groups import SampledGroup
from grpo_actors.grpo import Grpo
from grpo_actors.joining import Leaving, introduce
from grpo_actors.messages import Welcome
from grpo_actors.observe.sinks import Journal
from grpo_actors.policy.locate import locate
from grpo_actors.policy.model import load_policy
from grpo_actors.policy.weights import pack
from grpo_actors.processes.door import StopRequest, bound_memory, enter_process, locked
from grpo_actors.processes.preflight import CONFIG_FILE, total_updates
from grpo_actors.report import ledger, samples
from grpo_actors.schedule.leases import LeaseTable
from grpo_actors.schedule.order import ProblemOrder
from grpo_actors.tasks.registry import chosen_rewards, load_task
from grpo_actors.tasks.scoring import Scorer
from grpo_actors.tasks.task import Problem
from grpo_actors.transport.control import ControlClient
from grpo_actors.transport.sockets import (
    CHUNK_BYTES,
    Endpoints,
    plan_endpoints,
    remove_endpoints,
    zmq_context,
)
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
        """Train until the end or until asked to stop; 0 in both cases."""
        with ExitStack() as stack:
            stack.enter_context(locked(self.run_dir))
            task = load_task(self.config.data, seed=self.config.run.seed)
            rewards = {"functions": chosen_rewards(self.config.reward.functions, task)}
            self.config = self.config.model_copy(
                update={"reward": self.config.reward.model_copy(update=rewards)}
            )
            problems = task.problems("train")
            self._total = total_updates(self.config, len(problems))
            self._archive = Archive(self.run_dir, self.config, uuid.uuid4().hex[:12])
            if self._is_complete():
                return 0
            self._load_grpo()
            endpoints = self._endpoints()
            self._exchange = self._open_exchange(endpoints, problems)
            stack.callback(remove_endpoints, self.run_dir, endpoints)
            stack.enter_context(contextlib.closing(self._exchange))
            self._exchange.start()
            endpoints.write(self.run_dir)
            self._record_start()
            self._publish([])
            local = (
                stack.enter_context(self._local_worker(endpoints))
                if self.config.rollout.workers == 0
                else None
            )
            self._train(local)
            self._finish()
        return 0

    # --- before -----------------------------------------------------------------------------------

    def _is_complete(self) -> bool:
        """Whether nothing is left to do; says so."""
        archive = self._archive
        if archive.resumed is None or not archive.is_complete(self._total):
            return False
        print(
            f"{self.run_dir}: complete, all {self._total} updates are done ({archive.resumed.path.name}); "
            "raise learner.max_updates to train on, or choose another run.output_dir",
            file=sys.stderr,
        )
        return True

    def _load_grpo(self) -> None:
        """Model and optimizer: from the newest sound checkpoint, or from the start."""
        config = self.config
        if isinstance(locate(config.model.model_name), str):
            print(
                f"model {config.model.model_name}: from the hub, or its copy on this machine", file=sys.stderr
            )
        policy = load_policy(config.model, seed=config.run.seed)
        self._identity = policy.identity
        self._grpo = Grpo(config, policy, self._total)
        self._archive.restore(self._grpo)

    def _endpoints(self) -> Endpoints:
        if self.endpoints is not None:
            return replace(self.endpoints, pid=os.getpid())
        transport = self.config.transport
        return plan_endpoints(self.run_dir, transport.scheme, transport.host, transport.port)

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
            cursor=self._archive.cursor,
        )
        supply = Supply(
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
        self._welcome = Welcome(
            run_id=self._archive.run_id,
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
            # A reward that may take long keeps its worker silent for as long.
            lost_s=max(LOST_S, config.reward.reward_timeout_s + 10 * BEAT_S),
            open_journal=lambda publisher: Journal(
                self.run_dir,
                seq=self._archive.records,
                log_jsonl=config.metrics.log_jsonl,
                publish=publisher.publish,
            ),
        )

    def _record_start(self) -> None:
        """Say what runs, and from where it goes on."""
        self._exchange.record(
            "start",
            run_name=self.config.run.run_name,
            run_id=self._archive.run_id,
            model_name=self.config.model.model_name,
            total_updates=self._total,
            update=self._grpo.version,
            config=self.config.model_dump(mode="json"),
            version=__version__,
        )
        if bias := sampling_params(self.config).bias:
            self._exchange.record("log", level="warning", text=bias)
        self._archive.announce(self._exchange)

    @contextlib.contextmanager
    def _local_worker(self, endpoints: Endpoints) -> Iterator[RolloutWorker]:
        """With rollout.workers = 0: the same worker, in this thread, sampling with the learner's own policy."""
        config = self.config
        with (
            zmq_context() as context,
            contextlib.closing(
                Scorer(config.reward.functions, timeout_s=config.reward.reward_timeout_s)
            ) as scorer,
        ):
            control = ControlClient(context, endpoints.control, "local")
            welcome = introduce(control, "rollout", self.stop, patience_s=10) or self._welcome
            yield RolloutWorker(
                control,
                welcome,
                config,
                self._grpo.policy,
                scorer,
                stop=self.stop,
                version=self._grpo.version,
            )

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
            self._archive.save_if_due(self._exchange, self._grpo)
            self._archive.take_evaluations(self._exchange)
        self._archive.save(self._exchange, self._grpo)

    def _wait_for_batch(self, local: RolloutWorker | None) -> list[SampledGroup] | None:
        """The next update's groups; None: asked to stop."""
        while not self.stop:
            groups = self._exchange.next_batch(0 if local else POLL_S)
            if groups is not None:
                return groups
            if local is not None:
                with contextlib.suppress(Leaving):  # asked to stop: seen right above
                    local.turn(wait_s=0.01)
            self._archive.take_evaluations(self._exchange)
        return None

    def _publish(self, consumed: list[int]) -> None:
        manifest, data = pack(self._grpo.version, self._grpo.policy.trainable(), CHUNK_BYTES)
        self._exchange.publish(manifest, data, consumed)

    def _record_update(
        self, groups: list[SampledGroup], told: Mapping[str, Any], wait_s: float, update_s: float
    ) -> None:
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

    # --- after ------------------------------------------------------------------------------------

    def _finish(self) -> None:
        self._exchange.dismiss("rollout", "the run is over")
        self._wait_for_evaluations()
        self._exchange.dismiss("evaluator", "the run is over")
        self._exchange.wait_for_goodbyes()
        done = self._grpo.version >= self._total
        reason = "all updates done" if done else f"asked to stop after update {self._grpo.version}"
        self._exchange.record("stop", reason=reason, exit_code=0)

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
            self._archive.take_evaluations(self._exchange)
            time.sleep(POLL_S)


def main() -> int:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        prog="python -m grpo_actors.learner", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("run_dir", type=Path, help="run folder with config.json")
    parser.add_argument("--endpoints", help=argparse.SUPPRESS)  # JSON: what launch.py has told the others
    args = parser.parse_args()
    stop = enter_process()
    bound_memory()
    endpoints = Endpoints(**json.loads(args.endpoints)) if args.endpoints else None
    return Learner(args.run_dir, read_config(args.run_dir / CONFIG_FILE), stop, endpoints).run()


if __name__ == "__main__":
    run_command(main)
