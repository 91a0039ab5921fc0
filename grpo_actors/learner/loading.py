"""Loading the policy and its optimizer at the start of a run."""

import sys

from grpo_actors.config import Config
from grpo_actors.policy.decoding.sampling import NO_ENVIRONMENT
from grpo_actors.policy.decoding.step import require_fit
from grpo_actors.policy.decoding.turns import encode_reply
from grpo_actors.policy.locate import locate
from grpo_actors.policy.model import Policy, load_policy
from grpo_actors.tasks.task import Problem


def load_model(config: Config) -> Policy:
    """Load the model as for a new run; `Archive.restore` then loads a checkpoint."""
    if isinstance(locate(config.model.model_name), str):
        print(f"model {config.model.model_name}: from the hub, or from its local copy", file=sys.stderr)
    return load_policy(config.model, seed=config.run.seed)


def check_sampling(config: Config, policy: Policy, first: Problem) -> None:
    """Refuse a model or settings with which workers could not sample; `first` is the first problem."""
    if config.rollout.in_flight_updates:
        require_fit(policy, "rollout.in_flight_updates: must be false")
    if config.environments:
        require_fit(policy, NO_ENVIRONMENT)
    with policy.template_ends():
        policy.encode_chat(first.messages)
        if config.environments:
            encode_reply(policy, {"role": "user", "content": "?"}, after_stop_token=True)
