"""Rollout worker: samples groups with the old policy and scores them.

    grpo worker --attach RUN_DIR                 join a live run on this machine
    grpo worker --connect ENDPOINT --key FILE    join a run by the address of its control socket

The address, and on TCP a key made on the learner's host, are all that a worker needs. The learner sends the
configuration and the identity of the model; each lease carries the prompt's tokens, the seeds and the inputs of the
reward functions. But no code that the configuration names runs without ``--allow`` (`consent`). Ctrl-C makes the worker
leave, and its unfinished leases go to another worker. If the learner is gone, the worker waits for it and goes on when it
is back.
"""

import argparse
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_actors.backend import join_mps, submit_long_graphs
from grpo_actors.errors import RunError
from grpo_actors.options import add_allow
from grpo_actors.process import StopRequest, bound_memory, enter_process, run_command
from grpo_actors.rollout.absence import Absence, Place, print_by_hand

if TYPE_CHECKING:
    from grpo_actors.transport.sockets import Endpoints

PROGRAM = "python -m grpo_actors.rollout"
#: Seconds between two looks whether a run that starts has a learner.
START_POLL_S = 0.2


def work(
    find: Callable[[], Place],
    name: str,
    stop: StopRequest,
    patience_s: float,
    *,
    settings: Path | None = None,
    allowed: Sequence[str] = (),
    ranks: int = 1,
) -> int:
    """Run a worker until it is dismissed or asked to leave; return the exit code, 1 if the learner dropped it.

    A learner that is gone may come back, at the same address or another one, with the same run or another one: the worker
    waits for it, and joins it again.

    Args:
        find: Returns where the learner is. Raises RunError if no run is live.
        name: The worker's name in the logs.
        stop: Set by the first signal.
        patience_s: How long to wait for a learner that is not there.
        settings: The run's config.json, if the worker may load its model before the learner answers.
        allowed: Names of the code that the learner's settings may run here (`consent`).
        ranks: The processes among which the model is divided; the others were started.

    Raises:
        RunError: the learner refused the worker, or could not be reached for `patience_s`.
        ConfigError: the learner's settings name code that is not allowed.
    """
    # These imports take seconds, so they come after the signal handlers are in place.
    from grpo_actors.rollout.joining import preload_policy  # noqa: PLC0415
    from grpo_actors.rollout.leading import leading  # noqa: PLC0415
    from grpo_actors.rollout.participation import take_part  # noqa: PLC0415
    from grpo_actors.rollout.worker import warm_up  # noqa: PLC0415
    from grpo_actors.transport.control import new_session  # noqa: PLC0415

    bound_memory()
    with leading(ranks) as group:
        preloaded = preload_policy(settings, warm_up, allowed, group) if settings else None
        # The same each time: a learner that knows this process already lets it join again under its name.
        session, place = new_session(), find()
        while True:
            absence = Absence(find, place, patience_s)
            outcome = take_part(
                absence, name, session, stop, preloaded=preloaded, allowed=allowed, group=group
            )
            if not isinstance(outcome, Place):
                return outcome
            place, preloaded = outcome, None  # it has learned


def live_endpoints(run_dir: Path) -> "Endpoints":
    """Return the addresses of the live run in `run_dir`.

    Raises:
        RunError: no run is live there.
    """
    from grpo_actors.transport.sockets import Endpoints  # noqa: PLC0415

    endpoints = Endpoints.read(run_dir)
    try:
        os.kill(endpoints.pid, 0)
    except ProcessLookupError:
        raise RunError(
            f"{run_dir}: no run is live here (its process {endpoints.pid} is gone); start it with grpo train"
        ) from None
    except PermissionError:
        pass  # the process is alive and belongs to another user
    return endpoints


def wait_for_start(run_dir: Path, stop: StopRequest) -> None:
    """Return when the run in the folder has a learner that listens; at once if no run is live there, or at a signal."""
    from grpo_actors.rundir.folder import ENDPOINTS_FILE, is_locked  # noqa: PLC0415

    said = False
    while not stop and not (run_dir / ENDPOINTS_FILE).exists() and is_locked(run_dir):
        if not said:
            print_by_hand(f"{run_dir}: the run is starting; waiting for its learner")
            said = True
        time.sleep(START_POLL_S)


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """Build the command line. Its help hides ``--preload``, which only a run uses."""
    command = argparse.ArgumentParser(
        prog=prog, description="Rollout worker: sample groups with the old policy and score them."
    )
    where = command.add_mutually_exclusive_group(required=True)
    where.add_argument("--attach", metavar="RUN_DIR", type=Path, help="folder of a live run on this machine")
    where.add_argument("--connect", metavar="ENDPOINT", help="address of a run's control socket")
    command.add_argument(
        "--key",
        metavar="FILE",
        type=Path,
        help="key made by grpo keys new on the learner's host",
    )
    default_name = f"attached-{socket.gethostname()}-{os.getpid()}"
    command.add_argument("--name", default=default_name, help="name in the logs")
    command.add_argument(
        "--device",
        type=int,
        metavar="N",
        help="number of the GPU to compute on, among those that CUDA_VISIBLE_DEVICES shows (default: the first)",
    )
    command.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="processes among which the model is divided; on CUDA each has a GPU of its own, the first N that "
        "CUDA_VISIBLE_DEVICES shows (default: %(default)s)",
    )
    command.add_argument(
        "--patience",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long to wait for a learner that is gone, or not there yet; 0: for ever (default: %(default)g)",
    )
    add_allow(command)
    command.add_argument("--preload", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    return command


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Parse the command line and run the worker."""
    command = parser(prog)
    args = command.parse_args(arguments)
    if args.ranks < 1:
        command.error(f"--ranks: must be at least 1, got {args.ranks}")
    if args.ranks > 1 and args.device is not None:
        command.error("--device: not with --ranks; CUDA_VISIBLE_DEVICES names the GPUs")
    stop = enter_process()
    if args.device is not None:
        from grpo_actors.devices import use_device  # noqa: PLC0415

        use_device(args.device)
    submit_long_graphs()
    from grpo_actors.transport.keys import ClientKey, read_run_key  # noqa: PLC0415

    if args.attach:
        wait_for_start(args.attach, stop)
        if stop:
            return 0
        endpoints = live_endpoints(args.attach)
        join_mps(endpoints.mps)
        if endpoints.join:
            print_by_hand(f"from another host: {endpoints.how_to_join}")

    def find() -> Place:
        """Read the files anew each time: a learner that is started again may have another address and another key."""
        endpoint = live_endpoints(args.attach).control if args.attach else str(args.connect)
        if args.key:
            return Place(endpoint, ClientKey.read(args.key))
        return Place(endpoint, read_run_key(args.attach) if args.attach else None)

    from grpo_actors.consent import as_options  # noqa: PLC0415
    from grpo_actors.ranks.processes import started  # noqa: PLC0415

    patience_s = args.patience or math.inf
    others = ["grpo_actors.rollout.rank", *as_options(args.allow)]
    with started(args.ranks, others, "--ranks"):
        return work(
            *(find, args.name, stop, patience_s),
            settings=args.preload,
            allowed=args.allow,
            ranks=args.ranks,
        )


if __name__ == "__main__":
    run_command(main, "worker")
