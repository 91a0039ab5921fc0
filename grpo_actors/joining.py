"""How a worker or an evaluator joins a run: Hello, Welcome, the model, the weights.

Knows the protocol from the side of whoever connects; refuses to know what is done once joined.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Literal

import mlx.core as mx

from grpo_actors.config import Config
from grpo_actors.errors import ModelError, ProtocolError, RunError
from grpo_actors.messages import (
    PROTOCOL_VERSION,
    Bye,
    Hello,
    Manifest,
    Welcome,
    decode,
    encode,
    from_learner,
    weights_reply,
)
from grpo_actors.policy.identity import Identity
from grpo_actors.policy.model import Policy, load_policy
from grpo_actors.policy.weights import unpack
from grpo_actors.processes.door import StopRequest
from grpo_actors.transport.control import ControlClient
from grpo_actors.transport.weights import Version, WeightsClient

#: A Hello that was not answered in this time is said again.
HELLO_S = 2.0


class Leaving(Exception):  # noqa: N818 - not an error: the way out of a computation
    """Raised within a computation when the process was asked to stop or sent home."""


def hello(role: Literal["rollout", "evaluator"], name: str, run_id: str = "") -> Hello:
    """This process's introduction; `run_id` names the run it was in before, if any."""
    return Hello(
        protocol=PROTOCOL_VERSION,
        role=role,
        name=name,
        host=socket.gethostname(),
        pid=os.getpid(),
        run_id=run_id,
    )


def introduce(
    control: ControlClient, role: Literal["rollout", "evaluator"], stop: StopRequest, patience_s: float
) -> Welcome | None:
    """Say Hello until the learner answers; None: asked to stop meanwhile, or the run needs nobody more.

    Raises:
        RunError: refused, or no answer within `patience_s`.
    """
    deadline_s = time.monotonic() + patience_s
    next_hello_s = 0.0
    while not stop:
        now_s = time.monotonic()
        if now_s > deadline_s:
            raise RunError(
                f"{control.endpoint}: no learner answered within {patience_s:g} s; is the run live?"
            )
        if now_s >= next_hello_s and control.send(encode(hello(role, control.name))):
            next_hello_s = now_s + HELLO_S
        data = control.receive(0.05)
        if data is None:
            continue
        answer = decode(from_learner, data)
        if isinstance(answer, Welcome):
            return answer
        if isinstance(answer, Bye) and answer.dismissed:
            print(f"{control.name} is not needed: {answer.reason}", file=sys.stderr)
            return None
        if isinstance(answer, Bye) and not answer.again:
            raise RunError(f"{control.endpoint}: the learner refused: {answer.reason}")
    return None


def fetch_weights(
    client: WeightsClient, on_chunk: Callable[[], None] = lambda: None
) -> tuple[int, dict[str, mx.array]] | None:
    """The newest version and its arrays; None: it was replaced while under way, or nobody answered: try again."""
    answer = client.manifest()
    if answer is None:
        return None
    manifest = decode(weights_reply, answer)
    if not isinstance(manifest, Manifest):
        raise ProtocolError(f"weights: asked for a manifest, got {type(manifest).__name__}")
    addresses = tuple(manifest.path.split("\n"))
    version = Version(manifest.version, manifest.size, manifest.chunk_bytes, addresses)
    arrived = client.take(version, on_chunk)
    if arrived is None:
        return None
    arrays = unpack(manifest, arrived.data, of_this_host=arrived.of_this_host, pinned=arrived.pin)
    return (manifest.version, arrays) if arrived.whole() else None


def load_welcome_policy(welcome: Welcome, config: Config) -> Policy:
    """The model that the learner trains, from its path or hub id on this machine.

    Raises:
        ModelError: this machine holds another model under that name.
    """
    policy = load_policy(config.model, seed=config.run.seed)
    mismatch = policy.identity.mismatch(Identity(**json.loads(welcome.identity)))
    if mismatch:
        raise ModelError(
            f"model.model_name: {config.model.model_name!r} is not the learner's model: {mismatch}"
        )
    if config.rollout.quantize_for_rollouts:
        policy.quantize(config.rollout.rollout_bits)
    return policy
