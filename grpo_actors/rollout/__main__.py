"""Rollout worker: samples groups with the old policy and scores them.

    python -m grpo_actors.rollout --attach RUN_DIR      join a live run on this machine
    python -m grpo_actors.rollout --connect ENDPOINT    join a run by the address of its control socket

The address is all that a worker needs. The learner sends the configuration and the identity of the model; each lease
carries the prompt's tokens, the seeds and the inputs of the reward functions. But no code that the configuration names runs
without ``--allow`` (`consent`). Ctrl-C makes the worker leave, and its unfinished leases go to another worker.
"""

import argparse
import contextlib
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_actors.backend import join_mps, submit_long_graphs
from grpo_actors.errors import RunError
from grpo_actors.process import StopRequest, bound_memory, enter_process, is_supervised, run_command

if TYPE_CHECKING:
    from grpo_actors.transport.sockets import Endpoints

#: Longest wait for a message before the stop flag is checked, in seconds.
WAIT_S = 0.2


def work(
    endpoint: str,
    name: str,
    stop: StopRequest,
    patience_s: float,
    *,
    settings: Path | None = None,
    allowed: Sequence[str] = (),
) -> int:
    """Run a worker until it is dismissed or asked to leave, and return the exit code 0.

    Args:
        endpoint: Address of the learner's control socket.
        name: Name in the logs.
        stop: Set by the first signal.
        patience_s: Longest wait for the learner, in seconds.
        settings: The run's config.json, if the worker may load its model before the learner answers.
        allowed: Names of the code that the learner's settings may run here (`consent`).

    Raises:
        RunError: the learner refused the worker, or could not be reached for `patience_s`.
        ConfigError: the learner's settings name code that is not allowed.
    """
    # These imports take seconds, so they come after the signal handlers are in place.
    from grpo_actors import consent  # noqa: PLC0415
    from grpo_actors.config import Config, read_config  # noqa: PLC0415
    from grpo_actors.policy.pinned import pin  # noqa: PLC0415
    from grpo_actors.rollout.episodes import open_episodes  # noqa: PLC0415
    from grpo_actors.rollout.joining import load_welcome_policy, preload_policy  # noqa: PLC0415
    from grpo_actors.rollout.worker import RolloutWorker, warm_up  # noqa: PLC0415
    from grpo_actors.tasks.scoring import open_scorer  # noqa: PLC0415
    from grpo_actors.transport.control import ControlClient  # noqa: PLC0415
    from grpo_actors.transport.sockets import reachable_endpoint, zmq_context  # noqa: PLC0415
    from grpo_actors.transport.weights import WeightsClient  # noqa: PLC0415
    from grpo_actors.wire import fetching  # noqa: PLC0415
    from grpo_actors.wire.handshake import handshake  # noqa: PLC0415
    from grpo_actors.wire.messages import Bye, encode  # noqa: PLC0415

    bound_memory()
    preloaded = preload_policy(settings, allowed) if settings else None
    if settings and preloaded:
        warm_up(preloaded, read_config(settings))
    with zmq_context() as context, contextlib.closing(ControlClient(context, endpoint, name)) as control:
        welcome = handshake(control, "rollout", stop, patience_s)
        if welcome is None:
            return 0
        config = Config.model_validate_json(welcome.config)
        consent.check(consent.code_of(config), allowed, endpoint)
        policy = load_welcome_policy(welcome, config, preloaded)
        with (
            open_scorer(config.reward.functions, config.reward) as scorer,
            open_episodes(config, policy) as turns,
        ):
            weights = WeightsClient(
                context, reachable_endpoint(welcome.weights_endpoint, endpoint), fetching, pin
            )
            worker = RolloutWorker(control, welcome, config, policy, scorer, weights, turns, stop)
            _print_by_hand(f"joined {config.run.run_name} as {name}; Ctrl-C leaves it")
            while not stop and worker.dismissed is None:
                worker.turn(WAIT_S)
                if time.monotonic() - worker.connected_s > patience_s:
                    raise RunError(f"{endpoint}: the learner has been gone for {patience_s:g} s")
        reason = worker.dismissed or "asked to leave"
        control.send(encode(Bye(reason=reason)))
        _print_by_hand(f"left after {worker.delivered} groups: {reason}")
    return 0


def _print_by_hand(text: str) -> None:
    """Print a line if a user started this worker by hand; a worker of launch.py leaves this to the records."""
    if not is_supervised():
        print(text, file=sys.stderr)


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
            f"{run_dir}: no run is live here (its process {endpoints.pid} is gone); start it with launch.py"
        ) from None
    except PermissionError:
        pass  # the process is alive and belongs to another user
    return endpoints


def main() -> int:
    """Parse the command line and run the worker."""
    from grpo_actors.consent import add_option  # noqa: PLC0415 - pydantic

    parser = argparse.ArgumentParser(
        prog="python -m grpo_actors.rollout", description=(__doc__ or "").splitlines()[0]
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--attach", metavar="RUN_DIR", type=Path, help="folder of a live run on this machine")
    where.add_argument("--connect", metavar="ENDPOINT", help="address of a run's control socket")
    default_name = f"attached-{socket.gethostname()}-{os.getpid()}"
    parser.add_argument("--name", default=default_name, help="name in the logs")
    parser.add_argument(
        "--patience", type=float, default=30.0, metavar="SECONDS", help="how long to wait for the learner"
    )
    add_option(parser)
    parser.add_argument("--preload", metavar="FILE", type=Path, help=argparse.SUPPRESS)  # from launch.py
    args = parser.parse_args()
    stop = enter_process()
    submit_long_graphs()
    endpoint = args.connect
    if args.attach:
        endpoints = live_endpoints(args.attach)
        endpoint = endpoints.control
        join_mps(endpoints.mps)
    return work(endpoint, args.name, stop, args.patience, settings=args.preload, allowed=args.allow)


if __name__ == "__main__":
    run_command(main, "worker")
