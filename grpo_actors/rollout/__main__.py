"""Rollout worker: samples groups with the old policy and scores them.

    python -m grpo_actors.rollout --attach RUN_DIR                 join a live run on this machine
    python -m grpo_actors.rollout --connect ENDPOINT --key FILE    join a run by the address of its control socket

The address, and on TCP a key made on the learner's host, are all that a worker needs. The learner sends the
configuration and the identity of the model; each lease carries the prompt's tokens, the seeds and the inputs of the
reward functions. But no code that the configuration names runs without ``--allow`` (`consent`). Ctrl-C makes the worker
leave, and its unfinished leases go to another worker. If the learner is gone, the worker waits for it and goes on when it
is back.
"""

import argparse
import contextlib
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_actors.backend import join_mps, submit_long_graphs
from grpo_actors.errors import RunError
from grpo_actors.process import StopRequest, bound_memory, enter_process, is_supervised, run_command
from grpo_actors.progress import LOADING_S, begin_work

if TYPE_CHECKING:
    from grpo_actors.policy.model import Policy
    from grpo_actors.transport.keys import ClientKey
    from grpo_actors.transport.sockets import Endpoints

#: Longest wait for a message before the stop flag is checked, in seconds.
WAIT_S = 0.2
#: Seconds without a learner after which the worker says so and looks for it elsewhere. It looks again after twice as long,
#: and at least every LONGEST_LOOK_S.
ABSENT_S = 2.0
LONGEST_LOOK_S = 30.0


