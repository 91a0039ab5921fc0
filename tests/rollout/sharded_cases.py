"""One rank of a worker whose model is divided; rank 0 samples each of `CASES` with the others, and alone.

It prints a line of JSON for each case: whether all tokens are the same, how many there are, and the largest difference of
a token's log-prob.
"""

import grpo_actors  # noqa: F401 - loads the fast BLAS, which must come before MLX

# isort: split
import contextlib
import json
from functools import partial

import mlx.core as mx
from mlx.utils import tree_flatten

from grpo_actors.config import Config
from grpo_actors.policy.model import load_policy
from grpo_actors.ranks.group import join
from grpo_actors.rollout.following import Follower
from grpo_actors.rollout.leading import LeadingSampler, load_together
from grpo_actors.rollout.lease_sampler import LeaseSampler
from grpo_actors.rollout.worker import sampling_params
from grpo_actors.transport.links import LinkClosedError
from grpo_actors.wire.messages import Lease, ints

LORA = {"fine_tune_type": "lora", "lora_rank": 4, "lora_scale": 2.0}
CASES = {
    "new weights between two tokens": {"rollout": {"in_flight_updates": True, "max_staleness": 1}},
    "an environment": {"rollout": {"stop": ["e", "t", "a", " ", "1", "2"]}},
    "nearly greedy, with filters": {
        "rollout": {"temperature": 0.01, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1}
    },
    "adapter": {"model": LORA},
    "adapter on a quantised base, cached in 8 bits": {
        "model": LORA | {"base_bits": 4},
        "rollout": {"kv_bits": 8},
    },
}
#: As the tokenizer of the embedded model gives them; of different lengths.
PROMPTS = [[20, 31, 42, 53], [60, 61, 62, 63, 64, 65, 66], [99, 98]]


def settings(case) -> Config:
    rollout = {"num_generations": 2, "max_new_tokens": 12, "batch_groups": 4} | case.get("rollout", {})
    return Config.model_validate(
        {
            "model": {"dtype": "float32"} | case.get("model", {}),
            "data": {"task": "arithmetic"},
            "reward": {"functions": {"correctness": 1.0}},
            "rollout": rollout,
        }
    )


def lease(number, prompt) -> Lease:
    return Lease(
        lease=number,
        attempt=0,
        token=0,
        min_version=0,
        problem_id="p",
        prompt=ints(prompt),
        seeds=[2**63 + 100 * number + i for i in range(2)],
        messages=[],
        answer="",
        columns="{}",
    )


def moved(arrays, size):
    """Return other values of trained arrays, the same at each call."""
    return {
        name: array + size * mx.random.normal(array.shape, key=mx.random.key(i)).astype(array.dtype)
        for i, (name, array) in enumerate(sorted(arrays.items()))
    }


def held_bytes(policy):
    return sum(array.nbytes for _, array in tree_flatten(policy.model.parameters()))


def sampled(policy, config, make, weights, *, in_flight=False, replies=False):
    """Sample the prompts; with `in_flight`, the second version of the weights comes between two steps."""
    asked = []

    def respond(sample):
        asked.append(len(sample.tokens))
        return [70, 71, 72] if len(asked) % 2 else None

    sampler = make(policy, config, sampling_params(config), lambda _: respond if replies else None)
    sampler.adopt(1, weights[0])
    sampler.begin([lease(i, prompt) for i, prompt in enumerate(PROMPTS)], 1)
    samples = {number: held.samples for number, held in sampler.leases.items()}
    steps = 0
    while sampler.leases:
        sampler.drop([held.lease.lease for held in sampler.step()[1]])
        steps += 1
        if in_flight and steps == 4:
            sampler.adopt(2, weights[1])
    return [sample for number in samples for sample in samples[number]]


def main() -> None:
    group = join()
    if group.rank:
        follower = Follower(group)
        with contextlib.suppress(LinkClosedError):
            while True:
                follower.turn()
        return
    for name, case in CASES.items():
        config = settings(case)
        whole = load_policy(config.model, seed=0)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        divided = load_together(group, config)
        peak = mx.get_peak_memory() - before
        mismatch = whole.identity.mismatch(divided.identity)
        weights = [moved(whole.trainable(), 0.05), moved(whole.trainable(), 0.1)]
        options = {"in_flight": "between" in name, "replies": "environment" in name}
        alone = sampled(whole, config, LeaseSampler, weights, **options)
        together = sampled(divided, config, partial(LeadingSampler, group), weights, **options)
        gaps = [
            abs(a - b)
            for one, other in zip(alone, together, strict=True)
            for a, b in zip(one.logprobs, other.logprobs, strict=False)
        ]
        found = {
            "same": [s.tokens for s in alone] == [s.tokens for s in together],
            "versions": sorted({v for s in together for v in s.versions}),
            "replies": sum(len(s.spans) for s in together),
            "tokens": len(gaps),
            "gap": max(gaps),
            "identity": mismatch,
            "peak": peak - held_bytes(divided),
            "largest": max(array.nbytes for _, array in tree_flatten(whole.model.parameters())),
            "temperature": config.rollout.temperature,
        }
        print(json.dumps({"case": name} | found), flush=True)
    group.close()


if __name__ == "__main__":
    main()
