"""Get what a worker needs from its learner: the model, and each new version of the weights."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from grpo_actors import consent
from grpo_actors.config import Config, read_config
from grpo_actors.errors import GrpoActorsError, ModelError, ProtocolError
from grpo_actors.policy.identity import Identity
from grpo_actors.policy.model import Policy, load_policy
from grpo_actors.policy.pinned import pin
from grpo_actors.policy.weights import unpack
from grpo_actors.ranks.group import RankGroup
from grpo_actors.rollout.leading import load_together
from grpo_actors.transport.keys import ClientKey
from grpo_actors.transport.sockets import Context, reachable_endpoint
from grpo_actors.transport.weights import Version, WeightsClient
from grpo_actors.wire import fetching
from grpo_actors.wire.messages import Manifest, Welcome, decode, weights_reply


def weights_client(context: Context, welcome: Welcome, endpoint: str, key: ClientKey | None) -> WeightsClient:
    """Return the source of weights that a Welcome names; `endpoint` is the address at which its learner was reached."""
    reached = reachable_endpoint(welcome.weights_endpoint, endpoint)
    return WeightsClient(context, reached, fetching, pin, key=key, run=welcome.run_id)


def fetch_weights(
    client: WeightsClient, on_chunk: Callable[[], None] = lambda: None
) -> tuple[int, dict[str, mx.array]] | None:
    """Fetch the newest version and its arrays.

    Returns None if the version was replaced during the transfer, or if there was no answer; try again later.
    """
    answer = client.manifest()
    if answer is None:
        return None
    manifest = decode(weights_reply, answer)
    if not isinstance(manifest, Manifest):
        raise ProtocolError(f"weights: asked for a manifest, got {type(manifest).__name__}")
    addresses = tuple(manifest.path.split("\n"))
    version = Version(manifest.version, manifest.size, manifest.chunk_bytes, addresses, manifest.digest)
    arrived = client.fetch(version, on_chunk)
    if arrived is None:
        return None
    arrays = unpack(manifest, arrived.data, of_this_host=arrived.of_this_host, pinned=arrived.pin)
    return (manifest.version, arrays) if arrived.whole() else None


def preload_policy(
    settings: Path,
    prepare: Callable[[Policy, Config], None],
    allowed: Sequence[str] = (),
    group: RankGroup | None = None,
) -> Policy | None:
    """Load the model of a run's config.json while the learner loads its own, and compute its identity.

    Args:
        settings: The config.json.
        prepare: Called with the model while its tokenizer is still being read.
        allowed: Names of the code that may run (`consent`).
        group: The ranks among which the model is divided, if it is.

    Returns:
        The policy; None if it cannot be loaded: the learner then reports the same error, which is enough.
    """
    try:
        config = read_config(settings)
        consent.check(consent.code_of_model(config.model), allowed, settings)
        policy = _load(config, group, tokenizer_later=True)
        prepare(policy, config)
        _ = policy.identity  # computed once, here
    except GrpoActorsError:
        return None
    return policy


def load_welcome_policy(
    welcome: Welcome, config: Config, preloaded: Policy | None = None, group: RankGroup | None = None
) -> Policy:
    """Load the model that the learner trains, by its path or hub id on this machine; or take `preloaded`, if it is that.

    Args:
        welcome: The learner's answer.
        config: Its settings.
        preloaded: A model that was loaded before.
        group: The ranks among which the model is divided, if it is.

    Raises:
        ModelError: this machine has another model under that name.
    """
    if preloaded is None or preloaded.config != config.model:
        preloaded = _load(config, group)
    policy = preloaded
    mismatch = policy.identity.mismatch(Identity(**json.loads(welcome.identity)))
    if mismatch:
        raise ModelError(
            f"model.model_name: {config.model.model_name!r} is not the learner's model: {mismatch}"
        )
    policy.chat.use(config.data.chat_template, config.data.chat_template_kwargs)
    if config.rollout.quantize_for_rollouts:
        policy.quantize(config.rollout.rollout_bits)
    return policy


def _load(config: Config, group: RankGroup | None, *, tokenizer_later: bool = False) -> Policy:
    if group is not None:
        return load_together(group, config)
    return load_policy(config.model, seed=config.run.seed, tokenizer_later=tokenizer_later)
