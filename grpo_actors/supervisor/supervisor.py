"""Run the actors as child processes: start them, watch them, restart them, stop them in order.

The supervisor imports neither MLX nor a model. It divides cores and memory among the processes that do, and on CUDA lets
them share the GPU (`mps`) and compiles the kernels that they will need before it starts them (`compiling`).

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

import contextlib
import json
import os
import secrets
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import FrameType

from grpo_actors.backend import cuda_build
from grpo_actors.config import Config
from grpo_actors.consent import as_options, code_of_model, functions_of_caller, options_for
from grpo_actors.devices import environment_of
from grpo_actors.errors import RunError, os_errors_in_one_line
from grpo_actors.invocation import pasted
from grpo_actors.kernels.stage import Stage
from grpo_actors.learner.rank_processes import ranks_here
from grpo_actors.long_wait import LongWait
from grpo_actors.observe.follow import Follower
from grpo_actors.observe.json_events import JsonEvents
from grpo_actors.observe.reading import session_of
from grpo_actors.observe.records import Record
from grpo_actors.observe.status import StatusLine
from grpo_actors.out_of_memory import CURES, role_of, says_out_of_memory
from grpo_actors.process import (
    EVALUATOR_LINE,
    EVALUATOR_TOKEN,
    EXIT_CRASH,
    EXIT_RANK_LOST,
    EXIT_USAGE,
    ignores_hangup,
)
from grpo_actors.rundir.checkpoints import best, find_checkpoints
from grpo_actors.rundir.folder import ENDPOINTS_FILE, LOCK
from grpo_actors.rundir.outcome import continuing, gained, kept_checkpoint
from grpo_actors.supervisor.children import Actor
from grpo_actors.supervisor.closing_report import ClosingReport
from grpo_actors.supervisor.compiling import compile_kernels
from grpo_actors.supervisor.machine import Machine
from grpo_actors.supervisor.mps import Mps, mps_helps
from grpo_actors.supervisor.open_files import raise_limit
from grpo_actors.supervisor.preflight import prepared
from grpo_actors.supervisor.shares import Shares
from grpo_actors.supervisor.worker_pool import WorkerPool
from grpo_actors.transport.events import EventSubscriber
from grpo_actors.transport.keys import KeyFolder, read_run_key, run_key
from grpo_actors.transport.sockets import Endpoints, plan_endpoints, remove_endpoints
from grpo_actors.transport.weights import remove_leftovers

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
class Signals:
    """The requests to stop that were received. Their handlers only count; the loop acts, where no work is cut in half."""

    count: int = 0
    #: Returns the children that stop and go on with this process.
    family: Callable[[], Sequence[Actor]] = tuple

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count SIGINT, SIGTERM and SIGHUP within the block, and halt at SIGTSTP; then restore the former handlers."""
        handlers = {signal.SIGINT: self._count, signal.SIGTERM: self._count}
        if signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            handlers[signal.SIGTSTP] = self._halt
        if not ignores_hangup():
            handlers[signal.SIGHUP] = self._hang_up
        former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _count(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.count += 1

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        # Shell and kernel may both send it: it never counts as the second Ctrl-C.
        self.count = max(self.count, 1)

    def _halt(self, number: int, frame: FrameType | None) -> None:
        """Stop with all children; return when this process goes on."""
        del frame
        # The children are in groups of their own, which Ctrl-Z does not reach.
        for child in self.family():
            child.halt()
        handler = signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # stops here, unless no shell could let it go on
        signal.signal(number, handler)
        for child in self.family():
            child.go_on()


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
    #: Closes the follower of the run's records and its socket.
    follower_stack: ExitStack
    #: None until the first learner has written its endpoints.
    _follower: Follower | None = None
    #: Monotonic time at which it had.
    _listening_since_s: float = 0.0
    #: Process id of the learner that has written its endpoints.
    _listening: int | None = None
    #: Sessions of the learners of this start. A resumed run has shown the records of others before.
    _sessions: set[str] = field(default_factory=set)
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
        self._follow_learner()
        for child in self._children:
            if child.process is None and not self.signals.count and not self._must_wait(child):
                child.start(self.lifeline)

    def _follow_learner(self) -> None:
        """Follow the records of a learner that has written its endpoints."""
        learner = self.learner.process
        if learner is None or learner.pid == self._listening or not (self.run_dir / ENDPOINTS_FILE).exists():
            return
        with contextlib.suppress(RunError):  # it has just ended
            written = Endpoints.read(self.run_dir)
            if written.pid == learner.pid:  # else a killed run has left them
                self._listening = learner.pid
                self._sessions.add(written.session)
        if self._listening is not None and self._follower is None:
            # Not earlier: a subscriber that cannot connect retries after longer and longer pauses.
            events = self.follower_stack.enter_context(
                EventSubscriber(self.endpoints.events, key=read_run_key(self.run_dir))
            )
            self._follower = self.follower_stack.enter_context(Follower(events, self.run_dir))
            self._listening_since_s = time.monotonic()
            self.status.begin("waiting for a worker")

    def _must_wait(self, child: Actor) -> bool:
        if child.waits_for == "nothing":
            return False
        if child.waits_for == "learner" or self._follower is None:
            return self._follower is None
        return not self._has_updated and time.monotonic() < self._listening_since_s + FIRST_UPDATE_S

    def _show_output(self, wait_s: float) -> None:
        """Show new records and the lines that the children printed; wait up to `wait_s` for the first record."""
        if self._follower is None:
            time.sleep(wait_s)
        while self._follower is not None and (record := self._follower.receive(wait_s)) is not None:
            if session_of(record) in self._sessions:
                self._handle_record(record)
            wait_s = 0.0
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
            self.status.print_closing(facts, self._next_commands())
        elif code < 0 or code == EXIT_CRASH:
            kept = find_checkpoints(self.run_dir)
            effect = f"continues the run after update {kept[-1].update}" if kept else "starts it again"
            self.status.print_line(
                f"the learner {self.learner.how_it_ended}; the same command {effect}", "red"
            )
        return code if code >= 0 else 128 - code

    def _next_commands(self) -> dict[str, str]:
        """Return what the user may do with the result, at most three: label -> command."""
        kept, marked, view = find_checkpoints(self.run_dir), best(self.run_dir), self.status.view
        commands = {}
        # A run that was complete before this start has no record of an update.
        if view.metrics is not None and view.total_updates is not None and view.update < view.total_updates:
            commands["continue it"] = continuing(self.run_dir, self.config)
        if kept:
            beaten = marked is not None and marked.update
            commands["chat with it"] = pasted("chat", self.run_dir)
            if not functions_of_caller(self.config):
                commands["score it"] = pasted(
                    "eval",
                    self.run_dir,
                    *(["--compare", "base", "best"] if beaten else []),
                    *options_for(self.config),
                )
            commands["take it along"] = pasted(
                *("export", self.run_dir, "--fuse", f"models/{self.run_dir.name}"),
                *as_options(code_of_model(self.config.model)),
            )
        return dict(islice(commands.items(), 3))


def run(config: Config, *, as_json: bool = False) -> int:
    """Run a whole training, for ``grpo train``; return the exit code.

    Args:
        config: The settings.
        as_json: Whether to print one JSON object per event on standard output, instead of lines for a reader on stderr.
    """
    every_updates = config.metrics.logging_steps
    display: Display = (
        JsonEvents()
        if as_json
        else StatusLine(config.learner.max_updates or None, every_updates=every_updates)
    )
    with display as status:
        # A log gets no line of it: a refusal is to be the only one.
        status.begin("checking settings, data and memory", in_log=False)
        machine = Machine.here(asks_gpu=True)
        with prepared(config, machine) as (run_dir, lock), ClosingReport(run_dir, config) as report:
            transport = config.transport
            folder = KeyFolder(Path(transport.keys_dir)) if transport.uses_keys else None
            with ExitStack() as stack:
                with os_errors_in_one_line():
                    endpoints = plan_endpoints(
                        *(run_dir, transport.scheme, transport.host, transport.port),
                        keys=transport.uses_keys,
                        options=options_for(config),
                    )
                    stack.enter_context(run_key(run_dir, folder))
                supervisor = _open(
                    stack, run_dir, config, machine, endpoints, report=report, status=status, lock=lock
                )
                supervisor.run()
            return supervisor.report_outcome()


def _open(
    stack: ExitStack,
    run_dir: Path,
    config: Config,
    machine: Machine,
    endpoints: Endpoints,
    *,
    report: ClosingReport,
    status: Display,
    lock: int,
) -> Supervisor:
    """Build the supervisor of a run; `lock` is the descriptor of the run folder's lock."""
    lifeline, write_end = os.pipe()
    stack.callback(os.close, lifeline)
    stack.callback(os.close, write_end)
    line, write_end = os.pipe()
    stack.callback(os.close, line)
    evaluator_line = stack.enter_context(ExitStack())
    evaluator_line.callback(os.close, write_end)
    signals = Signals()
    stack.enter_context(signals.counted())
    # A killed learner could not remove them.
    stack.callback(remove_leftovers)
    stack.callback(remove_endpoints, run_dir, endpoints)
    if note := raise_limit():
        status.print_line(note, "yellow")
    follower_stack = stack.enter_context(ExitStack())
    shares = Shares(config, machine)
    mps = stack.enter_context(Mps(starts=mps_helps(config, shares.placement)))
    stage = Stage.find(config, cuda_build(), environment_of(shares.placement.learner[:1]))
    compile_kernels(stage, status, gives_up=lambda: signals.count)
    shares.mps_folder = mps.folder(gives_up=lambda: signals.count)
    endpoints = replace(endpoints, mps=shares.mps_folder)
    if mps.reason:
        status.print_line(
            f"no CUDA MPS ({mps.reason}): processes on one GPU take turns; next to three workers, a step of the "
            "learner takes three times as long",
            "yellow",
        )
    pool = WorkerPool(run_dir, config, shares, endpoints.control)
    token = secrets.token_hex(16)
    learner = Actor(
        "learner",
        [
            *("grpo_actors.learner", str(run_dir), "--run-id", uuid.uuid4().hex[:12]),
            *("--endpoints", json.dumps(asdict(endpoints))),
            *options_for(config),
        ],
        shares.learner() | {LOCK: str(lock), EVALUATOR_LINE: str(line), EVALUATOR_TOKEN: token},
        respawns=False,
        respawns_if_hung=True,
        # What `mlx.launch` has started, it ends with the others.
        respawns_if_killed=ranks_here(config.learner.ranks) > 1,
        is_watched=True,
        inherited=(lock, line),
    )
    observers = _observers(run_dir, config, endpoints, shares.evaluator(), token)
    supervisor = Supervisor(
        *(run_dir, config, endpoints, learner, observers, pool, report, status, signals),
        *(lifeline, evaluator_line, follower_stack),
    )
    stack.callback(supervisor.end)
    return supervisor


def _observers(
    run_dir: Path, config: Config, endpoints: Endpoints, environment: Mapping[str, str], token: str
) -> list[Actor]:
    """Build the evaluator, which gets the token that lets it report scores, and the trackers that the settings name."""
    observers = []
    if config.evaluator.eval_every_updates:
        command = ["grpo_actors.evaluator", str(run_dir), "--follow", endpoints.control, *options_for(config)]
        # Its imports and the evaluation of the base model would only delay the first update.
        observers.append(
            Actor(
                "evaluator",
                command,
                {**environment, EVALUATOR_TOKEN: token},
                respawns=True,
                is_watched=True,
                gives_up_work=True,
                waits_for="update",
                in_background=True,
            )
        )
    for name in config.metrics.trackers:
        command = ["grpo_actors.trackers", str(run_dir), name]
        # It must not read the records that a resumed learner has yet to cut off.
        observers.append(
            Actor(name, command, environment, respawns=True, waits_for="learner", in_background=True)
        )
    return observers