def work(
    find: "Callable[[], Place]",
    name: str,
    stop: StopRequest,
    patience_s: float,
    *,
    settings: Path | None = None,
    allowed: Sequence[str] = (),
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

    Raises:
        RunError: the learner refused the worker, or could not be reached for `patience_s`.
        ConfigError: the learner's settings name code that is not allowed.
    """
    # These imports take seconds, so they come after the signal handlers are in place.
    from grpo_actors.rollout.joining import preload_policy  # noqa: PLC0415
    from grpo_actors.rollout.worker import warm_up  # noqa: PLC0415
    from grpo_actors.transport.control import new_session  # noqa: PLC0415

    bound_memory()
    preloaded = preload_policy(settings, warm_up, allowed) if settings else None
    # The same each time: a learner that knows this process already lets it join again under its name.
    session, place = new_session(), find()
    while True:
        absence = Absence(find, place, patience_s)
        outcome = _take_part(absence, name, session, stop, preloaded=preloaded, allowed=allowed)
        if not isinstance(outcome, Place):
            return outcome
        place, preloaded = outcome, None  # it has learned


def _take_part(
    absence: "Absence",
    name: str,
    session: bytes,
    stop: StopRequest,
    *,
    preloaded: "Policy | None",
    allowed: Sequence[str],
) -> "Place | int":
    """Join a run and work until the worker leaves it; return the exit code, or where the run is that it must join now."""
    from grpo_actors import consent  # noqa: PLC0415
    from grpo_actors.config import Config  # noqa: PLC0415
    from grpo_actors.policy.pinned import pin  # noqa: PLC0415
    from grpo_actors.rollout.episodes import open_episodes  # noqa: PLC0415
    from grpo_actors.rollout.joining import load_welcome_policy  # noqa: PLC0415
    from grpo_actors.rollout.worker import RolloutWorker  # noqa: PLC0415
    from grpo_actors.tasks.scoring import open_scorer  # noqa: PLC0415
    from grpo_actors.transport.control import ControlClient  # noqa: PLC0415
    from grpo_actors.transport.sockets import reachable_endpoint, zmq_context  # noqa: PLC0415
    from grpo_actors.transport.weights import WeightsClient  # noqa: PLC0415
    from grpo_actors.wire import fetching  # noqa: PLC0415
    from grpo_actors.wire.handshake import handshake  # noqa: PLC0415
    from grpo_actors.wire.messages import Bye, encode  # noqa: PLC0415

    place = absence.place
    with (
        zmq_context() as context,
        contextlib.closing(
            ControlClient(
                *(context, place.endpoint, name, place.key), session=session, backs_off=not is_supervised()
            )
        ) as control,
    ):
        welcome = handshake(control, "rollout", stop, absence.patience_s)
        if welcome is None:
            return 0
        begin_work("", LOADING_S)  # to load the model
        config = Config.model_validate_json(welcome.config)
        consent.check(consent.code_of(config), allowed, place.endpoint)
        policy = load_welcome_policy(welcome, config, preloaded)
        with (
            open_scorer(config) as scorer,
            open_episodes(config, policy) as turns,
        ):
            weights = WeightsClient(
                context,
                reachable_endpoint(welcome.weights_endpoint, place.endpoint),
                fetching,
                pin,
                place.key,
            )
            worker = RolloutWorker(control, welcome, config, policy, scorer, weights, turns, stop)
            _print_by_hand(f"joined {config.run.run_name} as {name}; Ctrl-C leaves it")
            while not stop and worker.dismissed is None:
                try:
                    worker.turn(WAIT_S)
                    gone_s = time.monotonic() - worker.connected_s
                    found = place if worker.must_rejoin else absence.look(gone_s)
                except RunError:
                    # Refused, perhaps by a learner with a new key that listens at the same address.
                    found = absence.find_other()
                    if found is None:
                        raise
                if found is not None:
                    _print_by_hand(f"left after {worker.delivered} groups, to join the run that is there now")
                    return found
        reason = worker.dismissed or "asked to leave"
        control.send(encode(Bye(reason=reason)))
        if worker.dropped:
            print(f"{name} was dropped by the learner: {reason}", file=sys.stderr)
            return 1
        _print_by_hand(f"left after {worker.delivered} groups: {reason}")
    return 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a learner is."""

    #: Address of its control socket.
    endpoint: str
    #: What its sockets ask for; None: nothing.
    key: "ClientKey | None" = None


@dataclass
class Absence:
    """The learner's absence, during which a worker waits."""

    find: Callable[[], Place]
    #: Where the learner was.
    place: Place
    patience_s: float
    #: Length of the absence at which it is looked for again; its double the next time.
    _next_s: float = ABSENT_S

    def look(self, gone_s: float) -> Place | None:
        """Return where the learner is now, if it has moved; `gone_s`: seconds since it could be reached.

        Raises:
            RunError: it has been gone for too long.
        """
        if gone_s > self.patience_s:
            raise RunError(f"{self.place.endpoint}: the learner has been gone for {self.patience_s:g} s")
        if gone_s < ABSENT_S:
            if self._next_s > ABSENT_S:
                _print_by_hand("the learner is back")
            self._next_s = ABSENT_S
            return None
        if gone_s < self._next_s:
            return None
        if self._next_s == ABSENT_S:
            until = "" if self.patience_s == math.inf else f" for up to {self.patience_s:g} s (--patience)"
            _print_by_hand(f"the learner is gone; waiting{until}")
        self._next_s = min(2 * gone_s, gone_s + LONGEST_LOOK_S)
        return self.find_other()

    def find_other(self) -> Place | None:
        """Return where the learner is now, if it is elsewhere or has another key."""
        with contextlib.suppress(RunError):  # there is none yet
            found = self.find()
            return None if found == self.place else found
        return None


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
    parser.add_argument(
        "--key",
        metavar="FILE",
        type=Path,
        help="key made by python -m grpo_actors.keys new on the learner's host",
    )
    default_name = f"attached-{socket.gethostname()}-{os.getpid()}"
    parser.add_argument("--name", default=default_name, help="name in the logs")
    parser.add_argument(
        "--patience",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long to wait for a learner that is gone, or not there yet; 0: for ever (default: %(default)g)",
    )
    add_option(parser)
    parser.add_argument("--preload", metavar="FILE", type=Path, help=argparse.SUPPRESS)  # from launch.py
    args = parser.parse_args()
    stop = enter_process()
    submit_long_graphs()
    from grpo_actors.transport.keys import ClientKey, read_run_key  # noqa: PLC0415

    if args.attach:
        endpoints = live_endpoints(args.attach)
        join_mps(endpoints.mps)
        if endpoints.join:
            _print_by_hand(f"from another host: {endpoints.how_to_join}")

    def find() -> Place:
        """Read the files anew each time: a learner that is started again may have another address and another key."""
        endpoint = live_endpoints(args.attach).control if args.attach else str(args.connect)
        if args.key:
            return Place(endpoint, ClientKey.read(args.key))
        return Place(endpoint, read_run_key(args.attach) if args.attach else None)

    patience_s = args.patience or math.inf
    return work(find, args.name, stop, patience_s, settings=args.preload, allowed=args.allow)


if __name__ == "__main__":
    run_command(main, "worker")
