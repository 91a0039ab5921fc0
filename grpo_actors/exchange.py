"""The learner's other half: a thread that owns every socket, the schedule and the journal.

It grants leases, takes groups in, serves weights and publishes events while the learner computes.
The learner calls the few methods above the line; each hands a piece of work to the thread, or takes
a batch from it, so nothing here needs a lock. What may be granted and what may train is decided by
`schedule`, which is pure; this file only carries its decisions out.
"""

import contextlib
import os
import queue
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import zmq

from grpo_actors.errors import ProtocolError, TrainingError
from grpo_actors.groups import SampledCompletion, SampledGroup
from grpo_actors.messages import (
    PROTOCOL_VERSION,
    Ack,
    Announcement,
    Beat,
    Bye,
    Chunk,
    Evaluation,
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
    from_peer,
    ints,
    weights_request,
)
from grpo_actors.observe.sinks import Journal
from grpo_actors.schedule.leases import Cursor, Granted, LeaseTable
from grpo_actors.schedule.order import ProblemOrder, sample_seeds
from grpo_actors.tasks.task import Problem
from grpo_actors.transport.control import ControlServer
from grpo_actors.transport.events import EventPublisher
from grpo_actors.transport.sockets import Endpoints, zmq_context
from grpo_actors.transport.weights import WeightsServer

T = TypeVar("T")

