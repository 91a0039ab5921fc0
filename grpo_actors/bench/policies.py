"""The measured policies: loaded as a worker loads them, with their sizes, and with completions of planned lengths."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import count
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from grpo_actors.bench.floors import ModelSize
from grpo_actors.config import Config
from grpo_actors.policy.model import DTYPES, Policy, load_policy
from grpo_actors.supervisor.model_files import read_tensors


@dataclass(eq=False)
class PlannedPolicy(Policy):
    """A policy whose completions end at planned lengths, independent of their tokens.

    The stop test is the only work that sampling does on the host for each token; here it compares a length instead
    of a token id. Completions get the lengths in the order in which their first tokens appear. A learner takes only
    completions that end with their first stop token, so the last token becomes one, and an earlier one another token;
    what the model computes does not change.
    """

    #: Lengths of the completions to come.
    planned: Iterator[int] = field(default_factory=lambda: iter(()))
    #: Planned length by the id of the completion's list of tokens, which exists until its last stop test.
    _ending: dict[int, int] = field(default_factory=dict)

    def ends(self, tokens: list[int], stop: Sequence[str]) -> bool:
        """Return whether the completion has its planned length."""
        del stop
        if len(tokens) == 1:
            self._ending[id(tokens)] = next(self.planned)
        if len(tokens) == self._ending[id(tokens)]:
            tokens[-1] = min(self.stop_tokens)
            return True
        if tokens[-1] in self.stop_tokens:
            tokens[-1] = next(token for token in count() if token not in self.stop_tokens)
        return False


def planned(policy: Policy) -> PlannedPolicy:
    """Return the same policy as a `PlannedPolicy`; `plan` sets its lengths."""
    return PlannedPolicy(**{each.name: getattr(policy, each.name) for each in fields(policy)})


def plan(policy: PlannedPolicy, lengths: Iterable[int]) -> None:
    """Set the lengths of the next completions."""
    policy.planned = iter(lengths)


def rollout_policy(config: Config) -> Policy:
    """Load the policy as a worker does, quantised if the settings say so."""
    policy = load_policy(config.model, seed=config.run.seed)
    if config.rollout.quantize_for_rollouts:
        policy.quantize(config.rollout.rollout_bits)
    return policy


def dtype_of(policy: Policy) -> mx.Dtype:
    """Return the type of the model's matrix products; a quantised matrix is unpacked to it first."""
    dtypes = [array.dtype for _, array in tree_flatten(policy.model.parameters())]
    dtype: mx.Dtype = next(dtype for dtype in dtypes if mx.issubdtype(dtype, mx.floating))
    return dtype


def size_of(policy: Policy) -> ModelSize:
    """Return the sizes of a loaded model for floors.

    The parameter count comes from the model's files, because quantised weights pack several into one integer.
    """
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
    """Return a test by name for an embedding that is only looked up: the model has a separate output head."""
    untied = any("lm_head." in name for name in names)
    return lambda name: untied and "embed_tokens." in name


def _cache_bytes(model: Any) -> int:
    cache = make_prompt_cache(model)
    model(mx.array([[1]]), cache=cache)  # nothing is computed: a shape needs no values
    arrays = (array for layer in cache for _, array in tree_flatten(layer.state))
    # [1, heads, columns, size of a head]: the cache allocates many columns at once.
    return sum(a.nbytes // a.shape[2] for a in arrays if isinstance(a, mx.array) and a.ndim == 4)


def _attention_width(architecture: dict[str, Any]) -> int:
    try:
        heads = architecture["num_attention_heads"]
        size = architecture.get("head_dim") or architecture["hidden_size"] // heads
        return int(architecture["num_hidden_layers"] * heads * size)
    except KeyError:
        return 0
