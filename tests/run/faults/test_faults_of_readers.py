"""Readers that stop, come late, never read or ask for ever more: the run does not notice."""

import contextlib
import signal
import statistics
from collections.abc import Iterator

import pytest
import zmq
from runs import kill, wait_until
from usage import Usage

from grpo_actors.transport.sockets import Endpoints
from grpo_actors.wire import fetching

#: Half of them follow the events and never read, half ask for weights and never read.
READERS = 50
#: Updates of each phase, and phases with and without readers that take turns.
UPDATES, TURNS = 12, 2
#: MiB that the chunks of readers may take (SECURITY.md), and some for their events.
MAX_MIB = 128 + 32


@pytest.mark.faults
def test_a_reader_that_is_stopped_for_a_while(start_run):
    run = start_run(max_updates=30, workers=1, eval_every_updates=0, save_steps=10)
    tail = run.tail()
    assert tail.stdout.readline()
    kill(tail.pid, signal.SIGSTOP)
    run.wait_for_update(25)
    kill(tail.pid, signal.SIGCONT)
    tail.kill()
    run.end_well()
    assert run.exit_codes == [0]


class Readers:
    """Readers that are connected and read nothing."""

    def __init__(self, context: zmq.Context, endpoints: Endpoints) -> None:
        self._followers = [context.socket(zmq.SUB) for _ in range(READERS // 2)]
        self._greedy = [context.socket(zmq.DEALER) for _ in range(READERS // 2)]
        for reader in self._followers:
            reader.setsockopt(zmq.SUBSCRIBE, b"")
        for readers, endpoint in ((self._followers, endpoints.events), (self._greedy, endpoints.weights)):
            for reader in readers:
                reader.setsockopt(zmq.RCVHWM, 1)
                reader.connect(endpoint)

    def ask(self, version: int) -> None:
        """Ask for all of a version again, without reading what has come."""
        for reader in self._greedy:
            with contextlib.suppress(zmq.Again):
                reader.send(fetching.manifest_request(), zmq.DONTWAIT)
                for index in range(8):
                    reader.send(fetching.chunk_request(version, index), zmq.DONTWAIT)

    def close(self) -> None:
        for reader in [*self._followers, *self._greedy]:
            reader.close(linger=0)


@contextlib.contextmanager
def readers(run) -> Iterator[Readers]:
    with zmq.Context() as context, contextlib.closing(Readers(context, Endpoints.read(run.folder))) as made:
        yield made


@pytest.mark.faults
def test_fifty_readers_that_never_read(start_run, note_figures):
    """Phases with and without readers take turns, so that both see the same load; those without are each other's control."""
    run = start_run(max_updates=100_000, workers=2, eval_every_updates=0, save_steps=50)
    run.wait_for_update(5)
    steps_s, memory = {"with": [], "without": []}, {"with": 0.0, "without": 0.0}
    for _ in range(TURNS):
        steps_s["without"].append(phase(run, memory, "without"))
        with readers(run) as greedy:
            steps_s["with"].append(phase(run, memory, "with", greedy))
    steps_s["without"].append(phase(run, memory, "without"))
    run.stop_well()
    mean = {kind: statistics.fmean(medians) for kind, medians in steps_s.items()}
    control = max(steps_s["without"]) / min(steps_s["without"]) - 1
    cost = mean["with"] / mean["without"] - 1
    note_figures(
        f"{READERS} readers: an update {mean['with']:.3f} s, without {mean['without']:.3f} s: {cost:+.1%}; "
        f"phases without differ by {control:.1%}; learner {memory['with']:.0f} MB, without {memory['without']:.0f} MB"
    )
    assert memory["with"] - memory["without"] < MAX_MIB


def phase(run, memory, kind, greedy=None) -> float:
    """Let the run train; return the median seconds of an update, and note the learner's memory."""
    first, usage = run.updates(), Usage()

    def done() -> bool:
        if greedy is not None:
            greedy.ask(run.records("policy")[-1]["version"])
        usage.look(run)
        return run.updates() >= first + UPDATES

    wait_until(done, f"{UPDATES} updates", deadline_s=1800.0)
    memory[kind] = max(memory[kind], usage.largest("learner").memory_mb)
    return statistics.median(r["update_s"] for r in run.records("metrics") if r["update"] > first)
