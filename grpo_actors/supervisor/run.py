"""Open a run, let the supervisor do its work, and report the outcome.

The machine is divided among the processes of the run (`allocation`, `shares`). On CUDA they share a GPU (`mps`), and the
kernels that they will need are compiled before they start (`compiling`).
"""

import json
import os
import secrets
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path

from grpo_actors.backend import cuda_build
from grpo_actors.config import Config
from grpo_actors.consent import options_for
from grpo_actors.devices import environment_of
from grpo_actors.errors import os_errors_in_one_line
from grpo_actors.kernels.stage import Stage
from grpo_actors.observe.json_events import JsonEvents
from grpo_actors.observe.status import StatusLine
from grpo_actors.process import EVALUATOR_LINE, EVALUATOR_TOKEN
from grpo_actors.ranks.processes import ranks_here
from grpo_actors.rundir.folder import LOCK
from grpo_actors.supervisor.allocation import Allocation, allocate
from grpo_actors.supervisor.children import Actor
from grpo_actors.supervisor.closing_report import ClosingReport
from grpo_actors.supervisor.compiling import compile_kernels
from grpo_actors.supervisor.learner_records import LearnerRecords
from grpo_actors.supervisor.machine import Machine
from grpo_actors.supervisor.mps import Mps, mps_helps
from grpo_actors.supervisor.open_files import raise_limit
from grpo_actors.supervisor.preflight import prepared
from grpo_actors.supervisor.shares import Shares
from grpo_actors.supervisor.signals import Signals
from grpo_actors.supervisor.supervisor import Display, Supervisor
from grpo_actors.supervisor.worker_pool import WorkerPool
from grpo_actors.transport.keys import KeyFolder, run_key
from grpo_actors.transport.sockets import Endpoints, plan_endpoints, remove_endpoints
from grpo_actors.transport.weights import remove_leftovers


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
        allocation = allocate(config, Machine.here(asks_gpu=True))
        with prepared(config, allocation) as (run_dir, lock), ClosingReport(run_dir, config) as report:
            with ExitStack() as stack:
                supervisor = _open(
                    stack, run_dir, config, allocation, report=report, status=status, lock=lock
                )
                supervisor.run()
            return supervisor.report_outcome()


def _open(
    stack: ExitStack,
    run_dir: Path,
    config: Config,
    allocation: Allocation,
    *,
    report: ClosingReport,
    status: Display,
    lock: int,
) -> Supervisor:
    """Build the supervisor of a run; `lock` is the descriptor of the run folder's lock."""
    endpoints = _endpoints(stack, run_dir, config)
    lifeline, write_end = _pipe(stack)
    stack.callback(os.close, write_end)
    line, write_end = _pipe(stack)
    evaluator_line = stack.enter_context(ExitStack())
    evaluator_line.callback(os.close, write_end)
    signals = Signals()
    stack.enter_context(signals.counted())
    # A killed learner could not remove them.
    stack.callback(remove_leftovers)
    stack.callback(remove_endpoints, run_dir, endpoints)
    if note := raise_limit():
        status.print_line(note, "yellow")
    records = stack.enter_context(closing(LearnerRecords(run_dir, endpoints.events)))
    endpoints = replace(endpoints, mps=_prepare_gpus(stack, config, allocation, status, signals))
    shares = Shares(config, allocation, endpoints.mps)
    pool = WorkerPool(run_dir, config, shares, endpoints.control)
    token = secrets.token_hex(16)
    own = {LOCK: str(lock), EVALUATOR_LINE: str(line), EVALUATOR_TOKEN: token}
    learner = _learner(run_dir, config, endpoints, shares.learner() | own, inherited=(lock, line))
    observers = _observers(run_dir, config, endpoints, shares.evaluator(), token)
    supervisor = Supervisor(
        *(run_dir, config, endpoints, learner, observers, pool, report, status, signals),
        *(lifeline, evaluator_line, records),
    )
    stack.callback(supervisor.end)
    return supervisor


def _pipe(stack: ExitStack) -> tuple[int, int]:
    """Return a pipe whose read end is closed with `stack`."""
    read_end, write_end = os.pipe()
    stack.callback(os.close, read_end)
    return read_end, write_end


@os_errors_in_one_line()
def _endpoints(stack: ExitStack, run_dir: Path, config: Config) -> Endpoints:
    """Choose the addresses of the run, and keep its key in the run folder until `stack` is closed."""
    transport = config.transport
    endpoints = plan_endpoints(
        *(run_dir, transport.scheme, transport.host, transport.port),
        keys=transport.uses_keys,
        options=options_for(config),
    )
    folder = KeyFolder(Path(transport.keys_dir)) if transport.uses_keys else None
    stack.enter_context(run_key(run_dir, folder))
    return endpoints


def _prepare_gpus(
    stack: ExitStack, config: Config, allocation: Allocation, status: Display, signals: Signals
) -> str:
    """Start CUDA MPS where it helps, and compile kernels meanwhile; return the folder of MPS, empty without it."""
    placement = allocation.placement
    mps = stack.enter_context(Mps(starts=mps_helps(config, placement)))
    stage = Stage.find(config, cuda_build(), environment_of(placement.learner[:1]))
    compile_kernels(stage, status, gives_up=lambda: signals.count)
    folder = mps.folder(gives_up=lambda: signals.count)
    if mps.reason:
        status.print_line(
            f"no CUDA MPS ({mps.reason}): processes on one GPU take turns; next to three workers, a step of the "
            "learner takes three times as long",
            "yellow",
        )
    return folder


def _learner(
    run_dir: Path,
    config: Config,
    endpoints: Endpoints,
    environment: Mapping[str, str],
    inherited: tuple[int, ...],
) -> Actor:
    """Build the learner; `inherited` are the descriptors that its environment names."""
    return Actor(
        "learner",
        [
            *("grpo_actors.learner", str(run_dir), "--run-id", uuid.uuid4().hex[:12]),
            *("--endpoints", json.dumps(asdict(endpoints))),
            *options_for(config),
        ],
        environment,
        respawns=False,
        respawns_if_hung=True,
        # What `mlx.launch` has started, it ends with the others.
        respawns_if_killed=ranks_here(config.learner.ranks) > 1,
        is_watched=True,
        inherited=inherited,
    )


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
