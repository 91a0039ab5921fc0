"""A rollout worker: its leases, its policy and its results.

The worker does not depend on the process that it runs in; there are two kinds (see `RolloutWorker`).

It keeps every group until the learner has acknowledged it. By default it drains: it samples one run of leases at a time,
sends the groups together, and adopts new weights and begins the next run only after all of them have ended. With
``rollout.in_flight_updates`` it never drains: groups of the next runs take rows as they become free, a version is adopted
between two decoding steps as soon as it is available, and each group is sent as soon as it is whole. Every token keeps
the number of the version that sampled it. Versions only rise, so a group is as old as the first token of its first
completion.
"""

import time
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import mlx.core as mx

from grpo_actors.config import Config
from grpo_actors.errors import ProtocolError
from grpo_actors.failpoints import reach
from grpo_actors.policy.decoding.draw import Respond, Sample, SamplingParams
from grpo_actors.policy.decoding.sampling import Sampler, rows_for
from grpo_actors.policy.device import on_cuda, return_unused_memory
from grpo_actors.policy.model import Policy
from grpo_actors.process import StopRequest
from grpo_actors.progress import LOADING_S, begin_work, report_progress, scoring_patience_s
from grpo_actors.ranks.group import RankGroup
from grpo_actors.rollout.episodes import Episodes
from grpo_actors.rollout.joining import fetch_weights
from grpo_actors.rollout.leading import LeadingSampler
from grpo_actors.rollout.lease_sampler import LeaseSampler, LeaseSamples
from grpo_actors.rollout.results import problem_of, score_group
from grpo_actors.tasks.scoring import Scorer
from grpo_actors.transport.control import ControlClient
from grpo_actors.transport.weights import WeightsClient
from grpo_actors.wire.handshake import hello
from grpo_actors.wire.messages import (
    Ack,
    Announcement,
    Beat,
    Bye,
    Grant,
    Group,
    Lease,
    Message,
    Welcome,
    decode,
    encode,
    from_learner,
)

#: Seconds after which a group that is not acknowledged is sent again.
RESEND_S = 5.0
#: The batch of `warm_up`: tokens of its prompts, and its steps; the first is still under way when the second begins.
WARM_UP_PROMPT, WARM_UP_STEPS = 100, 3


@dataclass(slots=True)
class Unacknowledged:
    """A group that was sent, kept until the learner acknowledges it."""

    group: Group
    sent_s: float


