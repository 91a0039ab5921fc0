"""The supervisor: starts the actors, watches them, starts them again, stops them in order.

It imports neither MLX nor a model: the machine (cores, memory) is divided among processes that do.

Who may die: a worker or the evaluator is started again, later each time it dies young (which workers are
wanted, `worker_pool` knows). The learner is the run: with it everything ends, and its exit code is the
run's; the same command continues the run.

How it ends: the first Ctrl-C asks the learner to finish its step and write a checkpoint, and the others
to leave; the second kills. Should the supervisor itself be killed, every child sees the pipe that it
inherited close, and ends.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from grpo_actors.config import Config
from grpo_actors.observe.follow import Follower
from grpo_actors.observe.status import StatusLine
from grpo_actors.process import EXIT_USAGE
from grpo_actors.rundir.checkpoints import best, find_checkpoints
from grpo_actors.rundir.folder import BASE_EVALUATION_FILE, ENDPOINTS_FILE, LOCK
from grpo_actors.supervisor.children import Actor, how_it_ended
from grpo_actors.supervisor.machine import Machine
from grpo_actors.supervisor.preflight import prepared
from grpo_actors.supervisor.worker_pool import WorkerPool
from grpo_actors.transport.events import EventSubscriber
from grpo_actors.transport.sockets import Endpoints, plan_endpoints, remove_endpoints

#: Time the others have to leave once the learner is gone, before they are killed.
LEAVE_S = 5.0
#: Time the trackers have to bring the last records to where they go.
FLUSH_S = 30.0
#: After the first Ctrl-C: how often it is said that the step still runs. A step of a large model takes
#: minutes, and is not thrown away; the user, who may press again, decides.
DRAIN_NOTE_S = 30.0
#: Between two looks at the children.
TICK_S = 0.1


@dataclass
class Signals:
    """SIGINT and SIGTERM, which are only counted: the loop acts on them, where nothing can be torn apart."""

    count: int = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count them here, then restore the former handlers."""

        def count(number: int, frame: FrameType | None) -> None:
            del number, frame
            self.count += 1

        former = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


@dataclass
class Supervisor:
    """The processes of one run, from the first to the last."""

    run_dir: Path
    config: Config
    endpoints: Endpoints
    learner: Actor
    #: Evaluator and trackers: a run goes on without them.
    aides: Sequence[Actor]
    pool: WorkerPool
    status: StatusLine
    signals: Signals
    #: The read end of a pipe, which every child inherits and sees close with this process.
    lifeline: int
    #: Closes what the follower of the run's records has opened.
    listening: ExitStack
    _follower: Follower | None = None
    #: Unix seconds.
    _since: float = field(default_factory=time.time)
    _draining_since_s: float | None = None
    _drain_notes: int = 0
    _without_workers: bool = False

    def run(self) -> None:
        """Start all children and look after them until the learner has ended."""
        self._say_where()
        while self._watch():
            pass
        self._show(wait_s=0.05)

    @property
    def _children(self) -> list[Actor]:
        """All of them, workers that were sent home too."""
        return [self.learner, *self.pool.actors, *self.aides]

    def _watch(self) -> bool:
        """One look at everything; False: the learner is gone."""
        self._start_those_due()
        self._show(wait_s=TICK_S)
        if not self.learner.alive:
            return False
        if self.signals.count:
            self._press_on()
            return True
        for aide in self.aides:
            if note := aide.revive(self.lifeline):
                self.status.print_line(note, "yellow")
        for text, style in self.pool.look_after(self.lifeline):
            self.status.print_line(text, style)
        if self.pool.is_hopeless and not self._without_workers:
            self._without_workers = True
            self.status.print_line(
                "no worker is left; the learner stops, with a checkpoint of what was done", "red"
            )
            self.learner.send(signal.SIGTERM)
        return True

    def _start_those_due(self) -> None:
        """All at once, but for evaluator and trackers: they wait until the learner listens.

        On two cores their imports would only make the first update later, and a tracker shall not read what a
        resumed learner has yet to cut off.
        """
        if self._follower is None and (self.run_dir / ENDPOINTS_FILE).exists():
            # Not earlier: a subscriber that has knocked in vain for long comes back later and later.
            events = self.listening.enter_context(EventSubscriber(self.endpoints.events))
            self._follower = self.listening.enter_context(Follower(events, self.run_dir))
        for child in self._children:
            waits = child in self.aides and self._follower is None
            if child.process is None and not self.signals.count and not waits:
                child.start(self.lifeline)

    def _show(self, wait_s: float) -> None:
        """Records and what the children printed, as they come."""
        if self._follower is None:
            time.sleep(wait_s)
        while self._follower is not None and (record := self._follower.receive(wait_s)) is not None:
            if record["time"] >= self._since:  # before that: what a resumed run has told already
                if record["topic"] != "headcount":  # its own decisions: said when they were taken
                    self.status.show(record)
                if not self.signals.count:
                    self.pool.take_in(record)
            wait_s = 0.0
        for child in self._children:
            for line in child.printed():
                # The learner's own words are the run's; of others it must be said whose they are.
                self.status.print_line(line if child.name == "learner" else f"{child.name}: {line}")

    def _press_on(self) -> None:
        """Carry out what Ctrl-C asked for."""
        now_s = time.monotonic()
        if self.signals.count > 1:
            for child in self._children:
                child.send(signal.SIGKILL)
        elif self._draining_since_s is None:
            self._draining_since_s = now_s
            self.status.print_line("finishing the step and writing a checkpoint; Ctrl-C again stops at once")
            self.learner.send(signal.SIGTERM)
        elif now_s - self._draining_since_s > (self._drain_notes + 1) * DRAIN_NOTE_S:
            self._drain_notes += 1
            waited_s = now_s - self._draining_since_s
            self.status.print_line(f"the step still runs after {waited_s:.0f} s; Ctrl-C again gives it up")

    def end(self) -> None:
        """The learner is gone, or an error is on its way up: let the others leave, then kill them."""
        for child in self._children:
            child.send(signal.SIGTERM)
        self._wait_for(self._children, LEAVE_S)
        trackers = [aide for aide in self.aides if aide.name in self.config.metrics.trackers and aide.alive]
        if trackers:
            names = " and ".join(tracker.name for tracker in trackers)
            self.status.print_line(f"{names}: bringing the last records home, for up to {FLUSH_S:.0f} s")
            self._wait_for(trackers, FLUSH_S)
        self._show(wait_s=0.0)
        for child in self._children:
            child.end(deadline_s=0.0)

    def _wait_for(self, children: Sequence[Actor], patience_s: float) -> None:
        """Until all have ended, the time is up or the user has had enough."""
        deadline_s = time.monotonic() + patience_s
        while any(child.alive for child in children) and time.monotonic() < deadline_s:
            if self.signals.count > 1:
                break
            self._show(wait_s=0.02)

    def _say_where(self) -> None:
        self.status.print_line(
            f"run folder {self.run_dir}\n"
            f"  watch it:      python -m grpo_actors.tail {self.run_dir}\n"
            f"  add a worker:  python -m grpo_actors.rollout --attach {self.run_dir}"
        )

    def conclude(self) -> int:
        """Say how the run stands; returns the exit code, which is the learner's."""
        code = self.learner.returncode
        if code is None or (code == -signal.SIGTERM and self.signals.count):
            code = 0  # asked to stop before it was there or could listen: there was nothing to save
        if code == 0 and self._without_workers:
            return EXIT_USAGE
        if code == 0:
            print(summary(self.run_dir), file=sys.stderr)
        elif code < 0 or code == 1:
            kept = find_checkpoints(self.run_dir)
            goes_on = f"continues the run after update {kept[-1].update}" if kept else "starts it again"
            print(f"the learner {how_it_ended(code)}; the same command {goes_on}", file=sys.stderr)
        return code if code >= 0 else 128 - code


