"""Loading the policy and its optimizer at the start of a run."""

import sys

from grpo_actors.config import Config
from grpo_actors.observe.symptoms import NO_END
from grpo_actors.policy.architectures import require_divisible
from grpo_actors.policy.decoding.rows import require_bound
from grpo_actors.policy.decoding.sampling import NO_ENVIRONMENT
from grpo_actors.policy.decoding.step import require_cache_bits, require_fit
from grpo_actors.policy.decoding.turns import encode_reply
from grpo_actors.policy.locate import locate
from grpo_actors.policy.model import Policy, load_policy
from grpo_actors.policy.sharding import Group
from grpo_actors.tasks.task import Problem


def load_model(config: Config, group: Group | None = None) -> Policy:
    """Load the model as for a new run; `Archive.restore` then loads a checkpoint.

    Args:
        config: The settings.
        group: The ranks among which it is divided; None: it is not.

    Raises:
        ModelError: As `load_policy`.
        ConfigError: As `load_policy`; or the model cannot be trained when it is divided.
    """
    if isinstance(locate(config.model.model_name), str):
        name = config.model.model_name
        print(f"model {name}: no such folder here, so from the hub or its local copy", file=sys.stderr)
    policy = load_policy(config.model, seed=config.run.seed, group=group)
    if group is not None:
        require_divisible(
            policy.name, policy.architecture, group.size(), "learner.ranks with divide_model", trains=True
        )
    policy.chat.use(config.data.chat_template, config.data.chat_template_kwargs)
    return policy


def check_sampling(config: Config, policy: Policy, first: Problem) -> None:
    """Refuse a model or settings with which workers could not sample; `first` is the first problem."""
    check_decoding(config, policy)
    with policy.chat.limited():
        policy.chat.encode(first.messages)
        _ = policy.stop_tokens  # asks the template too
        if config.environments:
            encode_reply(policy, {"role": "user", "content": "?"}, after_stop_token=True)


def check_decoding(config: Config, policy: Policy) -> None:
    """Refuse a model that cannot be decoded with these settings; some models are tried, a divided one on all ranks."""
    require_divisible(policy.name, policy.architecture, config.rollout.rollout_ranks, "rollout.rollout_ranks")
    if config.rollout.in_flight_updates:
        require_fit(policy, "rollout.in_flight_updates: must be false")
    if config.environments:
        require_fit(policy, NO_ENVIRONMENT)
    require_cache_bits(policy, config.rollout.kv_bits, "rollout.kv_bits")
    require_bound(policy, config.rollout.think_tokens, config.rollout.max_new_tokens, "rollout.think_tokens")


def turn_end_note(config: Config, policy: Policy) -> str | None:
    """Return a sentence on the end of a completion if the model's settings do not say it; None if they do."""
    if policy.chat.turn_end is not None:
        end = policy.tokenizer.convert_ids_to_tokens(policy.chat.turn_end)
        return (
            f"{policy.name}: its chat template ends a turn with {end}, which its eos_token_id lacks; "
            "it ends completions here, and is written into the checkpoints"
        )
    if not policy.chat.ends_turns and not config.rollout.stop:
        return f"{policy.name}: completions may never end: {NO_END}"
    return None
