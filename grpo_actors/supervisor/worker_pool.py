"""Start and stop the rollout workers of the supervisor: a fixed number, or with ``"auto"`` as many as pay.

The pool reads the run's records, asks `headcount` for decisions, and starts and stops workers. A stopped worker gets
SIGTERM and leaves in order: its leases go back, and another worker samples the whole batch again with the same seeds.
So with max_staleness = 0 the training data do not depend on which workers joined or left.

Each decision is saved (`rundir.decisions`), and a resumed run starts from the saved number. Workers attached by hand do
not belong to the pool. But the pool takes into account when they join or leave, because that changes the rates.
"""

import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from grpo_actors.config import Config
from grpo_actors.consent import options_for
from grpo_actors.observe.records import Record
from grpo_actors.observe.text import headcount_line
from grpo_actors.observe.view import GONE, number
from grpo_actors.rundir.decisions import Decision, append_decision, kept_workers
from grpo_actors.rundir.folder import CONFIG_FILE, RUN_KEY_FILE, WORKERS_FILE
from grpo_actors.supervisor.allocation import room_beside
from grpo_actors.supervisor.children import Actor
from grpo_actors.supervisor.headcount import Headcount, Measurement
from grpo_actors.supervisor.placement import Devices
from grpo_actors.supervisor.shares import Shares

#: Module of a worker's command line. The bench sets another one.
WORKER = "grpo_actors.rollout"


@dataclass
class WorkerPool:
    """The supervisor's own workers. It reacts to the run's records and to crashed workers."""

    run_dir: Path
    config: Config
    #: Device, threads and memory of each process.
    shares: Shares
    #: Address of the learner's control socket.
    control: str
    #: All workers ever started. Stopped ones stay in the list, because their last output is still to be read.
    actors: list[Actor] = field(default_factory=list)
    #: The workers that should run.
    workers: list[Actor] = field(default_factory=list)
    #: Decides the number of workers; None if it is fixed.
    headcount: Headcount | None = None
    #: The devices of each worker ever started, by name.
    _devices: dict[str, Devices] = field(default_factory=dict)
    #: Names of all workers, attached ones too, that have delivered a group and have not left.
    _active: set[str] = field(default_factory=set)
    _update: int = 0
    #: Lines to be shown.
    _notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        allocation = self.shares.allocation
        count = len(allocation.placement.workers)
        if self.shares.is_adaptive:
            count = min(max(kept_workers(self.run_dir), count), allocation.room.workers)
            self.headcount = Headcount(count)
            self._notes.append(f"rollout workers: {count} to begin with, {allocation.room}")
        self._notes += [f"memory: {warning}" for warning in self.shares.warnings]
        while len(self.workers) < count:
            self._start_worker()

    @property
    def is_hopeless(self) -> bool:
        """Whether all workers have reported that they cannot work."""
        return bool(self.workers) and all(worker.is_hopeless for worker in self.workers)

    def handle_record(self, record: Record) -> None:
        """Handle one record of the run; apply a decision that follows from it at once."""
        if self.headcount is None or self.headcount.settled:
            return
        if record["topic"] == "worker" and record.get("role") == "rollout":
            self._handle_worker(self.headcount, record)
        elif record["topic"] == "metrics":
            self._handle_update(self.headcount, record)

    def revive(self, lifeline: int) -> Iterator[tuple[str, str]]:
        """Start crashed workers again, or with "auto" do without them; yield the lines to show, with their styles."""
        for worker in list(self.workers):
            if self.headcount is not None and len(self.workers) > 1 and worker.returncode:
                self.workers.remove(worker)
                self._apply(self.headcount.worker_died(worker.how_it_ended))
            elif note := worker.revive(lifeline):
                yield note, "yellow"
        notes, self._notes = self._notes, []
        yield from ((text, "") for text in notes)

    def _handle_worker(self, headcount: Headcount, record: Record) -> None:
        name = str(record.get("worker"))
        is_active = record.get("state") not in GONE and bool(number(record, "groups"))
        if is_active == (name in self._active):
            return
        self._active ^= {name}
        if headcount.loading and name == self.workers[-1].name:
            headcount.trial_started()
        else:
            self._apply(headcount.workers_changed())

    def _handle_update(self, headcount: Headcount, record: Record) -> None:
        self._update = int(number(record, "update") or 0)
        learner_bytes = 1e9 * (number(record, "memory_gb") or 0.0)
        if self._update == number(record, "total_updates"):
            headcount.settled = True  # workers that leave from now on leave because the run ends
        update_s, tokens_per_s = number(record, "update_s"), number(record, "rollout_tokens_per_s")
        if not update_s or tokens_per_s is None:
            return
        waits = number(record, "learner_wait_share")
        if waits is None:
            waits = (number(record, "wait_s") or 0.0) / update_s
        measured = Measurement(update_s, waits, tokens_per_s)

        def room() -> int:
            return room_beside(learner_bytes, self.config, self.shares.allocation).workers

        self._apply(headcount.record_update(measured, active=len(self._active), room=room))

    def _apply(self, decision: Decision | None) -> None:
        """Start or stop workers as decided, note the decision for the terminal, and save it."""
        if decision is None:
            return
        while len(self.workers) < decision.workers:
            self._start_worker()
        while len(self.workers) > decision.workers:
            self._stop_worker()
        self._notes.append(headcount_line(asdict(decision)))
        self._save(decision)

    def _start_worker(self) -> None:
        """Add a worker. The supervisor starts its process, as for all children that were not started yet."""
        # A number is never used twice: the stopped worker that had it may not have ended yet.
        name = f"rollout-{len(self.actors)}"
        command = [WORKER, "--connect", self.control, "--name", name]
        # A learner that is started again may load for long; this process ends its workers.
        command += ["--patience", "0"]
        if self.config.rollout.rollout_ranks > 1:
            command += ["--ranks", str(self.config.rollout.rollout_ranks)]
        command += ["--preload", str(self.run_dir / CONFIG_FILE), *options_for(self.config)]
        if self.config.transport.uses_keys:
            command += ["--key", str(self.run_dir / RUN_KEY_FILE)]
        taken = [self._devices[worker.name] for worker in self.workers]
        devices = self.shares.allocation.placement.next_worker(taken)
        self._devices[name] = devices
        environment = self.shares.worker(devices)
        actor = Actor(name, command, environment, respawns=True, is_watched=True, gives_up_work=True)
        self.actors.append(actor)
        self.workers.append(actor)

    def _stop_worker(self) -> None:
        actor = self.workers.pop()
        actor.respawns = False
        actor.send(signal.SIGTERM)

    def _save(self, decision: Decision) -> None:
        """Save a decision. Only records and a resumed run need it, so after a write error the run continues with a note."""
        assert self.headcount is not None
        try:
            append_decision(self.run_dir, decision, update=self._update, kept=self.headcount.kept)
        except OSError as error:
            path = self.run_dir / WORKERS_FILE
            self._notes.append(f"{path} cannot be written ({error.strerror})")