def summary(run_dir: Path) -> str:
    """Two lines: what training changed, and where the result lies."""
    marked, base = best(run_dir), run_dir / BASE_EVALUATION_FILE
    if marked is None:
        kept = find_checkpoints(run_dir)
        return f"not evaluated\nlast checkpoint: {kept[-1].path if kept else 'none'}"
    before = json.loads(base.read_text()) if base.is_file() else {}
    sampled = before.get("sampled_accuracy")
    score = before.get("accuracy") if sampled is None else sampled
    known = "?" if score is None else f"{score:.1%}"
    return (
        f"accuracy: {known} (base model) → {marked['accuracy']:.1%} (best, update {marked['update']})\n"
        f"best checkpoint: {run_dir / marked['checkpoint']}"
    )


def run(config: Config) -> int:
    """Train: what launch.py calls. Returns the learner's exit code."""
    with prepared(config) as (run_dir, lock):
        transport = config.transport
        endpoints = plan_endpoints(run_dir, transport.scheme, transport.host, transport.port)
        with ExitStack() as stack:
            supervisor = _open(stack, run_dir, config, endpoints, lock)
            supervisor.run()
        return supervisor.conclude()


def _open(stack: ExitStack, run_dir: Path, config: Config, endpoints: Endpoints, lock: int) -> Supervisor:
    """Build the supervisor of a run; `lock` is the descriptor of the run folder's lock."""
    lifeline, write_end = os.pipe()
    stack.callback(os.close, lifeline)
    stack.callback(os.close, write_end)
    signals = Signals()
    stack.enter_context(signals.counted())
    stack.callback(remove_endpoints, run_dir, endpoints)  # what a killed learner could not remove
    every_updates = config.metrics.logging_steps
    status = stack.enter_context(StatusLine(config.learner.max_updates or None, every_updates=every_updates))
    listening = stack.enter_context(ExitStack())
    machine = Machine.here(asks_gpu=config.rollout.workers == "auto")
    pool = WorkerPool(run_dir, config, machine, endpoints.control)
    shares = pool.environment_of_others
    learner = Actor(
        "learner",
        ["grpo_actors.learner", str(run_dir), "--endpoints", json.dumps(asdict(endpoints))],
        shares | {LOCK: str(lock)},
        respawns=False,
        lent=(lock,),
    )
    aides = _aides(run_dir, config, endpoints, shares)
    supervisor = Supervisor(
        run_dir, config, endpoints, learner, aides, pool, status, signals, lifeline, listening
    )
    stack.callback(supervisor.end)
    return supervisor


def _aides(
    run_dir: Path, config: Config, endpoints: Endpoints, environment: Mapping[str, str]
) -> list[Actor]:
    """The evaluator and the trackers, as far as the settings ask for them."""
    commands: dict[str, list[str]] = {}
    if config.evaluator.eval_every_updates:
        commands["evaluator"] = ["grpo_actors.evaluator", str(run_dir), "--follow", endpoints.control]
    for name in config.metrics.trackers:
        commands[name] = ["grpo_actors.trackers", str(run_dir), name]
    return [Actor(name, command, environment, respawns=True) for name, command in commands.items()]