@dataclass
class RolloutWorker:
    """One worker: its leases, its policy and its results. Its owner calls `turn` in a loop.

    It runs in a process of its own or, with ``rollout.workers = 0``, inside the learner's process. There it samples with
    the learner's own policy: `weights` is None, and the learner sets `version`. The learner changes the weights only while
    the worker is not `busy`; the policy is then in the state in which it trains.
    """

    control: ControlClient
    welcome: Welcome
    config: Config
    policy: Policy
    scorer: Scorer
    weights: WeightsClient | None = None
    #: None if a completion has one turn.
    episodes: Episodes | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    version: int = -1
    #: The ranks among which the policy is divided; None: it is not.
    group: RankGroup | None = None
    #: Monotonic time at which the learner was last reachable, in seconds.
    connected_s: float = field(default_factory=time.monotonic)
    #: Number of groups that the learner accepted.
    delivered: int = 0
    _newest: int = 0
    _has_stepped: bool = False
    _grants: deque[Grant] = field(default_factory=deque)
    _unacknowledged: dict[int, Unacknowledged] = field(default_factory=dict)
    _tokens: int = 0
    _next_beat_s: float = 0.0
    _working_s: float = 0.0
    _waiting_s: float = 0.0
    #: Time of the last `_book`; `_idle` says how the interval since then counts.
    _booked_s: float = field(default_factory=time.monotonic)
    _idle: bool = True
    #: Reason that the learner gave for parting from this worker; None if it did not.
    dismissed: str | None = None
    #: Whether the reason is an error: the learner dropped the worker.
    dropped: bool = False
    #: Whether the learner was started again with another run or other settings, for which this worker was not made.
    must_rejoin: bool = False
    _lease_sampler: LeaseSampler = field(init=False)

    def __post_init__(self) -> None:
        sampler = LeaseSampler if self.group is None else partial(LeadingSampler, self.group)
        self._lease_sampler = sampler(self.policy, self.config, sampling_params(self.config), self._respond)
        self._begin_work([])

    @property
    def busy(self) -> bool:
        """Whether completions are being sampled."""
        return bool(self._lease_sampler.leases)

    @property
    def _may_begin(self) -> bool:
        """Whether new weights may be adopted and the next run of leases may begin now."""
        return self.config.rollout.in_flight_updates or not self.busy

    def turn(self, wait_s: float) -> None:
        """Handle the messages that have arrived, and decode one token of every completion.

        An idle worker waits up to `wait_s` for a message. A worker that is asked to stop or is dismissed drops its leases
        unfinished; they return to the learner.
        """
        self._before_step(wait_s)
        if self.stop or self.dismissed is not None:
            self._lease_sampler.drop(list(self._lease_sampler.leases))
            return
        while self._may_begin and self._can_sample():
            leases = self._grants.popleft().leases
            self._begin_work([*self._lease_sampler.leases, *(lease.lease for lease in leases)])
            self._lease_sampler.begin(leases, self.version)
        if self.busy:
            self._step()
            self._book()
            # A worker that has run out of work reports it at once.
            self._beat("sampling" if self.busy else "waiting", force=not self.busy)

    def _begin_work(self, leases: Sequence[int]) -> None:
        """Report which leases are sampled from now on. Within the learner's process, the learner reports its own work."""
        if self.weights is None:
            return
        work = f"lease{'s' * (len(leases) > 1)} {', '.join(map(str, leases))}" if leases else ""
        patience_s = scoring_patience_s(self.config.reward.reward_timeout_s)
        # The first step may compile.
        begin_work(work, LOADING_S if work and not self._has_stepped else patience_s)

    def _step(self) -> None:
        tokens, done = self._lease_sampler.step()
        if not self._has_stepped:
            self._has_stepped = True
            self._begin_work(list(self._lease_sampler.leases))
        reach("worker.sampling")
        self._tokens += tokens
        for group in [self._score(sampling) for sampling in done]:
            self._deliver(group)
        # Only now: a beat sent during scoring must still list these leases, or the learner takes them for lost.
        self._lease_sampler.drop([sampling.lease.lease for sampling in done])
        if not self.busy:
            self._begin_work([])

    def _before_step(self, wait_s: float) -> None:
        """Handle messages first, because one may void all grants; then adopt new weights and resend groups."""
        self._booked_s, self._idle = time.monotonic(), not self._has_work()
        if self._idle:
            # Before the wait: the learner grants nothing to a worker that has not sent a beat.
            self._beat("waiting")
        self._receive(wait_s if self._idle else 0.0)
        self._adopt()
        self._resend()
        self._book()
        self._idle = not self._has_work()

    def _has_work(self) -> bool:
        return self.busy or self._can_sample()

    def _book(self) -> None:
        """Count the time since the last call as waiting or as working."""
        now_s = time.monotonic()
        spent_s, self._booked_s = now_s - self._booked_s, now_s
        self._waiting_s += spent_s if self._idle else 0.0
        self._working_s += 0.0 if self._idle else spent_s

    # --- messages ---------------------------------------------------------------------------------

    def _receive(self, wait_s: float) -> None:
        while (data := self.control.receive(wait_s)) is not None:
            wait_s = 0.0
            message = decode(from_learner, data)
            match message:
                case Grant():
                    self._drop_superseded(message)
                    self._grants.append(message)
                case Ack():
                    held = self._unacknowledged.get(message.lease)
                    if held is not None and held.group.attempt == message.attempt:
                        del self._unacknowledged[message.lease]
                    self.delivered += message.accepted
                case Announcement():
                    self._newest = max(self._newest, message.version)
                case Bye(again=True):
                    self._reset()
                    self._send(hello("rollout", self.control.name))
                case Bye():
                    self.dismissed, self.dropped = message.reason, not message.dismissed
                case Welcome():
                    self._next_beat_s = 0.0
                    self.must_rejoin = not _same_work(message, self.welcome)
                case _:
                    raise ProtocolError(f"{type(message).__name__} does not go this way")

    def _drop_superseded(self, newer: Grant) -> None:
        """Drop earlier grants of the leases in `newer`: the learner gave those attempts up and refuses their results."""
        again = {lease.lease for lease in newer.leases}
        self._grants = deque(
            grant for grant in self._grants if again.isdisjoint(lease.lease for lease in grant.leases)
        )
        self._lease_sampler.drop(again)

    def _reset(self) -> None:
        """Drop all grants, groups and versions, because the learner is a new process.

        A resumed run continues numbering from its checkpoint. So the number of the version held here may be used again,
        for other weights.
        """
        self._grants.clear()
        self._unacknowledged.clear()
        self._lease_sampler.drop(list(self._lease_sampler.leases))
        if self.weights is not None:
            self.version, self._newest = -1, 0

    def _deliver(self, group: Group) -> None:
        self._unacknowledged[group.lease] = Unacknowledged(group, time.monotonic())
        reach("worker.scored")
        self._send(group)
        reach("worker.sent")

    def _send(self, message: Message) -> None:
        """Send if connected; a message that must have an effect is sent again until it has."""
        if self.control.send(encode(message)):
            self.connected_s = time.monotonic()

    def _resend(self) -> None:
        now_s = time.monotonic()
        for waiting in self._unacknowledged.values():
            if now_s - waiting.sent_s > RESEND_S:
                waiting.sent_s = now_s
                self._send(waiting.group)

    def _beat(self, state: Literal["sampling", "scoring", "waiting"], *, force: bool = False) -> None:
        report_progress()
        now_s = time.monotonic()
        if not force and now_s < self._next_beat_s:
            return
        self._next_beat_s = now_s + self.welcome.beat_s
        self._book()
        held = [lease.lease for grant in self._grants for lease in grant.leases]
        beat = Beat(
            state=state,
            version=self.version,
            tokens=self._tokens,
            working_s=self._working_s,
            waiting_s=self._waiting_s,
            peak_bytes=mx.get_peak_memory(),
            credits=self.config.rollout.runs_held * self.config.rollout.batch_groups,
            holding=[*held, *self._lease_sampler.leases, *self._unacknowledged],
        )
        self._send(beat)

    # --- weights ----------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Fetch and load the newest version, completely or not at all."""
        if self.weights is None or self.version >= self._newest or not self._may_begin:
            return
        # A large version over a slow network may take longer than the time after which a silent worker counts as lost.
        sign_of_life = partial(self._beat, "sampling" if self.busy else "waiting")
        fetched = fetch_weights(self.weights, on_chunk=sign_of_life)
        if fetched is None:
            return
        self.version, arrays = fetched
        self._newest = max(self._newest, self.version)
        self._lease_sampler.adopt(self.version, arrays)
        return_unused_memory()

    def _can_sample(self) -> bool:
        """Whether the next run of leases may be sampled with the version held."""
        next_run = self._grants[0].leases if self._grants else []
        return bool(next_run) and self.version >= max(lease.min_version for lease in next_run)

    # --- sampling and scoring ---------------------------------------------------------------------

    def _respond(self, lease: Lease) -> Respond | None:
        """Return the function that replies to the turns of a lease's completions; None if they have one turn."""
        if self.episodes is None:
            return None
        respond = self.episodes.of(problem_of(lease))
        if respond is None:
            return None

        def answer(sample: Sample) -> Sequence[int] | None:
            reply = respond(sample)
            self._beat("sampling")  # within one step, many rows may each wait for their environment
            return reply

        return answer

    def _score(self, sampling: LeaseSamples) -> Group:
        group = score_group(
            *(sampling.lease, sampling.samples, self.policy, self.scorer),
            total_updates=self.welcome.total_updates,
            sampling_s=sampling.sampling_s,
            grade=self.config.reward.grade,
        )
        self._beat("scoring")
        return group


