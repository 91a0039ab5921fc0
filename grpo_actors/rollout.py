"""ACTOR: samples groups with the old policy and scores them.

    python -m grpo_actors.rollout --attach RUN_DIR      join a live run on this machine
    python -m grpo_actors.rollout --connect ENDPOINT    join one by the address of its control socket

A worker needs nothing but the address: the learner tells it the configuration and the model, a lease
carries the prompt's tokens, the seeds and what the rewards need. It keeps every group until the
learner has acknowledged it, and takes new weights between two batches, never within one.
"""

import argparse
import json
import os
import socket
import sys
import time
from collections import deque
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from grpo_actors.command import run_command
from grpo_actors.config import Config
from grpo_actors.errors import ModelError, ProtocolError, RunError
from grpo_actors.messages import (
    PROTOCOL_VERSION,
    Ack,
    Announcement,
    Beat,
    Bye,
    Chunk,
    Completion,
    FetchChunk,
    FetchManifest,
    Grant,
    Group,
    Hello,
    Lease,
    Manifest,
    Message,
    Welcome,
    decode,
    encode,
    floats,
    from_learner,
    ints,
    read_ints,
    weights_reply,
)
from grpo_actors.policy.identity import Identity
from grpo_actors.policy.model import Policy, load_policy
from grpo_actors.policy.sampling import Sample, SamplingParams, sample_groups
from grpo_actors.policy.weights import unpack
from grpo_actors.process import StopRequest, bound_memory, enter_process
from grpo_actors.tasks.scoring import Scorer
from grpo_actors.tasks.task import Problem
from grpo_actors.transport.control import ControlClient
from grpo_actors.transport.sockets import Endpoints, zmq_context
from grpo_actors.transport.weights import WeightsClient

#: A group that was not acknowledged in this time is sent again.
RESEND_S = 5.0
#: A Hello that was not answered in this time is said again.
HELLO_S = 2.0
#: Longest silence to bear while weights are fetched; then the newest version is asked for anew.
FETCH_TIMEOUT_S = 10.0
#: Runs of leases held at a time: one being sampled, one waiting, so that no round trip is waited for.
RUNS_HELD = 2


class Leaving(Exception):  # noqa: N818 - not an error: the way out of a computation
    """Raised within sampling when the worker was asked to stop."""


@dataclass(slots=True)
class Unacknowledged:
    group: Group
    sent_s: float


