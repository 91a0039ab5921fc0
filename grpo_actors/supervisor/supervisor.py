"""Run the actors as child processes: start them, watch them, restart them, stop them in order.

It imports neither MLX nor a model. `run` prepares what the actors share, and their command lines.

Crashes: a worker, the evaluator or a tracker is started again, after a pause that grows if it keeps crashing
(`worker_pool` decides how many workers run). If the learner ends, the run ends with its exit code; the same command
continues the run. But a learner of several ranks is started again after a signal has ended one of them.

Hangs: a learner, a worker or an evaluator that makes no progress is killed and started again. The learner continues from
its last checkpoint; the others wait for it and join again.

Stopping: the first Ctrl-C asks the learner to finish its step and write a checkpoint; then the others stop too. The
second Ctrl-C kills all. A closed terminal (SIGHUP) is like the first Ctrl-C. If the supervisor itself is killed, the pipe
that every child inherits closes, and the children end.

Ctrl-Z stops the children with the supervisor, and `fg` lets all go on; the time between counts for no limit.
"""

import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from grpo_actors.config import Config
from grpo_actors.consent import functions_of_caller, options_for
from grpo_actors.invocation import pasted
from grpo_actors.long_wait import LongWait
from grpo_actors.observe.json_events import JsonEvents
from grpo_actors.observe.records import Record
from grpo_actors.observe.status import StatusLine
from grpo_actors.out_of_memory import CURES, role_of, says_out_of_memory
from grpo_actors.process import EXIT_CRASH, EXIT_RANK_LOST, EXIT_USAGE
from grpo_actors.rundir.checkpoints import find_checkpoints
from grpo_actors.rundir.folder import ENDPOINTS_FILE
from grpo_actors.rundir.outcome import gained, kept_checkpoint
from grpo_actors.supervisor.children import Actor
from grpo_actors.supervisor.closing_report import ClosingReport
from grpo_actors.supervisor.learner_records import LearnerRecords
from grpo_actors.supervisor.next_commands import next_commands
from grpo_actors.supervisor.signals import Signals
from grpo_actors.supervisor.worker_pool import WorkerPool
from grpo_actors.transport.sockets import Endpoints

#: Seconds that the other processes have to stop after the learner has ended, before they are killed.
LEAVE_S = 5.0
#: Seconds that the trackers have to send the last records.
FLUSH_S = 30.0
#: Seconds between the notes that the step still runs, after the first Ctrl-C. A step of a large model takes minutes and
#: is not thrown away; the user decides, and may press Ctrl-C again.
DRAIN_NOTE_S = 30.0
#: Seconds between two checks of the children.
TICK_S = 0.1
#: Longest wait of the evaluator for the first update, in seconds after the learner listens.
FIRST_UPDATE_S = 5.0


#: How a run is shown.
Display = StatusLine | JsonEvents


