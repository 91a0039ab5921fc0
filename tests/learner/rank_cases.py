"""One rank of a group that does one update of each of `CASES`; rank 0 compares it with that of one process.

It prints a line of JSON for each case: the relative differences of gradient and weights, both metrics, and the checksum of
each rank's weights.
"""

import grpo_actors  # noqa: F401 - loads the fast BLAS, which must come before MLX

# isort: split
import contextlib
import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
from hand_made import config, groups_of, learner

from grpo_actors.learner.following import _fingerprint, give_state, receive_state
from grpo_actors.learner.grpo import Grpo
from grpo_actors.learner.loading import load_model
from grpo_actors.learner.ranks import ranks_of
from grpo_actors.policy.model import load_policy
from grpo_actors.ranks.group import join
from grpo_actors.transport.links import LinkClosedError

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
    "nothing to learn": {},
    "float32 weights beside the model": {"model": {"dtype": "bfloat16"}, "weight_decay": 0.1},
    "adafactor": {"optimizer": "adafactor"},
    "lion": {"optimizer": "lion", "model": LORA},
    "divided gradient": {
        "divide_gradient": True,
        "kl_coeff": 0.1,
        "num_iterations": 2,
    },
    # All ranks add up as often, also those without a micro-batch.
    "divided gradient of three micro-batches": {"divide_gradient": True, "model": LORA},
    "divided gradient of nothing": {"divide_gradient": True},
    "divided gradient, bfloat16": {
        "divide_gradient": True,
        "model": {"dtype": "bfloat16"},
        "weight_decay": 0.1,
    },
    "divided model": {"model": LORA, "divide_model": True, "kl_coeff": 0.1, "num_iterations": 2},
    "divided model, quantised": {
        "model": LORA | {"base_bits": 4, "lora_keys": ["self_attn.o_proj", "mlp.up_proj"]},
        "divide_model": True,
    },
    "muon": {"optimizer": "muon"},
}
#: Two completions of each prompt.
REWARDS = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.5], [0.0, 3.0]]
#: Groups that have something to teach, where these are not all.
TAUGHT = {
    "nothing to learn": 0,
    "divided gradient of nothing": 0,
    "divided gradient of three micro-batches": 3,
}
#: The cases in which the group continues what one process has begun.
RESUMED = (
    "every term",
    "float32 weights beside the model",
    "muon",
    "divided model",
    "divided model, quantised",
)


def main() -> None:
    group = join()
    # An adapter changes nothing at first, so all cases train on the same samples.
    sampled = [] if group.rank else groups_of(load_policy(config().model, seed=0), REWARDS)
    for name, case in CASES.items():
        if name == "divided model, quantised" and group.size > 2:
            continue  # the embedded model's rows of 128 numbers are two packed groups
        settings = USUAL | case
        alone, together = (config(learning_rate=RATE, ranks=count, **settings) for count in (1, group.size))
        ranks = ranks_of(together, group)
        policy = load(together, ranks.collectives)
        if ranks.rank:
            grpo = receive_state(ranks, together, policy)
            grpo.learn(ranks.next_share(grpo.training))
            assert not ranks.next_share(grpo.training).total, "it only gives its state meanwhile"
            group.ask(held(grpo))
            group.ask(_fingerprint(grpo.policy))
            continue
        solo, joined = learner(alone, load(alone, None)), Grpo(together, policy, 10, ranks=ranks)
        taught = TAUGHT.get(name, len(sampled))
        groups = sampled[:taught] + equally_rewarded(sampled[taught:])
        if name in RESUMED:
            solo.update(groups)
            joined.policy.load_trainable(solo.policy.trainable())
            joined.training.load_state(solo.training.state())
            if solo.reference is not None and solo.reference_refreshed:
                joined.restore_reference(dict(solo.reference))
            joined.version = solo.version
        give_state(joined)
        metrics = [grpo.update(groups) for grpo in (solo, joined)]
        states = [whole_state(grpo) for grpo in (solo, joined)]
        assert states[0].keys() == states[1].keys(), (name, sorted(states[0].keys() ^ states[1].keys())[:5])
        ranks.deal([])
        found = {
            "size": ranks.size,
            "gradient": difference(*map(moments, states)),
            "held": group.ask(held(joined)),
            "whole": held(solo),
            "weights": difference(*(grpo.policy.trainable() for grpo in (solo, joined))),
            "float32 weights": difference(*map(masters, states)),
            "metrics": metrics,
            "marks": group.ask(_fingerprint(joined.policy)),
        }
        print(json.dumps({"case": name} | found), flush=True)
    if not group.rank:
        group.close()
        return
    with contextlib.suppress(LinkClosedError):
        group.hear()  # a rank that leaves before rank 0 has closed is a lost one


def load(settings, group):
    """Load the model; an adapter on a divided one is not new, because then one of its matrices has no gradient."""
    policy = load_model(settings, group)
    if settings.learner.divide_model:
        arrays = sorted(policy.trainable().items())
        noise = [mx.random.normal(array.shape, key=mx.random.key(i)) for i, (_, array) in enumerate(arrays)]
        policy.load_trainable(
            {name: array + 0.05 * more for (name, array), more in zip(arrays, noise, strict=True)}
        )
    return policy


def whole_state(grpo):
    remote = {name: array.fetch() for name, array in grpo.ranks.remote_state().items()}
    return grpo.training.state() | remote


def moments(state):
    """Return the first moments of an optimizer's state, or what it has instead of them."""
    return {
        name: array
        for name, array in state.items()
        if name.startswith("optimizer.") and not name.endswith((".v", "step", "learning_rate"))
    }


def masters(state):
    return {name: array for name, array in state.items() if name.startswith("weights.")}


def held(grpo):
    """Return the number of elements of the training state that this rank holds."""
    return sum(array.size for array in grpo.training.state().values())


def equally_rewarded(groups):
    return [
        replace(group, completions=[replace(c, rewards={"hand": 1.0}) for c in group.completions])
        for group in groups
    ]


def difference(one, other) -> float:
    """Return the relative difference of two sets of arrays."""
    one, other = (
        np.concatenate(
            [np.zeros(1), *(np.array(a.astype(mx.float32)).ravel() for _, a in sorted(arrays.items()))]
        )
        for arrays in (one, other)
    )
    return (
        float(np.linalg.norm(one - other) / np.linalg.norm(one))
        if one.any()
        else float(np.linalg.norm(other))
    )


if __name__ == "__main__":
    main()