@dataclass
class RolloutWorker:
    """One worker: its leases, its policy, its results. `turn` is one step of its life.

    The same object runs in a process of its own and, with ``rollout.workers = 0``, inside the
    learner's, where it samples with the learner's own policy (`fetches` is False: its owner sets
    `version`).
    """

    control: ControlClient
    welcome: Welcome
    config: Config
    policy: Policy
    scorer: Scorer
    weights: WeightsClient | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    version: int = -1
    _newest: int = 0
    _grants: deque[Grant] = field(default_factory=deque)
    _unacknowledged: dict[int, Unacknowledged] = field(default_factory=dict)
    _sampling: tuple[int, ...] = ()
    _tokens: int = 0
    _next_beat_s: float = 0.0
    #: Why the learner sent it home; None: it did not.
    dismissed: str | None = None

    def turn(self, wait_s: float) -> None:
        """Hear what there is (waiting `wait_s` for it when idle), then sample one batch if there is one."""
        self._adopt()
        grant = self._take_grant()
        self._hear(0.0 if grant else wait_s)
        self._resend()
        if grant is None:
            self._beat("waiting")
            return
        self._sampling = tuple(lease.lease for lease in grant.leases)
        for group in self._sample(grant):
            self._unacknowledged[group.lease] = Unacknowledged(group, time.monotonic())
            self._say(group)
        self._sampling = ()
        self._beat("waiting", force=True)

    # --- messages ---------------------------------------------------------------------------------

    def _hear(self, wait_s: float) -> None:
        while (data := self.control.receive(wait_s)) is not None:
            wait_s = 0.0
            message = decode(from_learner, data)
            match message:
                case Grant():
                    self._grants.append(message)
                case Ack():
                    self._unacknowledged.pop(message.lease, None)
                case Announcement():
                    self._newest = max(self._newest, message.version)
                case Bye(again=True):
                    # The learner is a new process: what it granted before is void.
                    self._grants.clear()
                    self._unacknowledged.clear()
                    self._say(hello("rollout", self.control.name, self.welcome.run_id))
                case Bye():
                    self.dismissed = message.reason
                case Welcome():
                    self._next_beat_s = 0.0
                case _:
                    raise ProtocolError(f"{type(message).__name__} does not go this way")

    def _say(self, message: Message) -> None:
        """Send if connected; whatever matters is said again until it had its effect."""
        self.control.send(encode(message))

    def _resend(self) -> None:
        now_s = time.monotonic()
        for waiting in self._unacknowledged.values():
            if now_s - waiting.sent_s > RESEND_S:
                waiting.sent_s = now_s
                self._say(waiting.group)

    def _beat(self, state: str, *, force: bool = False) -> None:
        now_s = time.monotonic()
        if not force and now_s < self._next_beat_s:
            return
        self._next_beat_s = now_s + self.welcome.beat_s
        held = [lease.lease for grant in self._grants for lease in grant.leases]
        self._say(
            Beat.model_validate(
                {
                    "state": state,
                    "version": self.version,
                    "tokens": self._tokens,
                    "credits": RUNS_HELD * self.config.rollout.batch_groups,
                    "holding": [*held, *self._sampling, *self._unacknowledged],
                }
            )
        )

    # --- weights ----------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Take the newest version, all of it or nothing."""
        if self.weights is None or self.version >= self._newest:
            return
        fetched = fetch_weights(self.weights)
        if fetched is None:
            return
        manifest, data = fetched
        self.policy.load_trainable(unpack(manifest, data))
        self.version = manifest.version
        self._newest = max(self._newest, manifest.version)

    def _take_grant(self) -> Grant | None:
        """The next batch of leases that the held version may sample."""
        if self._grants and self.version >= max(lease.min_version for lease in self._grants[0].leases):
            return self._grants.popleft()
        return None

    # --- sampling and scoring ---------------------------------------------------------------------

    def _sample(self, grant: Grant) -> list[Group]:
        leases, started_s = grant.leases, time.monotonic()
        groups = sample_groups(
            self.policy,
            [read_ints(lease.prompt) for lease in leases],
            [lease.seeds for lease in leases],
            sampling_params(self.config),
            on_step=self._on_step,
        )
        sampling_s = (time.monotonic() - started_s) / len(leases)
        return [self._score(lease, samples, sampling_s) for lease, samples in zip(leases, groups, strict=True)]

    def _on_step(self, new_tokens: int) -> None:
        """Called by the sampling loop at every step: the sign of life, and the way out."""
        self._tokens += new_tokens
        self._beat("sampling")
        if self.stop:
            raise Leaving

    def _score(self, lease: Lease, samples: list[Sample], sampling_s: float) -> Group:
        started_s = time.monotonic()
        texts = [self.policy.decode(sample.tokens) for sample in samples]
        problem = Problem(lease.problem_id, tuple(lease.messages), lease.answer, lease.columns)
        scores = self.scorer.score(problem, texts)
        self._beat("scoring")
        return Group(
            lease=lease.lease,
            attempt=lease.attempt,
            completions=[
                Completion(
                    tokens=ints(sample.tokens),
                    logprobs=floats(sample.logprobs),
                    versions=ints([self.version] * len(sample.tokens)),
                    finished=sample.finished,
                    text=text,
                    rewards={name: values[i] for name, values in scores.rewards.items()},
                )
                for i, (sample, text) in enumerate(zip(samples, texts, strict=True))
            ],
            sampling_s=sampling_s,
            scoring_s=time.monotonic() - started_s,
            failures=list(scores.failures),
        )


def sampling_params(config: Config) -> SamplingParams:
    rollout = config.rollout
    return SamplingParams(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        repetition_penalty=rollout.repetition_penalty,
        stop=rollout.stop,
    )


def hello(role: str, name: str, run_id: str = "") -> Hello:
    return Hello.model_validate(
        {
            "protocol": PROTOCOL_VERSION,
            "role": role,
            "name": name,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "run_id": run_id,
        }
    )


