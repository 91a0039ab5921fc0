"""Draw one token and its log-prob from every row of logits; the sampling parameters and the random numbers.

The random numbers are drawn on the host before the first step: one uniform per token, from a generator per sample (Philox
keyed by the sample's seed). The same seed gives the same draws on every back end, in every batch and at every attempt, and
MLX's global random state is never used.

A token is drawn by inverting the cumulative distribution rather than by the Gumbel trick. The exponentials are then shared
with the log-prob, and on a CPU the exponential takes most of the time. The sums are taken in two levels, over blocks and
within one block, because on a GPU a scan over the whole vocabulary would take most of the time.

The recorded log-prob is that of the policy at the sampling temperature, before top-p, top-k, min-p and the repetition
penalty, because the learner can compute that one again. With such a filter, tokens come from a narrower distribution than
the one recorded, and the importance ratio does not correct for it: its denominator is too small by the share of
probability that was filtered out. `SamplingParams.bias` is the sentence that informs the user.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


#: Tokens per block of the vocabulary.
BLOCK = 128


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters, with the names that inference engines use."""

    max_new_tokens: int
    #: 0: greedy; log-probs are then those at temperature 1.
    temperature: float = 1.0
    top_p: float = 1.0
    #: 0: off.
    top_k: int = 0
    min_p: float = 0.0
    #: Divides positive and multiplies negative logits of every token seen in prompt or completion.
    repetition_penalty: float = 1.0
    #: Strings that end a completion once its text contains them.
    stop: tuple[str, ...] = ()
    #: Most tokens of thinking in a turn, after which the closing tag is inserted. 0: no bound.
    think_tokens: int = 0
    #: Bounds the completions of one batch: rows × (longest prompt + max_new_tokens). 0: no bound.
    max_kv_tokens: int = 0
    #: Bits of a number of the cached keys and values, 8 or 4. 0: they are cached as computed.
    kv_bits: int = 0
    #: On CUDA: compile the step, which takes some seconds at first.
    compiled: bool = True

    @property
    def filters(self) -> bool:
        """Whether a filter can exclude tokens."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def bias(self) -> str | None:
        """The reason why the sampled distribution differs from the recorded one, as text; None if it does not."""
        names = ("top_p", "top_k", "min_p", "repetition_penalty")
        off = SamplingParams(self.max_new_tokens)
        used = [
            f"{name} = {getattr(self, name)}" for name in names if getattr(self, name) != getattr(off, name)
        ]
        if not used:
            return None
        return (
            f"{', '.join(used)}: completions come from a narrower distribution than the policy's, "
            "which the importance ratios do not correct"
        )


@dataclass(slots=True)
class Sample:
    """One completion: ids, log-probs and versions of equal length, the stop token of each turn included."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    #: Version of the weights that sampled each token, as numbered by the policy's owner.
    versions: list[int] = field(default_factory=list)
    #: True if a stop token or string ended the completion, False if it was cut at max_new_tokens.
    finished: bool = False
    #: Bounds [start, stop, start, stop, …] of the environment spans: the tokens that an environment inserted between two
    #: turns. Their log-probs are 0.
    spans: list[int] = field(default_factory=list)
    #: Bounds of the closing tags of thinking that were inserted, likewise; their log-probs are 0 too.
    forced: list[int] = field(default_factory=list)
    #: The messages in those spans; one more if the last message did not fit.
    replies: list[dict[str, str]] = field(default_factory=list)
    #: Error of the environment, as text; None if there was none.
    failure: str | None = None

    @property
    def sampled(self) -> int:
        """Number of tokens that the policy sampled."""
        bounds = self.spans + self.forced
        return len(self.tokens) - sum(bounds[1::2]) + sum(bounds[::2])

    @property
    def turn_start(self) -> int:
        """Index of the first token of the last turn."""
        return self.spans[-1] if self.spans else 0

    @property
    def turn(self) -> list[int]:
        """The tokens of the last turn."""
        return self.tokens[self.turn_start :] if self.spans else self.tokens

    def append(self, token: int, logprob: float, version: int) -> None:
        """Append one token."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)


#: Called at the end of each turn; returns the tokens, at least one, to insert before the next turn, or None if the turn
#: was the last.
Respond = Callable[[Sample], Sequence[int] | None]


def draws(seed: int, count: int) -> Array:
    """Return `count` float32 uniforms in [0, 1) for one sample; they depend on its seed only."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count, dtype=np.float32)


