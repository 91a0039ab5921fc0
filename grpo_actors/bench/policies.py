"""The policies that are timed: as a worker loads them, their size, and with completions that end when they shall."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from grpo_actors.bench.floors import ModelSize
from grpo_actors.config import Config
from grpo_actors.policy.model import DTYPES, Policy, load_policy
from grpo_actors.supervisor.memory_plan import read_tensors


@dataclass(eq=False)
class PlannedPolicy(Policy):
    """A policy whose completions end at given lengths, whatever they say.

    The stop test is the one thing that sampling asks the host about each token; here it compares a length
    instead of a token id. Lengths go out in the order in which completions show their first token.
    """

    #: Of the completions to come.
    planned: deque[int] = field(default_factory=deque)
    #: By the identity of the completion's list of tokens, which lives as long as it is asked about.
    _ending: dict[int, int] = field(default_factory=dict)

    def ends(self, tokens: list[int], stop: Sequence[str]) -> bool:
        """Whether the completion has the length that is meant for it."""
        del stop
        if len(tokens) == 1:
            self._ending[id(tokens)] = self.planned.popleft()
        return len(tokens) == self._ending[id(tokens)]


def planned(policy: Policy) -> PlannedPolicy:
    """The same policy, for `plan` to be told to."""
    return PlannedPolicy(**{each.name: getattr(policy, each.name) for each in fields(policy)})


def plan(policy: PlannedPolicy, lengths: Iterable[int]) -> None:
    """The next completions have these lengths."""
    policy.planned = deque(lengths)


def rollout_policy(config: Config) -> Policy:
    """As a worker holds it."""
    policy = load_policy(config.model, seed=config.run.seed)
    if config.rollout.quantize_for_rollouts:
        policy.quantize(config.rollout.rollout_bits)
    return policy


def vocabulary(policy: Policy) -> int:
    """Token ids that the model takes; its tokenizer may know fewer."""
    return int(policy.architecture.get("vocab_size") or len(policy.tokenizer.get_vocab()))


def dtype_of(policy: Policy) -> mx.Dtype:
    """Of what is multiplied, which a quantised matrix becomes first."""
    dtypes = [array.dtype for _, array in tree_flatten(policy.model.parameters())]
    dtype: mx.Dtype = next(dtype for dtype in dtypes if mx.issubdtype(dtype, mx.floating))
    return dtype


def size_of(policy: Policy) -> ModelSize:
    """What floors need of a loaded model; its files say how many parameters are packed in its integers."""
    arrays = tree_flatten(policy.model.parameters())
    looked_up = _is_looked_up(name for name, _ in arrays)
    tensors = read_tensors(policy.source, policy.architecture.get("quantization", {}))
    return ModelSize(
        weight_bytes=sum(array.nbytes for name, array in arrays if not looked_up(name)),
        multiplying=sum(
            tensor.size for tensor in tensors if len(tensor.shape) > 1 and not looked_up(tensor.name)
        ),
        cache_bytes=_cache_bytes(policy.model),
        attention_width=_attention_width(policy.architecture),
        dtype=next(name for name, dtype in DTYPES.items() if dtype == dtype_of(policy)),
    )


def _is_looked_up(names: Iterable[str]) -> Any:
    """Tells, by name, the embedding of a model that has an output head of its own."""
    untied = any("lm_head." in name for name in names)
    return lambda name: untied and "embed_tokens." in name


def _cache_bytes(model: Any) -> int:
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[1]]), cache=cache))
    held = (array for layer in cache for _, array in tree_flatten(layer.state))
    # [1, heads, columns, size of a head]: room for many columns is made at once.
    return sum(a.nbytes // a.shape[2] for a in held if isinstance(a, mx.array) and a.ndim == 4)


def _attention_width(architecture: dict[str, Any]) -> int:
    try:
        heads = architecture["num_attention_heads"]
        size = architecture.get("head_dim") or architecture["hidden_size"] // heads
        return int(architecture["num_hidden_layers"] * heads * size)
    except KeyError:
        return 0
