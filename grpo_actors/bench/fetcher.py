"""A worker process as far as weights go: it loads the policy, then fetches and adopts a version when told to.

`publication` times the versions, `startup` the loading up to the hello: sockets are imported after it.
"""

import sys
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from grpo_actors.bench.companion import obey, say
from grpo_actors.bench.policies import rollout_policy
from grpo_actors.config import Config
from grpo_actors.policy.model import Policy
from grpo_actors.process import bound_memory, run_command


def adopt_versions(policy: Policy) -> None:
    """Whenever an order comes, take the newest version of its `endpoint`, all of it; the answer is its number."""
    from grpo_actors.rollout.joining import fetch_weights  # noqa: PLC0415
    from grpo_actors.transport.sockets import zmq_context  # noqa: PLC0415
    from grpo_actors.transport.weights import WeightsClient  # noqa: PLC0415
    from grpo_actors.wire import fetching  # noqa: PLC0415

    clients: dict[str, WeightsClient] = {}
    with zmq_context() as context:

        def adopt(order: Mapping[str, Any]) -> Mapping[str, Any]:
            endpoint = order["endpoint"]
            if endpoint not in clients:
                clients[endpoint] = WeightsClient(context, endpoint, fetching)
            fetched = None
            while fetched is None:
                fetched = fetch_weights(clients[endpoint])
            version, arrays = fetched
            policy.load_trainable(arrays)
            mx.eval(policy.model.parameters())
            return {"version": version}

        obey(adopt)


def main() -> int:
    """The process; its argument is the settings as JSON."""
    bound_memory()
    policy = rollout_policy(Config.model_validate_json(sys.argv[1]))
    say({"loaded": policy.name})
    adopt_versions(policy)
    return 0


if __name__ == "__main__":
    run_command(main)