def draw(
    logits: mx.array, uniform: mx.array, params: SamplingParams, seen: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Draw one token for each row, and return it with its log-prob.

    Args:
        logits: [R, V], any float type.
        uniform: [R] in [0, 1).
        params: Temperature and filters.
        seen: [R, V] bool, tokens under the repetition penalty; None if there is no penalty.

    Returns:
        Token ids [R] (uint32) and log-probs [R] (float32).
    """
    wide = logits.astype(mx.float32)
    scaled = wide / params.temperature if params.temperature > 0 else wide
    top = scaled.max(axis=-1, keepdims=True)
    blocks = _blocks(mx.exp(scaled - top))  # unnormalised probabilities; the largest is 1
    sums = blocks.sum(axis=-1)
    log_total = mx.log(sums.sum(axis=-1)) + top[:, 0]
    if seen is not None or params.filters:
        chosen_from = scaled if seen is None else _penalised(scaled, seen, params.repetition_penalty)
        weights = mx.exp(chosen_from - chosen_from.max(axis=-1, keepdims=True))
        blocks = _blocks(_filter(weights, params) if params.filters else weights)
        sums = blocks.sum(axis=-1)
    if params.temperature == 0:
        token = mx.argmax(blocks.reshape(len(blocks), -1), axis=-1)
    else:
        token = _invert(blocks, sums, uniform)
    chosen = mx.take_along_axis(scaled, token[:, None], axis=-1)[:, 0]
    return token, chosen - log_total


def _blocks(weights: mx.array) -> mx.array:
    """Divide weights [R, V] into blocks [R, B, BLOCK], padded with zeros."""
    missing = -weights.shape[1] % BLOCK
    if missing:
        weights = mx.pad(weights, [(0, 0), (0, missing)])
    return weights.reshape(len(weights), -1, BLOCK)


def _invert(blocks: mx.array, sums: mx.array, uniform: mx.array) -> mx.array:
    """Return for each row [R] the first token at which the cumulative weight exceeds the share `uniform` of the total.

    Args:
        blocks: [R, B, BLOCK] weights.
        sums: [R, B], the sum of each block.
        uniform: [R] in [0, 1).
    """
    cumulative = mx.cumsum(sums, axis=-1)
    wanted = uniform * cumulative[:, -1]
    block = _first(cumulative > wanted[:, None], sums)
    before = mx.take_along_axis(cumulative - sums, block[:, None], axis=-1)
    within = mx.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    token = _first(mx.cumsum(within, axis=-1) > wanted[:, None] - before, within)
    return block * BLOCK + token


def _first(reached: mx.array, weights: mx.array) -> mx.array:
    """Return for each row [R] the first index at which `reached` [R, n] is true and the weight is not zero.

    A parallel scan need not be monotone in its last bit. So an entry without weight must never win, and the largest weight
    is taken if none is reached.
    """
    heaviest = weights.max(axis=-1, keepdims=True)
    return mx.argmax(mx.where(reached & (weights > 0), 2 * heaviest, weights), axis=-1)


def _penalised(scaled: mx.array, seen: mx.array, penalty: float) -> mx.array:
    """Return logits [R, V] with the penalty applied to the tokens in `seen`."""
    return mx.where(seen, mx.where(scaled > 0, scaled / penalty, scaled * penalty), scaled)


def _filter(weights: mx.array, params: SamplingParams) -> mx.array:
    """Zero the weight [R, V] of tokens outside top-k, of the rest those outside top-p, then those outside min-p.

    The best token always stays. Order and meaning are those of the warpers in transformers; vLLM applies min-p first.
    """
    top = weights.max(axis=-1, keepdims=True)
    if params.top_k > 0 or params.top_p < 1:
        order = mx.argsort(weights, axis=-1)[:, -params.top_k :]
        ranked = mx.take_along_axis(weights, order, axis=-1)
        # The rarest first: a float32 sum that begins with the likeliest loses much of what 150,000 rare tokens add.
        tail = mx.cumsum(ranked, axis=-1)
        is_best = mx.arange(ranked.shape[-1]) == ranked.shape[-1] - 1
        inside = is_best | (tail > (1 - params.top_p) * ranked.sum(axis=-1, keepdims=True))
        weights = mx.put_along_axis(mx.zeros_like(weights), order, mx.where(inside, ranked, 0), axis=-1)
    return mx.where(weights >= params.min_p * top, weights, 0)