#: Peers beat this often; one that is silent for LOST_S is taken for hung, and its leases go out again.
BEAT_S = 1.0
LOST_S = 120.0
#: How often deadlines and processes are looked at: a killed local worker is seen within this time.
TICK_S = 0.25
#: A peer that sends this many messages against the protocol is not listened to any more.
MAX_OFFENCES = 10


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a checkpoint stores of this half."""

    cursor: Cursor
    records: int


@dataclass(slots=True)
class Peer:
    name: str
    role: str
    pid: int
    local: bool
    last_seen_s: float
    state: str = "joined"
    credits: int = 0
    version: int = -1
    groups: int = 0
    tokens: int = 0
    tokens_at: tuple[float, int] = (0.0, 0)
    tokens_per_s: float = 0.0


@dataclass
class Supply:
    """The problems of a run, in order, as leases want them."""

    problems: Sequence[Problem]
    order: ProblemOrder
    seed: int
    num_generations: int
    max_prompt_length: int
    #: Messages -> token ids.
    encode_chat: Callable[[Sequence[Mapping[str, str]]], list[int]]
    _prompts: dict[int, tuple[int, Problem, list[int]]] = field(default_factory=dict)

    def prompt(self, position: int) -> tuple[int, Problem, list[int]]:
        """(epoch, problem, prompt token ids) at a position of the order."""
        if position not in self._prompts:
            place = self.order.at(position)
            problem = self.problems[place.index]
            self._prompts[position] = (place.epoch, problem, self.encode_chat(problem.messages))
        return self._prompts[position]

    def forget(self, position: int) -> None:
        self._prompts.pop(position, None)


class Exchange:
    """Start it, take batches, publish versions, record events, finish."""

    def __init__(
        self,
        *,
        endpoints: Endpoints,
        table: LeaseTable[SampledGroup],
        supply: Supply,
        welcome: Welcome,
        open_journal: Callable[[EventPublisher], Journal],
    ) -> None:
        self._endpoints = endpoints
        self._table = table
        self._supply = supply
        self._welcome = welcome
        self._open_journal = open_journal
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._batches: queue.SimpleQueue[list[SampledGroup] | BaseException] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._run, name="exchange", daemon=True)
        self._bound: Future[None] = Future()
        self._closing = False
        # Owned by the thread from here on.
        self._peers: dict[bytes, Peer] = {}
        self._offences: Counter[bytes] = Counter()
        self._batch_out = False
        self._evaluated: dict[int, Evaluation] = {}
        self._fresh_evaluations: list[Evaluation] = []
        self._tokens_in = 0

    # --- the learner's side -----------------------------------------------------------------------

    def start(self) -> None:
        """Bind and run; an address that is taken is a `RunError` here."""
        self._thread.start()
        self._bound.result()

    def publish(self, manifest: Manifest, data: memoryview, consumed: Sequence[int]) -> None:
        """A new version: the groups in `consumed` are in it, and workers may fetch it."""
        self._post(lambda: self._do_publish(manifest, data, consumed))

    def next_batch(self, timeout_s: float) -> list[SampledGroup] | None:
        """The groups of the next update, or None after `timeout_s`.

        Raises:
            BaseException: whatever the thread died of.
        """
        try:
            batch = self._batches.get(timeout=timeout_s) if timeout_s > 0 else self._batches.get_nowait()
        except queue.Empty:
            return None
        if isinstance(batch, BaseException):
            raise batch
        return batch

    def record(self, topic: str, **fields: Any) -> None:
        """Number, keep and publish one record."""
        self._post(lambda: self._append(topic, fields))

    def snapshot(self) -> Snapshot:
        """The cursor and the record count, after everything said so far has taken effect."""

        def take() -> Snapshot:
            self._journal.sync()
            return Snapshot(self._table.cursor, self._journal.seq)

        return self._ask(take)

    def take_evaluations(self) -> list[Evaluation]:
        """Evaluations that came in since the last call."""

        def take() -> list[Evaluation]:
            fresh, self._fresh_evaluations = self._fresh_evaluations, []
            return fresh

        return self._ask(take)

    def take_tokens(self) -> int:
        """Completion tokens accepted since the last call."""

        def take() -> int:
            tokens, self._tokens_in = self._tokens_in, 0
            return tokens

        return self._ask(take)

    def evaluator_present(self) -> bool:
        return self._ask(lambda: any(p.role == "evaluator" and p.state != "lost" for p in self._peers.values()))

    def dismiss(self, role: str, reason: str) -> None:
        """Send all peers of a role home."""
        self._post(lambda: self._do_dismiss(role, reason))

    def close(self) -> None:
        """Stop the thread once all that was said before has been done; may be called twice."""
        if self._thread.is_alive():
            self._post(self._do_close)
            self._thread.join()
        for descriptor in (self._wake_read, self._wake_write):
            with contextlib.suppress(OSError):  # closed before
                os.close(descriptor)

    def _post(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        with contextlib.suppress(BlockingIOError):  # the pipe is full of wake-ups already
            os.write(self._wake_write, b"!")

    def _ask(self, question: Callable[[], T]) -> T:
        answer: Future[T] = Future()
        self._post(lambda: answer.set_result(question()))
        while True:
            try:
                return answer.result(timeout=1)
            except TimeoutError:
                if not self._thread.is_alive():
                    raise TrainingError("the exchange thread is gone; see the error above") from None

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with zmq_context() as context:
                self._control = ControlServer(context, self._endpoints.control)
                self._weights = WeightsServer(context, self._endpoints.weights)
                publisher = EventPublisher(context, self._endpoints.events)
                with contextlib.closing(publisher), self._open_journal(publisher) as self._journal:
                    self._bound.set_result(None)
                    self._loop()
        except BaseException as error:  # noqa: BLE001 - a thread's outermost frame: the learner raises it
            if self._bound.done():
                self._batches.put(error)
            else:
                self._bound.set_exception(error)

    def _loop(self) -> None:
        poller = zmq.Poller()
        for watched in (self._control.socket, self._weights.socket, self._wake_read):
            poller.register(watched, zmq.POLLIN)
        next_tick_s = 0.0
        while not self._closing:
            ready = dict(poller.poll(int(TICK_S * 1000)))
            if self._wake_read in ready:
                os.read(self._wake_read, 4096)
            while not self._commands.empty():
                self._commands.get()()
            self._weights.serve(_parse_fetch, lambda version, index: encode(Chunk(version=version, index=index)))
            for peer, data in self._control.receive():
                self._hear(peer, data)
            now_s = time.monotonic()
            if now_s >= next_tick_s:
                self._tick(now_s)
                next_tick_s = now_s + TICK_S
            self._grant(now_s)
            self._hand_over()

    def _hear(self, identity: bytes, data: bytes) -> None:
        if self._offences[identity] >= MAX_OFFENCES:
            return
        try:
            message = decode(from_peer, data)
            self._obey(identity, message)
        except ProtocolError as error:
            self._offences[identity] += 1
            self._append("log", {"level": "warning", "text": f"{identity.decode(errors='replace')}: {error}"})
            if self._offences[identity] >= MAX_OFFENCES:
                self._lose(identity, f"{MAX_OFFENCES} messages against the protocol")

    def _obey(self, identity: bytes, message: Message) -> None:
        if isinstance(message, Hello):
            self._greet(identity, message)
            return
        peer = self._peers.get(identity)
        if peer is None:
            # The learner was restarted under a live worker: it has to introduce itself again.
            self._send(identity, Bye(reason="introduce yourself", again=True))
            return
        peer.last_seen_s = time.monotonic()
        if peer.state == "lost":
            self._change(peer, "joined")
        match message:
            case Group():
                self._receive(identity, peer, message)
            case Beat():
                self._count(peer, message)
                self._table.reconcile(peer.name, message.holding, peer.last_seen_s)
            case Evaluation():
                if message.update not in self._evaluated:
                    self._evaluated[message.update] = message
                    self._fresh_evaluations.append(message)
            case Bye():
                self._table.hand_back(peer.name)
                self._change(peer, "left")
                del self._peers[identity]
            case _:
                raise ProtocolError(f"{message.__class__.__name__} does not go this way")

    def _greet(self, identity: bytes, hello: Hello) -> None:
        if hello.protocol != PROTOCOL_VERSION:
            self._send(
                identity,
                Bye(reason=f"protocol {hello.protocol} there, {PROTOCOL_VERSION} here: install the same version"),
            )
            return
        if hello.run_id and hello.run_id != self._welcome.run_id:
            self._send(identity, Bye(reason=f"this is run {self._welcome.run_id}, not {hello.run_id}"))
            return
        # A reconnect under the same name: what it held before is held no more.
        self._table.hand_back(hello.name)
        local = hello.host == socket.gethostname()
        peer = Peer(hello.name, hello.role, hello.pid, local, time.monotonic())
        self._peers[identity] = peer
        self._send(identity, self._welcome)
        self._change(peer, "joined")

    def _receive(self, identity: bytes, peer: Peer, message: Group) -> None:
        group, complaint = self._examine(peer, message)
        if group is None:
            self._send(identity, Ack(lease=message.lease, attempt=message.attempt, accepted=False, reason=complaint))
            raise ProtocolError(complaint)
        oldest = min(min(completion.versions) for completion in group.completions)
        verdict = self._table.accept(message.lease, message.attempt, oldest, group)
        self._send(
            identity,
            Ack(lease=message.lease, attempt=message.attempt, accepted=verdict.accepted, reason=verdict.reason),
        )
        if verdict.accepted and not verdict.reason:
            peer.groups += 1
            self._tokens_in += sum(len(completion.tokens) for completion in group.completions)
            for failure in message.failures:
                self._append("log", {"level": "warning", "text": f"{group.problem.id}: {failure}"})

    def _examine(self, peer: Peer, message: Group) -> tuple[SampledGroup | None, str]:
        """The group as facts, or what is wrong with its content."""
        if len(message.completions) != self._supply.num_generations:
            return None, f"a group has {self._supply.num_generations} completions, got {len(message.completions)}"
        if message.lease >= self._table.granted_below:
            return None, f"lease {message.lease} was never granted"
        epoch, problem, prompt = self._supply.prompt(message.lease)
        completions = [SampledCompletion.read(completion) for completion in message.completions]
        if any(v > self._table.version or v < 0 for c in completions for v in c.versions):
            return None, f"lease {message.lease} claims a version that does not exist yet"
        return SampledGroup(message.lease, epoch, problem, prompt, peer.name, completions), ""

    def _count(self, peer: Peer, beat: Beat) -> None:
        now_s = time.monotonic()
        since_s, before = peer.tokens_at
        peer.tokens = beat.tokens
        if now_s - since_s > 2:
            peer.tokens_per_s = max(0, beat.tokens - before) / (now_s - since_s) if since_s else 0.0
            peer.tokens_at = (now_s, beat.tokens)
        if beat.state in ("sampling", "waiting") and peer.state != beat.state:
            self._change(peer, beat.state)
        peer.version, peer.credits = beat.version, beat.credits

    def _tick(self, now_s: float) -> None:
        for identity, peer in list(self._peers.items()):
            if peer.state == "lost":
                continue
            if peer.local and not _process_lives(peer.pid):
                self._lose(identity, "its process ended")
                del self._peers[identity]
            elif now_s - peer.last_seen_s > LOST_S:
                self._lose(identity, f"silent for {LOST_S:.0f} s")
        self._report_set_aside(self._table.expire(now_s))

    def _lose(self, identity: bytes, why: str) -> None:
        peer = self._peers.get(identity)
        if peer is None:
            return
        self._change(peer, "lost", why=why)
        self._report_set_aside(self._table.release(peer.name))

    def _report_set_aside(self, positions: Sequence[int]) -> None:
        for position in positions:
            _, problem, _ = self._supply.prompt(position)
            self._append(
                "alarm",
                {
                    "name": "problem set aside",
                    "text": f"{problem.id}: three workers died or timed out on it; it is left out (lease {position})",
                },
            )
            self._supply.forget(position)

    def _grant(self, now_s: float) -> None:
        for identity, peer in list(self._peers.items()):
            while peer.role == "rollout" and peer.state != "lost":
                granted = self._table.grant(peer.name, peer.credits, now_s)
                if not granted:
                    break
                leases = [lease for grant in granted if (lease := self._lease(grant)) is not None]
                if leases and not self._send(identity, Grant(leases=leases)):
                    self._lose(identity, "its connection is closed or full")

    def _lease(self, grant: Granted) -> Lease | None:
        """The message for one grant; None: its prompt is too long, and the lease is dropped."""
        epoch, problem, prompt = self._supply.prompt(grant.lease)
        if len(prompt) > self._supply.max_prompt_length:
            self._table.drop([grant.lease])
            self._supply.forget(grant.lease)
            text = f"{problem.id} left out: {len(prompt)} prompt tokens, data.max_prompt_length is {self._supply.max_prompt_length}"
            self._append("log", {"level": "info", "text": text})
            return None
        return Lease(
            lease=grant.lease,
            attempt=grant.attempt,
            min_version=grant.min_version,
            problem_id=problem.id,
            prompt=ints(prompt),
            seeds=sample_seeds(self._supply.seed, epoch, problem.id, self._supply.num_generations),
            messages=list(problem.messages),
            answer=problem.answer,
            columns=dict(problem.columns),
        )

    def _hand_over(self) -> None:
        """Give the learner its next batch as soon as it is whole, one at a time."""
        if self._batch_out:
            return
        batch = self._table.next_batch()
        if batch is not None:
            self._batch_out = True
            self._batches.put([group for _, group in batch])

    def _do_publish(self, manifest: Manifest, data: memoryview, consumed: Sequence[int]) -> None:
        self._weights.publish(manifest.version, encode(manifest), data)
        if consumed:
            self._table.consume(consumed)
            self._batch_out = False
        for position in consumed:
            self._supply.forget(position)
        for identity, peer in self._peers.items():
            if peer.role == "rollout" and peer.state != "lost":
                self._send(identity, Announcement(version=manifest.version))
        self._append("policy", {"version": manifest.version, "bytes": manifest.size, "digest": manifest.digest})

    def _do_dismiss(self, role: str, reason: str) -> None:
        for identity, peer in self._peers.items():
            if peer.role == role:
                self._send(identity, Bye(reason=reason))

    def _do_close(self) -> None:
        self._closing = True

    def _change(self, peer: Peer, state: str, **more: Any) -> None:
        """A worker's new state, which is an event, unless it only went between sampling and waiting."""
        worth_telling = state in ("joined", "left", "lost") or peer.state in ("joined", "lost")
        peer.state = state
        if worth_telling:
            self._append("worker", {**self._describe(peer), **more})

    def _describe(self, peer: Peer) -> dict[str, Any]:
        return {
            "worker": peer.name,
            "role": peer.role,
            "state": peer.state,
            "groups": peer.groups,
            "tokens_per_s": round(peer.tokens_per_s, 1),
            "version": peer.version,
        }

    def _append(self, topic: str, fields: Mapping[str, Any]) -> None:
        if topic == "metrics":
            for peer in self._peers.values():
                if peer.role == "rollout":
                    self._journal.append("worker", self._describe(peer))
        self._journal.append(topic, fields)

    def _send(self, identity: bytes, message: Message) -> bool:
        return self._control.send(identity, encode(message))


def _parse_fetch(data: bytes) -> tuple[int, int] | None:
    request = decode(weights_request, data)
    return None if isinstance(request, FetchManifest) else (request.version, request.index)


def _process_lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