def _same_work(one: Welcome, other: Welcome) -> bool:
    """Return whether two learners ask for the same."""
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("run_id", "config", "identity", "weights_endpoint")
    )


def sampling_params(config: Config) -> SamplingParams:
    """Return the sampling parameters that section [rollout] asks for."""
    rollout = config.rollout
    return SamplingParams(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        repetition_penalty=rollout.repetition_penalty,
        stop=rollout.stop,
        think_tokens=rollout.think_tokens,
        max_kv_tokens=rollout.max_kv_tokens,
        kv_bits=rollout.kv_bits,
        compiled=config.learner.use_compile,
    )


def warm_up(policy: Policy, config: Config) -> None:
    """Decode a few tokens of a full batch: on CUDA this plans and compiles what the first leases need.

    Not for a model that is quantised for sampling, which happens when the learner has answered, nor for one that is
    divided: the other ranks would have to decode too.
    """
    if not on_cuda() or config.rollout.quantize_for_rollouts or policy.sharding is not None:
        return
    rollout, params = config.rollout, sampling_params(config)
    completions = rollout.batch_groups * rollout.num_generations
    rows = rows_for(policy, completions, config.data.max_prompt_length, params)
    with closing(Sampler(policy, params, rows)) as sampler:
        for group in range(rollout.batch_groups):
            sampler.submit(group, [1] * WARM_UP_PROMPT, range(rollout.num_generations))
        for _ in range(WARM_UP_STEPS):
            sampler.step()
