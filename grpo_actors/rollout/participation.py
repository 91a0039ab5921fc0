"""One participation of a worker in a run: it joins, works until it is sent away or the run has moved, and leaves."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence

from grpo_actors import consent
from grpo_actors.config import Config
from grpo_actors.errors import RunError
from grpo_actors.policy.model import Policy
from grpo_actors.process import StopRequest, is_supervised
from grpo_actors.progress import LOADING_S, begin_work
from grpo_actors.ranks.group import RankGroup
from grpo_actors.rollout.absence import Absence, Place, print_by_hand
from grpo_actors.rollout.episodes import open_episodes
from grpo_actors.rollout.joining import load_welcome_policy, weights_client
from grpo_actors.rollout.worker import RolloutWorker
from grpo_actors.tasks.scoring import open_scorer
from grpo_actors.transport.control import ControlClient
from grpo_actors.transport.sockets import Context, zmq_context
from grpo_actors.wire.handshake import handshake
from grpo_actors.wire.messages import Bye, Welcome, encode

#: Longest wait for a message before the stop flag is checked, in seconds.
WAIT_S = 0.2


def take_part(
    absence: Absence,
    name: str,
    session: bytes,
    stop: StopRequest,
    *,
    preloaded: Policy | None = None,
    allowed: Sequence[str] = (),
    group: RankGroup | None = None,
) -> Place | int:
    """Join a run and work until the worker leaves it; return the exit code, or where the run is that it must join now.

    Args:
        absence: Where the learner is, and how long to wait for it.
        name: The worker's name in the logs.
        session: Token of this process.
        stop: Set by the first signal.
        preloaded: The model that the run is expected to train; None: load it now.
        allowed: Names of the code that the learner's settings may run here (`consent`).
        group: The ranks among which the model is divided, if it is.
    """
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
        policy = load_welcome_policy(welcome, config, preloaded, group)
        with _equipped(
            *(context, control, welcome, config, policy), place=place, stop=stop, group=group
        ) as worker:
            print_by_hand(f"joined {config.run.run_name} as {name}; Ctrl-C leaves it")
            moved = _work(worker, absence, stop)
        if moved is not None:
            print_by_hand(f"left after {worker.delivered} groups, to join the run that is there now")
            return moved
        return _leave(worker, control, name)


@contextlib.contextmanager
def _equipped(
    context: Context,
    control: ControlClient,
    welcome: Welcome,
    config: Config,
    policy: Policy,
    *,
    place: Place,
    stop: StopRequest,
    group: RankGroup | None,
) -> Iterator[RolloutWorker]:
    """Make a worker with what the run needs: its rewards, its environment and a source of weights."""
    with (
        open_scorer(config) as scorer,
        open_episodes(config, policy) as turns,
        contextlib.closing(weights_client(context, welcome, place.endpoint, place.key)) as weights,
    ):
        yield RolloutWorker(control, welcome, config, policy, scorer, weights, turns, stop, group=group)


def _work(worker: RolloutWorker, absence: Absence, stop: StopRequest) -> Place | None:
    """Work until the worker is asked to stop or is dismissed; return where the run is, if it must be joined anew."""
    while not stop and worker.dismissed is None:
        try:
            worker.turn(WAIT_S)
            gone_s = time.monotonic() - worker.connected_s
            found = absence.place if worker.must_rejoin else absence.look(gone_s)
        except RunError:
            # Refused, perhaps by a learner with a new key that listens at the same address.
            found = absence.find_other()
            if found is None:
                raise
        if found is not None:
            return found
    return None


def _leave(worker: RolloutWorker, control: ControlClient, name: str) -> int:
    """Say Bye; return the exit code, 1 if the learner has dropped the worker."""
    reason = worker.dismissed or "asked to leave"
    control.send(encode(Bye(reason=reason)))
    if worker.dropped:
        print(f"{name} was dropped by the learner: {reason}", file=sys.stderr)
        return 1
    print_by_hand(f"left after {worker.delivered} groups: {reason}")
    return 0
