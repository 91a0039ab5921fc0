"""The rollout workers that the supervisor holds: a fixed number, or with ``"auto"`` as many as pay.

Reads the run's records, asks `headcount`, starts workers and sends them home. One that is sent home gets
SIGTERM and leaves in order: what it samples goes back, a whole batch, and is sampled again with the same seeds
by another, so that with max_staleness = 0 nothing that trains depends on who came or went.

Each decision is kept (`decisions`), and a resumed run goes on from there. Workers attached by hand are not
held here; that they come or go is heeded, for it changes the rates.
"""

import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from grpo_actors.config import Config
from grpo_actors.observe.records import Record
from grpo_actors.observe.text import headcount_line
from grpo_actors.observe.view import GONE, number
from grpo_actors.rundir.decisions import Decision, append_decision, kept_workers
from grpo_actors.rundir.folder import WORKERS_FILE
from grpo_actors.supervisor.children import Actor, how_it_ended
from grpo_actors.supervisor.headcount import Headcount, Measurement
from grpo_actors.supervisor.machine import Machine, Share, equal_share, worker_share
from grpo_actors.supervisor.room import others_of, room_of


@dataclass
class WorkerPool:
    """Start it, show it the records, let it look after its own."""

    run_dir: Path
    config: Config
    machine: Machine
    #: The learner's control socket.
    control: str
    #: All that were ever started, also those that were sent home: what they print is still to be read.
    actors: list[Actor] = field(default_factory=list)
    #: Those that are wanted.
    members: list[Actor] = field(default_factory=list)
    headcount: Headcount | None = None
    #: Of each worker.
    _share: Share = field(init=False)
    #: Names of all workers, attached ones too, that have delivered and are there.
    _at_work: set[str] = field(default_factory=set)
    _update: int = 0
    _learner_bytes: float = 0.0
    _said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        others, wanted = others_of(self.config), self.config.rollout.workers
        if wanted == "auto":
            room = room_of(self.config, self.machine)
            self._share = worker_share(self.machine, others, room.workers)
            workers = min(kept_workers(self.run_dir), room.workers)
            self.headcount = Headcount(workers)
            self._said.append(f"rollout workers: {workers} to begin with, {room}")
        else:
            workers = wanted
            self._share = equal_share(self.machine, others + workers)
        while len(self.members) < workers:
            self._start_worker()

    @property
    def environment_of_others(self) -> dict[str, str]:
        """For the learner and the evaluator: with "auto" as beside one worker."""
        fixed = self.config.rollout.workers
        workers = 1 if fixed == "auto" else fixed
        return equal_share(self.machine, others_of(self.config) + workers).environment

    @property
    def is_hopeless(self) -> bool:
        """Whether all that are wanted have said that they cannot work."""
        return bool(self.members) and all(member.is_hopeless for member in self.members)

    def take_in(self, record: Record) -> None:
        """Take in one record of the run; decisions are carried out at once."""
        if self.headcount is None or self.headcount.settled:
            return
        if record["topic"] == "worker" and record.get("role") == "rollout":
            self._heed_worker(self.headcount, record)
        elif record["topic"] == "metrics":
            self._heed_update(self.headcount, record)

    def look_after(self, lifeline: int) -> Iterator[tuple[str, str]]:
        """Start again who died, as far as they are wanted; yields what is to be told, with its style."""
        for member in list(self.members):
            if self.headcount is not None and len(self.members) > 1 and member.returncode:
                self.members.remove(member)
                self._carry_out(self.headcount.died(how_it_ended(member.returncode)))
            elif note := member.revive(lifeline):
                yield note, "yellow"
        said, self._said = self._said, []
        yield from ((text, "") for text in said)

    def _heed_worker(self, headcount: Headcount, record: Record) -> None:
        name = str(record.get("worker"))
        is_there = record.get("state") not in GONE and bool(number(record, "groups"))
        if is_there == (name in self._at_work):
            return
        self._at_work ^= {name}
        if headcount.loading and name == self.members[-1].name:
            headcount.arrived()
        else:
            self._carry_out(headcount.disturbed())

    def _heed_update(self, headcount: Headcount, record: Record) -> None:
        self._update = int(number(record, "update") or 0)
        self._learner_bytes = 1e9 * (number(record, "memory_gb") or 0.0)
        if self._update == number(record, "total_updates"):
            headcount.settled = True  # those who leave now leave with the run
        update_s, tokens_per_s = number(record, "update_s"), number(record, "rollout_tokens_per_s")
        if not update_s or tokens_per_s is None:
            return
        waits = number(record, "learner_wait_share")
        if waits is None:
            waits = (number(record, "wait_s") or 0.0) / update_s
        measured = Measurement(update_s, waits, tokens_per_s)
        self._carry_out(headcount.measured(measured, at_work=len(self._at_work), room=self._room))

    def _room(self) -> int:
        return room_of(self.config, self.machine, self._learner_bytes).workers

    def _carry_out(self, decision: Decision | None) -> None:
        """Make it so, tell it, keep it."""
        if decision is None:
            return
        while len(self.members) < decision.workers:
            self._start_worker()
        while len(self.members) > decision.workers:
            self._stop_worker()
        self._said.append(headcount_line(asdict(decision)))
        self._keep(decision)

    def _start_worker(self) -> None:
        """One more, which the supervisor starts with all that were not started yet."""
        # A number is never given twice: who was sent home under it may not be gone yet.
        name = f"rollout-{len(self.actors)}"
        command = ["grpo_actors.rollout", "--connect", self.control, "--name", name, "--patience", "600"]
        actor = Actor(name, command, self._share.environment, respawns=True)
        self.actors.append(actor)
        self.members.append(actor)

    def _stop_worker(self) -> None:
        actor = self.members.pop()
        actor.respawns = False
        actor.send(signal.SIGTERM)

    def _keep(self, decision: Decision) -> None:
        """Of use to a continued run and to the records only: a full disk is told, and the run goes on."""
        assert self.headcount is not None
        try:
            append_decision(self.run_dir, decision, update=self._update, kept=self.headcount.kept)
        except OSError as error:
            path = self.run_dir / WORKERS_FILE
            self._said.append(f"{path} cannot be written ({error.strerror})")
