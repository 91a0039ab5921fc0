"""An exchange and small real peers for it: DEALER sockets that send what a test wants."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xxhash
from bounds import HANG_S
from scores import report

from grpo_actors.learner.exchange.exchange import Exchange, Quarantine, SamplingRules
from grpo_actors.learner.exchange.selection import Selection
from grpo_actors.learner.exchange.supply import Supply
from grpo_actors.observe.sinks import Journal
from grpo_actors.schedule.leases import LeaseTable
from grpo_actors.schedule.order import ProblemOrder
from grpo_actors.schedule.quarantine import Gap
from grpo_actors.tasks.task import Problem
from grpo_actors.transport.access import Access
from grpo_actors.transport.control import ControlClient
from grpo_actors.transport.keys import ClientKey
from grpo_actors.transport.sockets import Context, plan_endpoints
from grpo_actors.wire import messages as wire

#: Secret of the run's evaluator.
TOKEN = "5ecret"  # noqa: S105
CHUNK = 1000
PROBLEMS = [
    Problem(f"p{i}", ({"role": "user", "content": f"problem {i}"},), f"{i}", {"n": i}) for i in range(20)
]

RULES = SamplingRules(
    vocabulary=100,
    max_new_tokens=4,
    max_turns=2,
    stop_tokens=frozenset({1}),
    ends=lambda turn: turn[-1] == 1,
    closing=(),
    rewards=frozenset({"correct"}),
)


class Clock:
    """The real clock, which a test can put forward, or freeze."""

    ahead_s = 0.0
    _frozen_s: float | None = None

    def __call__(self) -> float:
        return (time.monotonic() if self._frozen_s is None else self._frozen_s) + self.ahead_s

    def freeze(self) -> None:
        """Stop; from now on only `ahead_s` moves it."""
        self._frozen_s = time.monotonic()


class Peer:
    """A worker or evaluator without a model."""

    def __init__(
        self,
        run: "Run",
        name: str,
        role: str = "rollout",
        *,
        host: str = "elsewhere",
        pid: int = 7,
        key: ClientKey | None = None,
    ) -> None:
        self.run, self.name, self.role, self.host, self.pid = run, name, role, host, pid
        self.unread: list[wire.Message] = []
        self.control = ControlClient(run.context, run.endpoints.control, name, key)

    def send(self, message: "wire.Message | bytes") -> None:
        data = message if isinstance(message, bytes) else wire.encode(message)
        deadline = time.monotonic() + HANG_S
        while not self.control.send(data):
            assert time.monotonic() < deadline, "never connected"
            self.control.socket.poll(10)

    def receive(self, kind: type[Any]) -> Any:
        """Return the next message of a kind. Others are kept, except announcements, which come at any time."""
        for message in self.unread:
            if isinstance(message, kind):
                self.unread.remove(message)
                return message
        deadline = time.monotonic() + HANG_S
        while (data := self.control.receive(max(0.0, deadline - time.monotonic()))) is not None:
            message = wire.decode(wire.from_learner, data)
            if isinstance(message, kind):
                return message
            if not isinstance(message, wire.Announcement):
                self.unread.append(message)
        raise AssertionError(f"{self.name} received no {kind.__name__}, but {self.unread}")

    def hello(self, **changes: Any) -> wire.Hello:
        fields = {
            "protocol": wire.PROTOCOL_VERSION,
            "role": self.role,
            "name": self.name,
            "host": self.host,
            "pid": self.pid,
            "token": TOKEN if self.role == "evaluator" else "",
        }
        return wire.Hello.model_validate(fields | changes)

    def join(self) -> "Peer":
        self.send(self.hello())
        self.receive(wire.Welcome)
        return self

    def beat(
        self, capacity: int, holding: Sequence[int] = (), version: int = 0, state: str = "waiting"
    ) -> None:
        fields = {"state": state, "credits": capacity, "holding": list(holding), "version": version}
        self.send(wire.Beat.model_validate(fields))

    def wait_until_seen(self) -> None:
        """Send a beat, and wait until the learner has counted it."""
        while self.control.receive(0.0) is not None:
            pass
        self.beat(capacity=0)
        self.receive(wire.Announcement)

    def take(self, capacity: int = 2, runs: int = 1) -> list[wire.Lease]:
        """Ask for leases, and return those of the next grants."""
        self.beat(capacity)
        return [lease for _ in range(runs) for lease in self.receive(wire.Grant).leases]

    def deliver(self, lease: wire.Lease, version: int = 0, **changes: Any) -> wire.Ack:
        self.send(group(lease, version, **changes))
        ack = self.receive(wire.Ack)
        assert (ack.lease, ack.attempt) == (lease.lease, lease.attempt)
        return ack


def tokens_of(seed: int) -> bytes:
    """Return two tokens, of which only the second ends a completion."""
    return wire.ints([2 + seed % 98, 1])


def completion(seed: int, version: int, **changes: Any) -> dict[str, Any]:
    fields = {
        "tokens": tokens_of(seed),
        "logprobs": wire.floats([-0.5, -0.25]),
        "versions": wire.ints([version, version]),
        "finished": True,
        "rewards": {"correct": 1.0},
    }
    return fields | changes


def group(lease: wire.Lease, version: int = 0, completions: Any = None, **changes: Any) -> wire.Group:
    grant = {"lease": lease.lease, "attempt": lease.attempt, "token": lease.token}
    fields = grant | {"sampling_s": 0.1, "scoring_s": 0.1}
    sampled = [completion(seed, version) for seed in lease.seeds] if completions is None else completions
    return wire.Group.model_validate(fields | {"completions": sampled} | changes)


class Run:
    """An exchange, its run folder, and the peers that a test makes."""

    def __init__(self, folder: Path, context: Context, **settings: Any) -> None:
        self.folder, self.context, self.clock = folder, context, Clock()
        self.peers: list[Peer] = []
        access: Access | None = settings.pop("access", None)
        scheme = "ipc" if access is None else "tcp"
        self.endpoints = plan_endpoints(folder, scheme, "127.0.0.1", 0)
        of_table = {"groups_per_update": 2, "max_staleness": 1, "batch_groups": 2, "last_version": 100}
        of_table |= {key: settings.pop(key) for key in [*of_table, "version", "cursor"] if key in settings}
        self.table: LeaseTable[Any] = LeaseTable(lease_timeout_s=60.0, **of_table)
        of_supply: dict[str, Any] = {"problems": PROBLEMS, "max_prompt_length": 50} | settings
        self.supply = Supply(
            order=ProblemOrder(len(of_supply["problems"]), 3, shuffle=False),
            seed=3,
            num_generations=2,
            rules=RULES,
            encode_chat=lambda messages: [ord(letter) % 100 for letter in messages[-1]["content"]],
            **of_supply,
        )
        welcome = wire.Welcome(
            run_id="run-1", config="{}", identity="{}", weights_endpoint=self.endpoints.weights, beat_s=1.0
        )
        self.exchange = Exchange(
            endpoints=self.endpoints,
            table=self.table,
            supply=self.supply,
            selection=Selection(self.supply.problem),
            quarantine=Quarantine(max_gap=0.1),
            welcome=welcome,
            open_journal=lambda publisher: Journal(folder, publish=publisher.publish),
            access=access,
            evaluator_token=TOKEN,
            clock=self.clock,
        )

    def publish(
        self,
        version: int,
        consumed: Sequence[int] = (),
        size: int = 2500,
        gaps: dict[int, list[Gap]] | None = None,
    ) -> bytes:
        data = bytes((version + at) % 256 for at in range(size))
        manifest = wire.Manifest(
            version=version,
            size=size,
            digest=xxhash.xxh3_128_hexdigest(data),
            chunk_bytes=CHUNK,
            tensors=[wire.TensorEntry(name="w", dtype="uint8", shape=[size], offset=0)],
        )
        self.exchange.consume(consumed, gaps or {})
        self.exchange.publish(manifest, memoryview(data))
        return data

    def records(self, topic: str = "") -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["topic"] == topic or not topic]

    def states(self, name: str) -> list[str]:
        return [record["state"] for record in self.records("worker") if record["worker"] == name]

    def peer(self, name: str, **more: Any) -> Peer:
        self.peers.append(Peer(self, name, **more))
        return self.peers[-1]


def evaluation(update: int, accuracy: float = 0.5) -> wire.Evaluation:
    return wire.Evaluation(
        update=update,
        checkpoint=f"checkpoint-{update}" if update else "base",
        report=report(accuracy, accuracy=accuracy),
    )


def wait_until(condition: Callable[[], object], timeout_s: float = HANG_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.005)
