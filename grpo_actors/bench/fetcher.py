"""The weights part of a worker process: load the policy, then fetch and adopt a version for each order.

`publication` times the versions. `startup` times the loading up to the hello, so sockets are imported after it.
"""

import sys
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from grpo_actors.bench.bench_process import reply, serve
from grpo_actors.bench.policies import rollout_policy
from grpo_actors.config import Config
from grpo_actors.policy.model import Policy
from grpo_actors.process import bound_memory, run_command


def adopt_versions(policy: Policy) -> None:
    """For each order, fetch and adopt the newest version from the order's `endpoint`; the answer is its number."""
    from grpo_actors.rollout.joining import fetch_weights  # noqa: PLC0415
    from grpo_actors.transport.sockets import zmq_context  # noqa: PLC0415
    from grpo_actors.transport.weights import WeightsClient  # noqa: PLC0415
    from grpo_actors.wire import fetching  # noqa: PLC0415

    clients: dict[str, WeightsClient] = {}
    with zmq_context() as context:

        def adopt(order: Mapping[str, Any]) -> Mapping[str, Any]:
            endpoint = order["endpoint"]
            if endpoint not in clients:
                clients[endpoint] = WeightsClient(context, endpoint, fetching, run=endpoint)
            fetched = None
            while fetched is None:
                fetched = fetch_weights(clients[endpoint])
            version, arrays = fetched
            policy.load_trainable(arrays)
            mx.eval(policy.model.parameters())
            return {"version": version}

        serve(adopt)
        for client in clients.values():
            client.close()


def main() -> int:
    """Run the process; its argument is the settings as JSON."""
    bound_memory()
    policy = rollout_policy(Config.model_validate_json(sys.argv[1]))
    reply({"loaded": policy.name})
    adopt_versions(policy)
    return 0


if __name__ == "__main__":
    run_command(main)
