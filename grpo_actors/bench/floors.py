"""Lower bounds on the time of a piece of work: bytes over bandwidth, products over their rate.

Depends on sizes and rates only, not on how anything is computed. Each floor is that of a plain dense pass over every
token; a mixture of experts, where a token uses only some of the experts, may take less.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, slots=True)
class Rates:
    """The best rates of a machine."""

    #: Rate of a copy; read and written bytes both count.
    copy_bytes_per_s: float
    #: Rate of a large matrix product in the model's type.
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The sizes of a model that floors depend on."""

    #: Bytes of weights that every decoding step reads.
    weight_bytes: int
    #: Parameters of the matrices that multiply a token: including the output head, without an embedding look-up.
    multiplying: int
    #: Bytes of keys and values of one token, in all layers.
    cache_bytes: int
    #: Layers × heads × size of a head; 0 if the model's configuration does not state them.
    attention_width: int
    #: Name of the type of its floats.
    dtype: str


@dataclass(frozen=True, slots=True)
class RolloutFloor:
    """Lower bounds for one batch of completions."""

    prefill_s: float
    decode_s: float
    #: Fewest decoding steps in which the batch's rows can produce all completions.
    steps: int


def rollout_floor(
    size: ModelSize,
    rates: Rates,
    prompts: Sequence[int],
    completions: Sequence[Sequence[int]],
    places: int,
) -> RolloutFloor:
    """Return the floor of sampling a batch.

    Each prompt passes through the model once. Each step reads the weights once, and the past keys and values of each
    row once.

    Args:
        size: Sizes of the model.
        rates: Rates of the machine.
        prompts: Lengths of the P prompts, in tokens.
        completions: For each of the P prompts, the lengths of its completions.
        places: Most completions decoded at the same time.
    """
    lengths = [length for group in completions for length in group]
    tokens = sum(lengths)
    steps = max(*lengths, ceil(tokens / places)) if len(lengths) > 1 else lengths[0]
    # The n-th token of a completion sees its prompt and n tokens.
    seen = sum(
        length * prompt + length * (length + 1) // 2
        for prompt, group in zip(prompts, completions, strict=True)
        for length in group
    )
    read_bytes = steps * size.weight_bytes + seen * size.cache_bytes
    flops = 2 * size.multiplying * tokens + 4 * size.attention_width * seen
    prefill = sum(2 * size.multiplying * length + _causal(size, length) for length in prompts)
    return RolloutFloor(
        prefill / rates.flops_per_s,
        max(read_bytes / rates.copy_bytes_per_s, flops / rates.flops_per_s),
        steps,
    )


def update_floor_s(size: ModelSize, rates: Rates, sequences: Sequence[int], *, adapter: bool) -> float:
    """Return the floor of one forward and one backward pass over whole sequences, each with its prompt.

    The backward pass costs twice the forward pass: gradients of inputs and of weights. A frozen matrix under an
    adapter needs no gradient of its weights, so it costs 4 instead of 6 operations a parameter and token. Attention
    has no weights: both passes together always cost 3 times its forward pass.

    Args:
        size: Sizes of the model.
        rates: Rates of the machine.
        sequences: Lengths of prompt plus completion, in tokens.
        adapter: Whether only an adapter trains.
    """
    factor = 4 if adapter else 6
    flops = sum(factor * size.multiplying * length + 3 * _causal(size, length) for length in sequences)
    return flops / rates.flops_per_s


def publication_floor_s(size_bytes: int, copy_bytes_per_s: float, fetchers: int, *, chunks: bool) -> float:
    """Return the floor of copying a version: once out of the learner and once into each worker.

    The way over a socket costs two more copies, for all workers of a host together.
    """
    copies = 1 + (2 if chunks else 0) + fetchers
    return copies * 2 * size_bytes / copy_bytes_per_s


def _causal(size: ModelSize, length: int) -> int:
    """Return the operations of attention in a forward pass: each token attends to half of the sequence on average."""
    return 2 * size.attention_width * length**2
