"""The worker of ``rollout.workers = 0``: it runs in the learner's thread and samples with the learner's policy."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from grpo_actors.config import Config
from grpo_actors.learner.grpo import Grpo
from grpo_actors.process import StopRequest
from grpo_actors.rollout.episodes import open_episodes
from grpo_actors.rollout.worker import RolloutWorker
from grpo_actors.tasks.scoring import open_scorer
from grpo_actors.transport.control import ControlClient
from grpo_actors.transport.keys import read_run_key
from grpo_actors.transport.sockets import Endpoints, zmq_context
from grpo_actors.wire.handshake import handshake
from grpo_actors.wire.messages import Welcome


@contextlib.contextmanager
def open_local_worker(
    config: Config, grpo: Grpo, endpoints: Endpoints, welcome: Welcome, stop: StopRequest, *, run_dir: Path
) -> Iterator[RolloutWorker]:
    """Open a worker that joins the run through its socket, as every other worker does."""
    with (
        zmq_context() as context,
        open_scorer(config) as scorer,
        open_episodes(config, grpo.policy) as turns,
    ):
        control = ControlClient(context, endpoints.control, "local", read_run_key(run_dir))
        yield RolloutWorker(
            control,
            # None if a stop is requested meanwhile.
            handshake(control, "rollout", stop, patience_s=10) or welcome,
            config,
            grpo.policy,
            scorer,
            episodes=turns,
            stop=stop,
            version=grpo.version,
        )
