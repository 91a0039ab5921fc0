"""The time below which a piece of work can not be done: bytes over bandwidth, products over their rate.

Knows sizes and rates; refuses to know how anything is computed. Each floor is that of a plain dense pass
over every token; a mixture of experts, of which a token sees a few, may stay below it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does at best."""

    #: Read and written bytes both counted.
    copy_bytes_per_s: float
    #: Of a large product in the model's type.
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A model as far as floors need it."""

    #: Read at every step of decoding.
    weight_bytes: int
    #: Parameters of matrices that a token is multiplied with: the output head among them, a mere look-up not.
    multiplying: int
    #: Keys and values of one token, in all layers.
    cache_bytes: int
    #: Layers × heads × size of a head; 0: its configuration does not tell.
    attention_width: int
    #: Of its floats.
    dtype: str


@dataclass(frozen=True, slots=True)
class RolloutFloor:
    """Seconds of one batch of completions."""

    prefill_s: float
    decode_s: float
    #: Fewest steps in which the completions fit their places.
    steps: int


def rollout_floor(
    size: ModelSize,
    rates: Rates,
    prompts: Sequence[int],
    completions: Sequence[Sequence[int]],
    places: int,
) -> RolloutFloor:
    """Each prompt runs through the model once; each step reads the weights once, and each row its own past.

    Args:
        size: Of the model.
        rates: Of the machine.
        prompts: P lengths, in tokens.
        completions: P lists of lengths, of the completions of each prompt.
        places: Completions decoded side by side, at most.
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
    """One pass forward and one backward over whole sequences, prompts included in each.

    Backward costs twice forward: the gradients of inputs and of weights. A frozen matrix under an adapter has
    none of its own: 4 instead of 6 operations a parameter and token. Attention has inputs only, and costs 3 times
    forward either way.

    Args:
        size: Of the model.
        rates: Of the machine.
        sequences: Lengths in tokens, prompt and completion.
        adapter: Whether only an adapter trains.
    """
    factor = 4 if adapter else 6
    flops = sum(factor * size.multiplying * length + 3 * _causal(size, length) for length in sequences)
    return flops / rates.flops_per_s


def publication_floor_s(size_bytes: int, copy_bytes_per_s: float, fetchers: int, *, chunks: bool) -> float:
    """Copies of a version: one out of the learner, one into each worker, two more where a socket lies between."""
    copies = 1 + (3 if chunks else 1) * fetchers
    return copies * 2 * size_bytes / copy_bytes_per_s


def _causal(size: ModelSize, length: int) -> int:
    """Operations of attention over a whole sequence, forward: each token sees half of it on average."""
    return 2 * size.attention_width * length**2
