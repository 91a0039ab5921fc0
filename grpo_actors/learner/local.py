"""The worker of ``rollout.workers = 0``: in the learner's own thread, with the learner's own policy."""

import contextlib
from collections.abc import Iterator

from grpo_actors.config import Config
from grpo_actors.learner.grpo import Grpo
from grpo_actors.process import StopRequest
from grpo_actors.rollout.episodes import open_episodes
from grpo_actors.rollout.worker import RolloutWorker
from grpo_actors.tasks.scoring import open_scorer
from grpo_actors.transport.control import ControlClient
from grpo_actors.transport.sockets import Endpoints, zmq_context
from grpo_actors.wire.handshake import handshake
from grpo_actors.wire.messages import Welcome


@contextlib.contextmanager
def local_worker(
    config: Config, grpo: Grpo, endpoints: Endpoints, welcome: Welcome, stop: StopRequest
) -> Iterator[RolloutWorker]:
    """Open a worker and let it join the run over its socket, as every other does."""
    with (
        zmq_context() as context,
        open_scorer(config.reward.functions, config.reward) as scorer,
        open_episodes(config, grpo.policy) as turns,
    ):
        control = ControlClient(context, endpoints.control, "local")
        yield RolloutWorker(
            control,
            handshake(control, "rollout", stop, patience_s=10) or welcome,  # None: asked to stop meanwhile
            config,
            grpo.policy,
            scorer,
            episodes=turns,
            stop=stop,
            version=grpo.version,
        )
