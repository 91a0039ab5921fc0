"""One rank of a group that does one update of each of `CASES`; rank 0 compares it with that of one process.

It prints a line of JSON for each case: the relative differences of gradient and weights, both metrics, and the checksum of
each rank's weights.
"""

import grpo_actors  # noqa: F401 - loads the fast BLAS, which must come before MLX

# isort: split
import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
from hand_made import config, groups_of, learner
from mlx.utils import tree_flatten

from grpo_actors.learner.following import _fingerprint, give_state, receive_state
from grpo_actors.learner.grpo import Grpo
from grpo_actors.learner.ranks import JoinedRanks
from grpo_actors.policy.model import load_policy

LORA = {"fine_tune_type": "lora", "lora_rank": 4}
#: Four micro-batches, if the case does not say otherwise; with this beta, the first moment of AdamW is the gradient.
USUAL = {
    "num_generations": 2,
    "batch_size": 1,
    "gradient_accumulation_steps": 4,
    "adam_beta1": 0.0,
    "max_grad_norm": 0.5,
}
#: The steps are short, so that the updates after the first one start from nearly the same weights, too.
RATE = 1e-6
CASES = {
    "dapo": {"aggregation": "dapo"},
    "grpo": {"aggregation": "grpo", "mask_truncated": True},
    "dr_grpo": {"aggregation": "dr_grpo", "model": LORA},
    "bnpo": {"aggregation": "bnpo", "model": LORA | {"lora_dropout": 0.5}},
    "every term": {
        "kl_coeff": 0.1,
        "entropy_coeff": 0.01,
        "top_entropy_share": 0.5,
        "ratio": "recomputed",
        "num_iterations": 2,
        "reference_refresh_updates": 1,
    },
    "one micro-batch": {"batch_size": 4, "gradient_accumulation_steps": 1},
    "nothing to learn": {},  # all rewards are equal
}
#: Two completions of each prompt.
REWARDS = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.5], [0.0, 3.0]]
#: The case in which the group continues what one process has begun.
RESUMED = "every term"


def main() -> None:
    ranks = JoinedRanks(mx.distributed.init(strict=True))
    # An adapter changes nothing at first, so all cases train on the same samples.
    sampled = [] if ranks.rank else groups_of(load_policy(config().model, seed=0), REWARDS)
    for name, case in CASES.items():
        settings = USUAL | case
        alone, together = (config(learning_rate=RATE, ranks=count, **settings) for count in (1, ranks.size))
        policy = load_policy(together.model, seed=0)
        if ranks.rank:
            grpo = receive_state(ranks, together, policy)
            grpo.learn(ranks.next_share())
            ranks.ask(_fingerprint(grpo.policy))
            continue
        solo, joined = learner(alone), Grpo(together, policy, 10, ranks=ranks)
        groups = equally_rewarded(sampled) if name == "nothing to learn" else sampled
        if name == RESUMED:
            solo.update(groups)
            joined.policy.load_trainable(solo.policy.trainable())
            joined.training.load_state(solo.training.state())
            joined.restore_reference(dict(solo.reference))
            joined.version = solo.version
        give_state(joined)
        metrics = [grpo.update(groups) for grpo in (solo, joined)]
        found = {
            "size": ranks.size,
            "gradient": difference(*(grpo.training.optimizer.state for grpo in (solo, joined))),
            "weights": difference(*(grpo.policy.trainable() for grpo in (solo, joined))),
            "metrics": metrics,
            "marks": ranks.ask(_fingerprint(joined.policy)),
        }
        print(json.dumps({"case": name} | found), flush=True)
    if not ranks.rank:
        ranks.close()


def equally_rewarded(groups):
    return [
        replace(group, completions=[replace(c, rewards={"hand": 1.0}) for c in group.completions])
        for group in groups
    ]


def difference(one, other) -> float:
    """Return the relative difference of two trees; of an optimizer's state, only its first moments count."""
    one, other = (
        np.concatenate(
            [np.array(a).ravel() for key, a in sorted(tree_flatten(tree)) if not key.endswith((".v", "step"))]
        )
        for tree in (one, other)
    )
    return (
        float(np.linalg.norm(one - other) / np.linalg.norm(one))
        if one.any()
        else float(np.linalg.norm(other))
    )


if __name__ == "__main__":
    main()
