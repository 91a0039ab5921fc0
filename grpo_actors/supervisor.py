"""The supervisor: starts the actors, watches them, starts them again, stops them in order.

It imports neither MLX nor a model: it divides the machine (cores, memory) among processes that do.

Who may die: a worker or the evaluator is started again, later each time it dies young. The learner is
the run: with it everything ends, and its exit code is the run's; the same command continues the run.

How it ends: the first Ctrl-C asks the learner to finish its step and write a checkpoint, and the others
to leave; the second kills. Should the supervisor itself be killed, every child sees the pipe that it
inherited close, and ends.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from grpo_actors.checkpoints import find_checkpoints
from grpo_actors.config import Config, read_config, resume_conflicts
from grpo_actors.errors import RunError
from grpo_actors.observe.follow import Follower
from grpo_actors.observe.status import StatusLine
from grpo_actors.process import LIFELINE, MEMORY_LIMIT
from grpo_actors.transport.events import EventSubscriber
from grpo_actors.transport.sockets import Endpoints, plan_endpoints

CONFIG_FILE = "config.json"

#: First pause before a dead actor is started again; doubled each time, back to the first after a
#: life of HEALTHY_S.
BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 30.0
HEALTHY_S = 60.0
#: Time the others have to leave once the learner is gone, before they are killed.
LEAVE_S = 5.0
#: Time the learner has after the first Ctrl-C: a step, a checkpoint.
DRAIN_S = 30.0
#: Between two looks at the children.
TICK_S = 0.1
#: Share of the machine's memory that all actors together may use.
MEMORY_SHARE = 0.75


@dataclass
class Actor:
    """One child process, and when it may be started again."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    respawns: bool
    process: "subprocess.Popen[bytes] | None" = None
    started_s: float = 0.0
    backoff_s: float = BACKOFF_S
    start_after_s: float = 0.0

    def start(self, lifeline: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *self.command],
            env={**os.environ, **self.environment, LIFELINE: str(lifeline)},
            stdin=subprocess.DEVNULL,
            pass_fds=[lifeline],
        )
        self.started_s = time.monotonic()

    def send(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


@dataclass
class Supervisor:
    run_dir: Path
    config: Config
    endpoints: Endpoints
    interrupts: int = 0
    _children: list[Actor] = field(default_factory=list)

    def run(self) -> int:
        """The whole run; returns the learner's exit code."""
        with ExitStack() as stack:
            read_end, write_end = os.pipe()
            stack.callback(os.close, write_end)
            self._lifeline = read_end
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._interrupt)
            learner = self._make_children()
            stack.callback(self._end_all)
            status = stack.enter_context(StatusLine(self.config.learner.max_updates or None))
            events = stack.enter_context(EventSubscriber(self.endpoints.events))
            follower = stack.enter_context(Follower(events, None))
            for child in self._children:
                child.start(self._lifeline)
            while learner.alive:
                record = follower.receive(TICK_S)
                while record is not None:
                    status.show(record)
                    record = follower.receive(0.0)
                self._respawn()
                self._press_on(learner)
            while (record := follower.receive(0.05)) is not None:
                status.show(record)
            assert learner.process is not None
            code = learner.process.returncode
        if code < 0:
            print(f"the learner was ended by signal {-code}; the same command continues the run", file=sys.stderr)
            return 128 - code
        return code

    def _make_children(self) -> Actor:
        config, control = self.config, self.endpoints.control
        workers = config.rollout.workers
        evaluator = bool(config.evaluator.eval_every_updates)
        shares = environment(processes=1 + workers + evaluator)
        learner = Actor("learner", ["grpo_actors.learner", str(self.run_dir)], shares, respawns=False)
        self._children = [learner]
        for number in range(workers):
            command = ["grpo_actors.rollout", "--connect", control, "--name", f"rollout-{number}", "--patience", "600"]
            self._children.append(Actor(f"rollout-{number}", command, shares, respawns=True))
        if evaluator:
            command = ["grpo_actors.evaluator", str(self.run_dir), "--follow", control]
            self._children.append(Actor("evaluator", command, shares, respawns=True))
        return learner

    def _respawn(self) -> None:
        """Start again what died, after its pause; what left of its own accord (exit 0) stays away."""
        if self.interrupts:
            return
        now_s = time.monotonic()
        for child in self._children:
            if not child.respawns or child.alive or child.process is None:
                continue
            if child.process.returncode == 0:
                continue
            if not child.start_after_s:
                if now_s - child.started_s > HEALTHY_S:
                    child.backoff_s = BACKOFF_S
                child.start_after_s = now_s + child.backoff_s
                child.backoff_s = min(2 * child.backoff_s, LONGEST_BACKOFF_S)
                print(
                    f"{child.name} ended with {child.process.returncode}; starts again in "
                    f"{child.start_after_s - now_s:.0f} s",
                    file=sys.stderr,
                )
            elif now_s >= child.start_after_s:
                child.start_after_s = 0.0
                child.start(self._lifeline)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Only counts: what follows is done by the loop, where nothing can be torn apart."""
        del number, frame
        self.interrupts += 1
        self._interrupted_s = time.monotonic()

    def _press_on(self, learner: Actor) -> None:
        """Carry out what Ctrl-C asked for."""
        if self.interrupts == 1 and not getattr(self, "_drained", False):
            self._drained = True
            print("finishing the step and writing a checkpoint; Ctrl-C again stops at once", file=sys.stderr)
            learner.send(signal.SIGTERM)
        if self.interrupts > 1 or (self.interrupts and time.monotonic() - self._interrupted_s > DRAIN_S):
            for child in self._children:
                child.send(signal.SIGKILL)

    def _end_all(self) -> None:
        """The learner is gone, or an error is on its way up: let the others leave, then kill them."""
        for child in self._children:
            child.send(signal.SIGTERM)
        deadline_s = time.monotonic() + LEAVE_S
        for child in self._children:
            if child.process is None:
                continue
            try:
                child.process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()


def environment(processes: int) -> dict[str, str]:
    """A process's share of the machine.

    Threads are divided: two processes with two BLAS threads each on two cores spend their time waiting
    for each other. Memory is divided too: several processes that wire most of a Mac each panic it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // processes))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "OPENBLAS_NUM_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        MEMORY_LIMIT: str(int(memory * MEMORY_SHARE / processes)),
        "TOKENIZERS_PARALLELISM": "false",
    }


