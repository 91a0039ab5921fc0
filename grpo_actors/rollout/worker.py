"""A rollout worker: its leases, its policy, its results. Knows no process: two kinds of owner run it.

It keeps every group until the learner has acknowledged it. By default it drains: it samples one run of leases at a time,
sends the groups together, and takes new weights and the next run once all of them have ended. With
``rollout.in_flight_updates`` it never drains: groups of the next runs take the places that get free, a version is adopted between
two decoding steps as soon as it is there, and each group is sent as soon as it is whole. Every token keeps the number of
the version that sampled it; as versions only rise, a group is as old as the first token of its first completion.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from grpo_actors.config import Config
from grpo_actors.errors import ProtocolError
from grpo_actors.policy.decoding.draw import Respond, Sample, SamplingParams
from grpo_actors.policy.model import Policy
from grpo_actors.process import StopRequest
from grpo_actors.rollout.episodes import Episodes
from grpo_actors.rollout.joining import fetch_weights
from grpo_actors.rollout.results import problem_of, scored
from grpo_actors.rollout.under_way import Sampling, UnderWay
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

#: A group that was not acknowledged in this time is sent again.
RESEND_S = 5.0


@dataclass(slots=True)
class Unacknowledged:
    """A group on its way, kept until the learner says that it has it."""

    group: Group
    sent_s: float


@dataclass
class RolloutWorker:
    """One worker: its leases, its policy, its results. `turn` is one step of its life.

    The same object runs in a process of its own and, with ``rollout.workers = 0``, inside the
    learner's, where it samples with the learner's own policy (`weights` is None: its owner sets
    `version`). That owner changes the weights only while the worker is not `busy`; then the policy is as it trains.
    """

    control: ControlClient
    welcome: Welcome
    config: Config
    policy: Policy
    scorer: Scorer
    weights: WeightsClient | None = None
    #: None: a completion is one turn.
    episodes: Episodes | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    version: int = -1
    #: When the learner could last be reached, on the monotonic clock.
    connected_s: float = field(default_factory=time.monotonic)
    #: Groups that the learner acknowledged.
    delivered: int = 0
    _newest: int = 0
    _grants: deque[Grant] = field(default_factory=deque)
    _unacknowledged: dict[int, Unacknowledged] = field(default_factory=dict)
    _tokens: int = 0
    _next_beat_s: float = 0.0
    _working_s: float = 0.0
    _waiting_s: float = 0.0
    #: Up to when its time is counted (`_book`), and as what the time since then will be.
    _booked_s: float = field(default_factory=time.monotonic)
    _idle: bool = True
    #: Why the learner sent it home; None: it did not.
    dismissed: str | None = None
    _under_way: UnderWay = field(init=False)

    def __post_init__(self) -> None:
        self._under_way = UnderWay(self.policy, self.config, sampling_params(self.config), self._respond)

    @property
    def busy(self) -> bool:
        """Whether completions are under way."""
        return bool(self._under_way.leases)

    @property
    def _is_open(self) -> bool:
        """Whether new weights and the next run of leases may come now."""
        return self.config.rollout.in_flight_updates or not self.busy

    def turn(self, wait_s: float) -> None:
        """Hear what there is (waiting `wait_s` for it when idle), and decode one token of every completion.

        Asked to stop or sent home, it gives up what is under way: that goes back with its leases.
        """
        self._listen(wait_s)
        if self.stop or self.dismissed is not None:
            self._under_way.drop(list(self._under_way.leases))
            return
        while self._is_open and self._can_sample():
            self._under_way.begin(self._grants.popleft().leases, self.version)
        if self.busy:
            self._step()
            self._book()
            # Out of work: told at once.
            self._beat("sampling" if self.busy else "waiting", force=not self.busy)

    def _step(self) -> None:
        tokens, done = self._under_way.step()
        self._tokens += tokens
        for group in [self._score(sampling) for sampling in done]:
            self._deliver(group)
        # Only now: a beat while they are scored must not say that nobody has the leases.
        self._under_way.drop([sampling.lease.lease for sampling in done])

    def _listen(self, wait_s: float) -> None:
        """Do what comes before a step: messages, which may say that all grants are void, and new weights."""
        self._booked_s, self._idle = time.monotonic(), not self._has_work()
        if self._idle:
            self._beat("waiting")  # before the wait: nothing is granted to whoever has not beaten
        self._hear(wait_s if self._idle else 0.0)
        self._adopt()
        self._resend()
        self._book()
        self._idle = not self._has_work()

    def _has_work(self) -> bool:
        return self.busy or self._can_sample()

    def _book(self) -> None:
        """Count the time since the last call as spent waiting or working."""
        now_s = time.monotonic()
        spent_s, self._booked_s = now_s - self._booked_s, now_s
        self._waiting_s += spent_s if self._idle else 0.0
        self._working_s += 0.0 if self._idle else spent_s

    # --- messages ---------------------------------------------------------------------------------

    def _hear(self, wait_s: float) -> None:
        while (data := self.control.receive(wait_s)) is not None:
            wait_s = 0.0
            message = decode(from_learner, data)
            match message:
                case Grant():
                    self._drop_older(message)
                    self._grants.append(message)
                case Ack():
                    held = self._unacknowledged.get(message.lease)
                    if held is not None and held.group.attempt == message.attempt:
                        del self._unacknowledged[message.lease]
                    self.delivered += message.accepted
                case Announcement():
                    self._newest = max(self._newest, message.version)
                case Bye(again=True):
                    self._forget()
                    self._say(hello("rollout", self.control.name, self.welcome.run_id))
                case Bye():
                    self.dismissed = message.reason
                case Welcome():
                    self._next_beat_s = 0.0
                case _:
                    raise ProtocolError(f"{type(message).__name__} does not go this way")

    def _drop_older(self, newer: Grant) -> None:
        """A lease that is granted again was given up: nobody waits for what is left of its old grant."""
        again = {lease.lease for lease in newer.leases}
        self._grants = deque(
            grant for grant in self._grants if again.isdisjoint(lease.lease for lease in grant.leases)
        )
        self._under_way.drop(again)

    def _forget(self) -> None:
        """The learner is a new process: what it granted before is void, and so are its versions.

        A run that was resumed numbers on from its checkpoint: the version held here may have its
        number again one day, with other weights.
        """
        self._grants.clear()
        self._unacknowledged.clear()
        self._under_way.drop(list(self._under_way.leases))
        if self.weights is not None:
            self.version, self._newest = -1, 0

    def _deliver(self, group: Group) -> None:
        self._unacknowledged[group.lease] = Unacknowledged(group, time.monotonic())
        self._say(group)

    def _say(self, message: Message) -> None:
        """Send if connected; whatever matters is said again until it had its effect."""
        if self.control.send(encode(message)):
            self.connected_s = time.monotonic()

    def _resend(self) -> None:
        now_s = time.monotonic()
        for waiting in self._unacknowledged.values():
            if now_s - waiting.sent_s > RESEND_S:
                waiting.sent_s = now_s
                self._say(waiting.group)

    def _beat(self, state: Literal["sampling", "scoring", "waiting"], *, force: bool = False) -> None:
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
            credits=self.config.rollout.runs_held * self.config.rollout.batch_groups,
            holding=[*held, *self._under_way.leases, *self._unacknowledged],
        )
        self._say(beat)

    # --- weights ----------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Take the newest version, all of it or nothing."""
        if self.weights is None or self.version >= self._newest or not self._is_open:
            return
        # A large version over a slow network takes longer than a silent worker is believed.
        sign_of_life = partial(self._beat, "sampling" if self.busy else "waiting")
        fetched = fetch_weights(self.weights, on_chunk=sign_of_life)
        if fetched is None:
            return
        self.version, arrays = fetched
        self._newest = max(self._newest, self.version)
        self._under_way.adopt(self.version, arrays)

    def _can_sample(self) -> bool:
        """Whether there is a run of leases that the held version may sample."""
        next_one = self._grants[0].leases if self._grants else []
        return bool(next_one) and self.version >= max(lease.min_version for lease in next_one)

    # --- sampling and scoring ---------------------------------------------------------------------

    def _respond(self, lease: Lease) -> Respond | None:
        """What answers the turns of its completions; None: they have one."""
        if self.episodes is None:
            return None
        respond = self.episodes.of(problem_of(lease))

        def answer(sample: Sample) -> Sequence[int] | None:
            reply = respond(sample)
            self._beat("sampling")  # many rows may each wait for their environment within one step
            return reply

        return answer

    def _score(self, sampling: Sampling) -> Group:
        group = scored(
            *(sampling.lease, sampling.samples, self.policy, self.scorer), sampling_s=sampling.sampling_s
        )
        self._beat("scoring")
        return group


def sampling_params(config: Config) -> SamplingParams:
    """How section [rollout] wants completions sampled."""
    rollout = config.rollout
    return SamplingParams(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        repetition_penalty=rollout.repetition_penalty,
        stop=rollout.stop,
        max_kv_tokens=rollout.max_kv_tokens,
        compiled=config.learner.use_compile,
    )
