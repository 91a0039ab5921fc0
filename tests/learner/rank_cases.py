"""One rank of a group that trains each of `CASES`: ``python rank_cases.py``; rank 0 prints what differs from one process.

The first line is the number of ranks. Then each case has a line: its name, the relative differences of the gradient and
of the weights after two updates, both metrics of the second one, and whether all ranks hold the same weights.
"""

import json
import sys

import grpo_actors  # noqa: F401, I001 - loads the fast BLAS, before MLX
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
USUAL = {"batch_size": 1, "gradient_accumulation_steps": 4, "adam_beta1": 0.0, "learning_rate": 1e-5, "max_grad_norm": 0.5}
CASES = {
    "dapo": {"aggregation": "dapo"},
    "grpo": {"aggregation": "grpo", "mask_truncated": True},
    "dr_grpo": {"aggregation": "dr_grpo", "model": LORA},
    "bnpo": {"aggregation": "bnpo", "model": LORA | {"lora_dropout": 0.5}},
    "every term": {
        **{"kl_coeff": 0.1, "entropy_coeff": 0.01, "top_entropy_share": 0.5, "ratio": "recomputed"},
        **{"num_iterations": 2, "reference_refresh_updates": 1},
    },
    "one micro-batch": {"batch_size": 4, "gradient_accumulation_steps": 1},
    "nothing to learn": {"rewards": [[1.0] * 4] * 4},
}
UPDATES = 2


def main() -> None:
    ranks = JoinedRanks(mx.distributed.init(strict=True))
    first = load_policy(config().model, seed=0)
    if not ranks.rank:
        print(ranks.size, flush=True)
    for name, settings in CASES.items():
        settings = USUAL | settings
        rewards = settings.pop("rewards", None)
        alone, together = config(**settings), config(**settings, ranks=ranks.size)
        policy = load_policy(together.model, seed=0)
        if ranks.rank:
            grpo = receive_state(ranks, together, policy)
            for _ in range(UPDATES):
                grpo.learn(ranks.next_share())
            ranks.ask(_fingerprint(grpo.policy))
            continue
        groups = groups_of(first, *([] if rewards is None else [rewards]))
        solo = learner(alone)
        # The first update is done by one process, so that the group resumes what it has not done.
        resumed = Grpo(together, policy, 10, ranks=ranks)
        if name == "every term":
            solo.update(groups)
            resumed.policy.load_trainable(solo.policy.trainable())
            resumed.training.load_state(solo.training.state())
            resumed.reference, resumed.reference_refreshed = dict(solo.reference), True
            resumed.version = 1
        give_state(resumed)
        before = flat(solo.policy.trainable().items())
        metrics = [[grpo.update(groups) for _ in range(UPDATES)][-1] for grpo in (solo, resumed)]
        marks = ranks.ask(_fingerprint(resumed.policy))
        weights = [flat(grpo.policy.trainable().items()) - before for grpo in (solo, resumed)]
        gradients = [
            flat(item for item in tree_flatten(grpo.training.optimizer.state) if item[0].endswith(".m"))
            for grpo in (solo, resumed)
        ]
        line = {
            "case": name,
            "gradient": difference(*gradients),
            "moved": difference(*weights),
            "weights": difference(*(before + moved for moved in weights)),
            "metrics": metrics,
            "equal": len(set(marks)) == 1,
        }
        print(json.dumps(line), flush=True)
    ranks.close() if not ranks.rank else None


def flat(arrays) -> np.ndarray:
    return np.concatenate([np.array(array).ravel() for _, array in sorted(arrays)])


def difference(one, other) -> float:
    return float(np.linalg.norm(one - other) / max(float(np.linalg.norm(one)), 1e-30))


if __name__ == "__main__":
    sys.exit(main())