def prepare(config: Config) -> Path:
    """The run folder, checked and with config.json in it; nothing has started yet.

    Raises:
        RunError: it holds a run that these settings cannot continue, or should not.
    """
    run_dir = Path(config.run.output_dir)
    saved = run_dir / CONFIG_FILE
    checkpoints = find_checkpoints(run_dir)
    if config.run.resume == "must" and not checkpoints:
        raise RunError(f"run.resume: {run_dir} holds no checkpoint to continue from; start without --resume")
    if config.run.resume == "never" and checkpoints:
        raise RunError(
            f"run.resume is never, but {run_dir} holds {checkpoints[-1].path.name}; "
            "choose another run.output_dir, or remove that folder"
        )
    if checkpoints and saved.is_file():
        conflicts = resume_conflicts(read_config(saved), config)
        if conflicts:
            raise RunError(
                f"{run_dir} holds a run with another {', '.join(conflicts)}; "
                "set it as it was, or choose another run.output_dir"
            )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary = saved.with_suffix(".tmp")
        temporary.write_text(config.model_dump_json(indent=2) + "\n")
        temporary.replace(saved)
    except OSError as error:
        raise RunError(f"run.output_dir: {run_dir} cannot be written ({error.strerror}); choose another folder") from None
    return run_dir


def run(config: Config) -> int:
    """Train: what launch.py calls. Returns the learner's exit code."""
    run_dir = prepare(config)
    transport = config.transport
    endpoints = plan_endpoints(run_dir, transport.scheme, transport.host, transport.port)
    return Supervisor(run_dir, config, endpoints).run()
