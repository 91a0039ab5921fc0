"""Many simulated workers in one process: real sockets and messages, but groups that no model has sampled.

Its hello comes when all have joined. Each order is answered with the numbers of beats, grants, groups and acks so far.
"""

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from grpo_actors.bench.bench_process import reply
from grpo_actors.process import run_command
from grpo_actors.transport.control import ControlClient
from grpo_actors.transport.sockets import zmq_context
from grpo_actors.transport.waiting import Waiter
from grpo_actors.wire import messages as wire
from grpo_actors.wire.handshake import HELLO_S, hello

#: Longest wait for a message, in seconds.
WAIT_S = 0.02
#: Seconds after which a group without an acknowledgement counts as lost: on a busy machine all of them wait for long.
RESEND_S = 30.0
#: Seconds in which the learner reads what a process has sent before it ends.
LEAVE_S = 5.0
#: The simulated vocabulary, and its token that ends a completion; the others begin at `FIRST_TOKEN`.
VOCABULARY, STOP, FIRST_TOKEN = 1000, 1, 2
#: The reward that the simulated workers send.
REWARD = "correct"
#: Leases that a simulated worker is willing to hold.
CREDITS = 2


@dataclass
class SimulatedWorker:
    """One worker without a model: it answers a grant at once."""

    control: ControlClient
    #: Tokens of a completion.
    tokens: int
    #: Kind of message -> number of those sent or received.
    counts: dict[str, int]
    joined: bool = False
    _version: int = 0
    _beat_s: float = 1.0
    _next_s: float = 0.0
    #: Groups that are not acknowledged yet, by lease, with the time at which each was sent.
    _held: dict[int, tuple[wire.Group, float]] = field(default_factory=dict)

    def turn(self) -> None:
        """Handle what has arrived, and send a Hello or a beat if it is time."""
        while (data := self.control.receive(0.0)) is not None:
            self._handle(wire.decode(wire.from_learner, data))
        if time.monotonic() >= self._next_s:
            self._speak()

    def _handle(self, message: wire.FromLearner) -> None:
        match message:
            case wire.Welcome():
                self.joined, self._beat_s, self._next_s = True, message.beat_s, 0.0
            case wire.Announcement():
                self._version = message.version
            case wire.Grant():
                self.counts["grants"] += 1
                for lease in message.leases:
                    self._deliver(self._group(lease))
            case wire.Ack():
                self.counts["acks"] += 1
                self._held.pop(message.lease, None)
            case wire.Bye():
                self.joined = False

    def _speak(self) -> None:
        if not self.joined:
            self._next_s = time.monotonic() + HELLO_S
            self.control.send(wire.encode(hello("rollout", self.control.name)))
            return
        self._next_s = time.monotonic() + self._beat_s
        for group, sent_s in list(self._held.values()):
            if time.monotonic() - sent_s > RESEND_S:
                self._deliver(group)
        beat = wire.Beat(
            state="waiting", version=self._version, credits=CREDITS, holding=list(self._held), tokens=0
        )
        self._send("beats", beat)

    def _deliver(self, group: wire.Group) -> None:
        self._held[group.lease] = (group, time.monotonic())
        self._send("groups", group)

    def _send(self, kind: str, message: wire.Message) -> None:
        self.counts[kind] += self.control.send(wire.encode(message))

    def _group(self, lease: wire.Lease) -> wire.Group:
        count, version = self.tokens, max(self._version, lease.min_version)
        completions = [
            wire.Completion(
                tokens=wire.ints([*[FIRST_TOKEN + seed % (VOCABULARY - FIRST_TOKEN)] * (count - 1), STOP]),
                logprobs=wire.floats([-0.5] * count),
                versions=wire.ints([version] * count),
                finished=True,
                rewards={REWARD: float(seed % 2)},
            )
            for seed in lease.seeds
        ]
        return wire.Group(
            lease=lease.lease,
            attempt=lease.attempt,
            token=lease.token,
            completions=completions,
            sampling_s=0.1,
            scoring_s=0.1,
        )


def main() -> int:
    """Run the process. Its arguments: address of the control socket, number of this process, workers, tokens."""
    endpoint, number, workers, tokens = sys.argv[1], *map(int, sys.argv[2:])
    counts = dict.fromkeys(("beats", "grants", "groups", "acks"), 0)
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(orders,), daemon=True).start()
    with zmq_context() as context, contextlib.closing(Waiter()) as waiter:
        swarm = [
            SimulatedWorker(ControlClient(context, endpoint, f"simulated-{number}-{each}"), tokens, counts)
            for each in range(workers)
        ]
        waiter.watch(*(worker.control.socket for worker in swarm))
        said = False
        while True:
            waiter.wait(WAIT_S)
            for worker in swarm:
                worker.turn()
            if not said and all(worker.joined for worker in swarm):
                said = True
                reply({"joined": workers})
            for order in _waiting(orders):
                if not order:
                    _leave(swarm)
                    return 0
                reply(counts)


def _leave(swarm: Sequence[SimulatedWorker]) -> None:
    """Let all workers say Bye, and wait until the learner has read what they have sent.

    libzmq (4.3.5) aborts the process of a bound socket if a peer closes while more of its messages wait than the queue
    holds, and one of its heartbeats behind them.
    """
    for worker in swarm:
        worker.control.send(wire.encode(wire.Bye(reason="the bench is over")))
    time.sleep(LEAVE_S)


def _read(orders: "queue.SimpleQueue[str]") -> None:
    """Put each line of standard input, and an empty text at its end."""
    for line in sys.stdin:
        orders.put(line)
    orders.put("")


def _waiting(orders: "queue.SimpleQueue[str]") -> Iterator[str]:
    while not orders.empty():
        yield orders.get()


if __name__ == "__main__":
    run_command(main)
