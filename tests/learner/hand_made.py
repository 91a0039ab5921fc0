"""Groups of completions sampled by the embedded model, with rewards chosen by the test."""

from dataclasses import replace
from hashlib import blake2b

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from grpo_actors.config import OWNER, Config
from grpo_actors.learner.groups import SampledCompletion, SampledGroup
from grpo_actors.learner.grpo import Grpo
from grpo_actors.policy.decoding.sampling import SamplingParams, sample_groups
from grpo_actors.policy.logprobs import completion_logprobs
from grpo_actors.policy.model import load_policy
from grpo_actors.rundir.checkpoints import Snapshot
from grpo_actors.schedule.lease import Cursor
from grpo_actors.tasks.task import Problem

QUESTIONS = ["What is 12 + 34?", "7", "Tom has 21 apples and buys 3 bags of 14. How many has he?", "5 + 5?"]
REWARDS = [[1.0, 0.0, 0.0, 2.0], [0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 3.0]]
MAX_NEW = 24
#: What was sampled for what: most tests begin with the same model, and sampling takes longer than an update.
_SAMPLED = {}


def config(*, model=None, run=None, temperature=1.0, **settings):
    """Return a configuration; `settings` are those of the sections below, without the section name."""
    sections = {"learner": {}, "objective": {}, "rollout": {}, "metrics": {}}
    for leaf, value in settings.items():
        sections[OWNER[leaf]][leaf] = value
    return Config.model_validate(
        {
            "run": run or {},
            "model": {"dtype": "float32"} | (model or {}),
            "reward": {"functions": {"hand": 1.0}},
            "metrics": sections["metrics"],
            "rollout": {"num_generations": 4, "max_new_tokens": MAX_NEW, "temperature": temperature}
            | sections["rollout"],
            "learner": {
                "learning_rate": 1e-3,
                "batch_size": 4,
                "gradient_accumulation_steps": 1,
                "warmup_ratio": 0.0,
                "max_grad_norm": 0.0,
            }
            | sections["learner"],
            "objective": sections["objective"],
        }
    )


def learner(settings, policy=None, *, total=10):
    return Grpo(settings, policy or load_policy(settings.model, seed=settings.run.seed), total)


def sampled(policy, prompts, seeds, params):
    """Sample, or return what the same weights have sampled before in this process."""
    parameters = tree_flatten(policy.model.parameters())
    if any(name.endswith("lora_b") and mx.any(array).item() for name, array in parameters):
        return sample_groups(policy, prompts, seeds, params)  # a trained adapter has a scale, too
    weights = blake2b()
    for name, array in parameters:
        weights.update(f"{name} {array.dtype} {array.shape}".encode())
        weights.update(np.array(array.view(mx.uint8)).tobytes())
    key = (type(policy.model), weights.digest(), str((prompts, seeds, params)))
    if key not in _SAMPLED:
        _SAMPLED[key] = sample_groups(policy, prompts, seeds, params)
    return _SAMPLED[key]


def groups_of(policy, rewards=REWARDS, temperature=1.0, questions=QUESTIONS):
    """Sample one group from the policy for each row of `rewards`, and give its completions these rewards."""
    prompts = [policy.chat.encode([{"role": "user", "content": text}]) for text in questions[: len(rewards)]]
    seeds = [[10 * i + k for k in range(len(row))] for i, row in enumerate(rewards)]
    of_prompts = sampled(policy, prompts, seeds, SamplingParams(MAX_NEW, temperature))
    return [
        SampledGroup(
            lease=i,
            epoch=0,
            problem=Problem(f"p{i}", ({"role": "user", "content": questions[i]},), "46", {}),
            prompt=prompts[i],
            worker="w",
            completions=[
                SampledCompletion(
                    list(s.tokens), list(s.logprobs), [0] * len(s.tokens), s.finished, {"hand": reward}
                )
                for s, reward in zip(samples, row, strict=True)
            ],
        )
        for i, (samples, row) in enumerate(zip(of_prompts, rewards, strict=True))
    ]


def weights(grpo):
    return {name: np.array(array) for name, array in grpo.policy.trainable().items()}


def assert_same_weights(a, b):
    for name, array in a.items():
        np.testing.assert_array_equal(array, b[name], err_msg=name)


def logprobs_under(policy, group, completion):
    values, _ = completion_logprobs(
        policy.model,
        mx.array([[*group.prompt, *completion.tokens]]),
        mx.array([len(group.prompt) - 1]),
        mx.array([completion.tokens]),
        1.0,
    )
    return np.array(values)[0]


def changed(groups, group, index, **changes):
    """Return the groups with one completion changed."""
    result = list(groups)
    completions = list(result[group].completions)
    completions[index] = replace(completions[index], **changes)
    result[group] = replace(result[group], completions=completions)
    return result


class RecordList:
    """Keeps records in memory; each record's fields follow its topic."""

    def __init__(self):
        self.records = []

    def record(self, topic, **fields):
        self.records.append((topic, fields))

    def snapshot(self):
        return Snapshot(Cursor(), len(self.records))

    def updates(self, topic):
        return [fields["update"] for name, fields in self.records if name == topic]