@dataclass
class Supervisor:
    """The child processes of one run, from start to end."""

    run_dir: Path
    config: Config
    endpoints: Endpoints
    learner: Actor
    #: The evaluator and the trackers. A run continues without them.
    observers: Sequence[Actor]
    pool: WorkerPool
    report: ClosingReport
    status: Display
    signals: Signals
    #: Read end of a pipe that every child inherits. It closes when this process ends.
    lifeline: int
    #: Closes the pipe by which the learner knows that an evaluator runs or will be started (`keeps_evaluator`).
    evaluator_line: ExitStack
    records: LearnerRecords
    _wait_for_update: LongWait = field(default_factory=lambda: LongWait("no update"))
    #: Whether an update was done since the start.
    _has_updated: bool = False
    #: Monotonic time at which the first Ctrl-C was handled; None before.
    _draining_since_s: float | None = None
    #: Number of notes that the step still runs.
    _drain_notes: int = 0
    #: Whether the run stops because no worker can work.
    _all_workers_failed: bool = False

    def run(self) -> None:
        """Start all children and watch them until the learner has ended."""
        self.signals.family = lambda: self._children
        self._show_commands()
        self.status.begin(f"loading {self.config.model.model_name}")
        while self._tick():
            pass
        self._show_output(wait_s=0.05)

    @property
    def _children(self) -> list[Actor]:
        """All children, including stopped workers."""
        return [self.learner, *self.pool.actors, *self.observers]

    def _tick(self) -> bool:
        """Check all children once; return False if the learner has ended."""
        self._start_children()
        self._show_output(wait_s=TICK_S)
        self.status.tick()
        for child in self._children:
            if note := child.end_if_hung():
                self.status.print_line(note, "yellow")
        if not self.learner.alive and (self.signals.count or self.learner.is_over):
            return False
        if self.signals.count:
            self._handle_signals()
            return True
        self._revive_children()
        self._explain_long_wait()
        if self.pool.is_hopeless and not self._all_workers_failed:
            self._all_workers_failed = True
            self.status.print_line(
                "no worker is left; the learner stops, with a checkpoint of what was done", "red"
            )
            self.learner.send(signal.SIGTERM)
        return True

    def _revive_children(self) -> None:
        """Start children that crashed again, after their pauses."""
        for child in (self.learner, *self.observers):
            if note := child.revive(self.lifeline):
                self.status.print_line(note, "yellow")
                if child is self.learner:
                    # Nobody is to attach before its successor listens, which binds the same addresses again.
                    (self.run_dir / ENDPOINTS_FILE).unlink(missing_ok=True)
        if all(child.is_over for child in self.observers if child.name == "evaluator"):
            self.evaluator_line.close()
        for text, style in self.pool.revive(self.lifeline):
            self.status.print_line(text, style)

    def _explain_long_wait(self) -> None:
        waited_for = ((child.name, child.trouble) for child in (self.learner, *self.pool.workers))
        troubles = [f"{name} {trouble}" for name, trouble in waited_for if trouble is not None]
        if note := self._wait_for_update.explain(time.monotonic(), troubles):
            self.status.print_line(note, "yellow")

    def _start_children(self) -> None:
        """Start all children that were not started yet; some of them only when the learner listens."""
        learner = self.learner.process
        if learner is not None and self.records.look_for(learner.pid):
            self.status.begin("waiting for a worker")
        for child in self._children:
            if child.process is None and not self.signals.count and not self._must_wait(child):
                child.start(self.lifeline)

    def _must_wait(self, child: Actor) -> bool:
        if child.waits_for == "nothing":
            return False
        since_s = self.records.listening_since_s
        if since_s is None or child.waits_for == "learner":
            return since_s is None
        return not self._has_updated and time.monotonic() < since_s + FIRST_UPDATE_S

    def _show_output(self, wait_s: float) -> None:
        """Show new records and the lines that the children printed; wait up to `wait_s` for the first record."""
        for record in self.records.receive(wait_s):
            self._handle_record(record)
        for child in self._children:
            for line in child.printed():
                # The learner's lines are the run's; the lines of others need a name.
                self.status.print_line(line if child.name == "learner" else f"{child.name}: {line}")
                # Its own line has the cure; C++, which ends it without Python, knows none.
                if says_out_of_memory(line) and not line.startswith("error: "):
                    cure = CURES[role_of(child.name)]
                    self.status.print_line(f"{child.name} ran out of memory: {cure}", "yellow")

    def _handle_record(self, record: Record) -> None:
        """Show a record, and act on it."""
        if record["topic"] == "metrics":
            self._has_updated = True
            self._wait_for_update.end()
        self.report.handle_record(record)
        # A reader was shown the pool's decisions when they were taken.
        if record["topic"] != "headcount" or isinstance(self.status, JsonEvents):
            self.status.show(record)
        if record["topic"] == "worker" and record.get("role") == "rollout":
            self.status.begin("waiting for the first batch")
        if not self.signals.count:
            self.pool.handle_record(record)

    def _handle_signals(self) -> None:
        """Drain after the first Ctrl-C, kill after the second."""
        now_s = time.monotonic()
        if self.signals.count > 1:
            for child in self._children:
                child.kill()
        elif self._draining_since_s is None:
            self._draining_since_s = now_s
            self.status.print_line("finishing the step and writing a checkpoint; Ctrl-C again stops at once")
            self.learner.send(signal.SIGTERM)
            self.report.prepare()
            for child in self.observers:
                if child.name == "evaluator":  # a resumed run scores what has no score yet
                    child.send(signal.SIGTERM)
        elif now_s - self._draining_since_s > (self._drain_notes + 1) * DRAIN_NOTE_S:
            self._drain_notes += 1
            waited_s = now_s - self._draining_since_s
            self.status.print_line(f"the step still runs after {waited_s:.0f} s; Ctrl-C again gives it up")

    def end(self) -> None:
        """Stop all children, when the learner has ended or an error is being raised: first ask, then kill."""
        for child in self._children:
            child.send(signal.SIGTERM)
        self._wait_for(self._children, LEAVE_S)
        names = self.config.metrics.trackers
        trackers = [observer for observer in self.observers if observer.name in names and observer.alive]
        if trackers:
            waiting = " and ".join(tracker.name for tracker in trackers)
            self.status.print_line(f"{waiting}: sending the last records, for up to {FLUSH_S:.0f} s")
            self._wait_for(trackers, FLUSH_S)
        self._show_output(wait_s=0.0)
        for child in self._children:
            child.end(deadline_s=0.0)

    def _wait_for(self, children: Sequence[Actor], patience_s: float) -> None:
        """Wait until all have ended, `patience_s` have passed, or the user has pressed Ctrl-C twice."""
        deadline_s = time.monotonic() + patience_s
        while any(child.alive for child in children) and time.monotonic() < deadline_s:
            if self.signals.count > 1:
                break
            self._show_output(wait_s=0.02)

    def _show_commands(self) -> None:
        lines = [f"run folder {self.run_dir}", f"  watch it:      {pasted('watch', self.run_dir)}"]
        if not functions_of_caller(self.config):  # only this process's children reach them
            attach = pasted("worker", "--attach", self.run_dir, *options_for(self.config))
            lines += [f"  add a worker:  {attach}"]
            lines += [f"  elsewhere:     {self.endpoints.how_to_join}"] if self.endpoints.join else []
        self.status.print_line("\n".join(lines))
        if warning := self.config.transport.warning:
            self.status.print_line(warning, "yellow")

    def report_outcome(self) -> int:
        """Print the result of the run; return the run's exit code, which is the learner's."""
        written = self.report.write() if self.signals.count < 2 else None
        code = self.learner.returncode
        if code is None or (code == -signal.SIGTERM and (self.signals.count or self._all_workers_failed)):
            code = 0  # stopped before the learner had started or handled signals: there was nothing to save
        if code == 0 and self._all_workers_failed:
            return EXIT_USAGE
        if code == EXIT_RANK_LOST or (code < 0 and self.learner.is_hopeless):
            code = EXIT_CRASH  # it was killed because it hung, the last of several times
        if code == 0:
            facts = [gained(self.run_dir), kept_checkpoint(self.run_dir), *([written] if written else [])]
            self.status.print_closing(facts, next_commands(self.run_dir, self.config, self.status.view))
        elif code < 0 or code == EXIT_CRASH:
            kept = find_checkpoints(self.run_dir)
            effect = f"continues the run after update {kept[-1].update}" if kept else "starts it again"
            self.status.print_line(
                f"the learner {self.learner.how_it_ended}; the same command {effect}", "red"
            )
        return code if code >= 0 else 128 - code
