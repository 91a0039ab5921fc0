"""One rank of a model of every family that can be divided; rank 0 compares it with the whole model.

It prints a line of JSON for each family: the deviation of the logits, before and after other weights were loaded, and the
relative difference of the gradient of an adapter.
"""

import grpo_actors  # noqa: F401 - loads the fast BLAS, which must come before MLX

# isort: split
import json
import sys

import mlx.core as mx
from architectures import random_policy
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from grpo_actors.config import ModelConfig
from grpo_actors.policy.adapter import add_adapter
from grpo_actors.policy.architectures import DIVISIBLE_TO_TRAIN
from grpo_actors.policy.model import deviation, whole_texts
from grpo_actors.policy.sharding import Sharding, partial_gradients

TEXT = mx.array([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
TARGETS = mx.array([[2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5]])


def main() -> None:
    group = mx.distributed.init(strict=True)
    for family in sys.argv[1:]:
        policy, divided = random_policy(family), random_policy(family)
        model, parts = policy.model, divided.model
        whole = dict(tree_flatten(model.parameters()))
        other = {
            name: 1.5 * array if mx.issubdtype(array.dtype, mx.floating) else array
            for name, array in whole.items()
        }
        logits = [model(TEXT), with_weights(model, other)]
        model.update(tree_unflatten(list(whole.items())))
        divided.sharding = Sharding(parts, group)
        found = {"logits": deviation(parts(TEXT), logits[0])}
        own = divided.sharding.own(whole)
        found["other weights"] = deviation(with_weights(parts, divided.sharding.own(other)), logits[1])
        parts.update(tree_unflatten(list(own.items())))
        if family in DIVISIBLE_TO_TRAIN:
            keys = fitting(model, divided.sharding)
            alone, together = (gradient(each, keys) for each in (model, parts))
            part = partial_gradients(parts)
            together = {
                name: mx.distributed.all_sum(array, group=group) if name in part else array
                for name, array in together.items()
            }
            found["gradient"] = difference(alone, together)
        if group.rank() == 0:
            print(json.dumps({"case": family} | found), flush=True)


def with_weights(model, arrays):
    model.update(tree_unflatten(list(arrays.items())))
    logits = model(TEXT)
    mx.eval(logits)
    return logits


def fitting(model, sharding):
    """Return the names of the linear modules in the layers on which an adapter is possible."""
    names = {
        key
        for layer in model.layers
        for key, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    return sorted(key for key in names if not any(unfit.endswith(key) for unfit in sharding.unfit))


def gradient(model, keys):
    config = ModelConfig(fine_tune_type="lora", lora_rank=4, lora_scale=2.0, lora_keys=tuple(keys))
    add_adapter(model, config, seed=0)
    arrays = sorted(tree_flatten(model.trainable_parameters()))
    noise = [mx.random.normal(array.shape, key=mx.random.key(i)) for i, (_, array) in enumerate(arrays)]
    model.update(
        tree_unflatten(
            [(name, array + 0.1 * more) for (name, array), more in zip(arrays, noise, strict=True)]
        )
    )
    model.train()

    def loss(model):
        return nn.losses.cross_entropy(whole_texts(model, TEXT), TARGETS).mean()

    gradients = dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))
    mx.eval(gradients)
    return gradients


def difference(one, other):
    assert one.keys() == other.keys()
    squares = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return (squares / max(sum(float(array.square().sum()) for array in one.values()), 1e-30)) ** 0.5


if __name__ == "__main__":
    main()