def introduce(control: ControlClient, role: str, stop: StopRequest, patience_s: float) -> Welcome | None:
    """Say Hello until the learner answers; None: asked to stop meanwhile.

    Raises:
        RunError: refused, or no answer within `patience_s`.
    """
    deadline_s = time.monotonic() + patience_s
    next_hello_s = 0.0
    while not stop:
        now_s = time.monotonic()
        if now_s > deadline_s:
            raise RunError(f"{control.endpoint}: no learner answered within {patience_s:.0f} s; is the run live?")
        if now_s >= next_hello_s and control.send(encode(hello(role, control.name))):
            next_hello_s = now_s + HELLO_S
        data = control.receive(0.05)
        if data is None:
            continue
        answer = decode(from_learner, data)
        if isinstance(answer, Welcome):
            return answer
        if isinstance(answer, Bye) and not answer.again:
            raise RunError(f"{control.endpoint}: the learner refused: {answer.reason}")
    return None


def fetch_weights(client: WeightsClient) -> tuple[Manifest, bytearray] | None:
    """The newest version; None: it was replaced while under way, or nobody answered: try again."""
    answer = client.manifest(encode(FetchManifest()), FETCH_TIMEOUT_S)
    if answer is None:
        return None
    manifest = decode(weights_reply, answer)
    if not isinstance(manifest, Manifest):
        raise ProtocolError(f"weights: asked for a manifest, got {type(manifest).__name__}")

    def index_of(header: bytes) -> int:
        chunk = decode(weights_reply, header)
        if not isinstance(chunk, Chunk) or chunk.version != manifest.version:
            raise ProtocolError(f"weights: asked for a chunk of version {manifest.version}, got something else")
        return chunk.index

    data = client.fetch(
        manifest.size,
        lambda index: encode(FetchChunk(version=manifest.version, index=index)),
        index_of,
        FETCH_TIMEOUT_S,
    )
    return None if data is None else (manifest, data)


def load_welcome_policy(welcome: Welcome, config: Config) -> Policy:
    """The model that the learner trains, from its path or hub id on this machine.

    Raises:
        ModelError: this machine holds another model under that name.
    """
    policy = load_policy(config.model, seed=config.run.seed)
    mismatch = policy.identity.mismatch(Identity(**json.loads(welcome.identity)))
    if mismatch:
        raise ModelError(f"model.model_name: {config.model.model_name!r} is not the learner's model: {mismatch}")
    if config.rollout.quantize_for_rollouts:
        policy.quantize()
    return policy


def work(endpoint: str, name: str, stop: StopRequest, patience_s: float) -> int:
    """A worker's whole life; 0: dismissed or asked to leave."""
    with zmq_context() as context:
        control = ControlClient(context, endpoint, name)
        welcome = introduce(control, "rollout", stop, patience_s)
        if welcome is None:
            return 0
        config = Config.model_validate_json(welcome.config)
        policy = load_welcome_policy(welcome, config)
        with closing(Scorer(config.reward.functions, timeout_s=config.reward.reward_timeout_s)) as scorer:
            worker = RolloutWorker(
                control, welcome, config, policy, scorer, WeightsClient(context, welcome.weights_endpoint), stop
            )
            try:
                while not stop and worker.dismissed is None:
                    worker.turn(wait_s=0.2)
            except Leaving:
                pass  # what it was sampling goes back with its leases
            control.send(encode(Bye(reason="asked to leave" if stop else "dismissed")))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m grpo_actors.rollout", description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--attach", metavar="RUN_DIR", type=Path, help="folder of a live run on this machine")
    where.add_argument("--connect", metavar="ENDPOINT", help="address of a run's control socket")
    parser.add_argument("--name", default=f"attached-{socket.gethostname()}-{os.getpid()}", help="name in the logs")
    parser.add_argument("--patience", type=float, default=30.0, metavar="SECONDS", help="how long to wait for the learner")
    args = parser.parse_args()
    stop = enter_process()
    bound_memory()
    endpoint = args.connect or Endpoints.read(args.attach).control
    return work(endpoint, args.name, stop, args.patience)


if __name__ == "__main__":
    sys.exit(run_command(main))
