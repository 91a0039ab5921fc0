"""Readers that stop, come late, never read or ask for ever more: the run does not notice."""

import contextlib
import os
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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


class Phase(NamedTuple):
    """Some updates of a run."""

    #: Median seconds of an update.
    update_s: float
    #: Seconds that the learner computes for each, in all its threads: what other work on the machine does not change.
    learner_s: float
    #: Largest memory of the learner, in MB.
    memory_mb: float


@pytest.mark.faults
def test_fifty_readers_that_never_read(start_run, note_figures):
    """Phases with and without readers take turns, so that both see the same load; those without are each other's control."""
    run = start_run(max_updates=100_000, workers=2, eval_every_updates=0, save_steps=50)
    run.wait_for_update(5)
    alone, crowded = [], []
    for _ in range(TURNS):
        alone.append(phase(run))
        with readers(run) as greedy:
            crowded.append(phase(run, greedy))
    alone.append(phase(run))
    run.stop_well()
    note_figures(f"{READERS} readers that never read, {UPDATES} updates with and without them by turns:")
    for field, what in zip(Phase._fields, ("s an update", "s of computing", "MB"), strict=True):
        without, with_ = ([getattr(phase, field) for phase in phases] for phases in (alone, crowded))
        note_figures(
            f"  {what}: with {', '.join(f'{value:.3g}' for value in with_)}; "
            f"without {', '.join(f'{value:.3g}' for value in without)}"
        )
    most = max(phase.memory_mb for phase in crowded)
    assert most - max(phase.memory_mb for phase in alone) < MAX_MIB


def phase(run, greedy=None) -> Phase:
    """Let the run train."""
    first, usage, learner = run.updates(), Usage(), run.child("learner")
    before_s = computed_s(learner)

    def done() -> bool:
        if greedy is not None:
            greedy.ask(run.records("policy")[-1]["version"])
        usage.look(run)
        return run.updates() >= first + UPDATES

    wait_until(done, f"{UPDATES} updates", deadline_s=1800.0)
    updates_s = [r["update_s"] for r in run.records("metrics") if r["update"] > first]
    return Phase(
        statistics.median(updates_s),
        (computed_s(learner) - before_s) / len(updates_s),
        usage.largest("learner").memory_mb,
    )


def computed_s(pid) -> float:
    """Return the seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
