"""A rollout worker whose completions have planned lengths, whatever the model samples; all else is a worker's work."""

import itertools
import os
import sys
import zlib

import numpy as np

from grpo_actors.bench.policies import PlannedPolicy, plan, planned
from grpo_actors.bench.workload import LENGTHS, completion_lengths
from grpo_actors.config import Config
from grpo_actors.errors import ConfigError
from grpo_actors.policy.model import Policy
from grpo_actors.process import run_command
from grpo_actors.ranks.group import RankGroup
from grpo_actors.rollout import joining
from grpo_actors.rollout.__main__ import main
from grpo_actors.wire.messages import Welcome

#: Lengths that a worker goes through before they repeat.
COUNT = 1000

load = joining.load_welcome_policy


def load_planned(
    welcome: Welcome, config: Config, preloaded: Policy | None = None, group: RankGroup | None = None
) -> PlannedPolicy:
    """Load the policy as a worker does; its completions have the lengths in an order of this worker's own."""
    if group is not None:
        raise ConfigError(
            "rollout.rollout_ranks: must be 1 here: ranks after the first know no planned lengths"
        )
    lengths = completion_lengths(COUNT, config.rollout.max_new_tokens, os.environ[LENGTHS])
    name = sys.argv[sys.argv.index("--name") + 1]
    order = np.random.default_rng(zlib.crc32(name.encode())).permutation(lengths)
    policy = planned(load(welcome, config, preloaded, group))
    plan(policy, itertools.cycle(order.tolist()))
    return policy


if __name__ == "__main__":
    joining.load_welcome_policy = load_planned
    run_command(main, "worker")
