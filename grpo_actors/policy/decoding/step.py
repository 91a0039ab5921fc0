"""One step of decoding: tokens in, the next tokens and their log-probs out.

Ways that give the same. With MLX's own attention each row's columns of a `window` are masked; that is the way
of a CPU and of Metal. On CUDA a kernel reads each row's own columns (`slots`), so that every array keeps
its shape, and the whole step is compiled: at these sizes it is not the GPU that is slow, but telling it what to do.
There the models that `blocks` knows take half as many kernels, and the others their own layers. Models whose cache fits
neither go on with mlx-lm's (`fixed_batch`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache

from grpo_actors.errors import ConfigError
from grpo_actors.policy.decoding import attention, draw_kernel, slot_kernels
from grpo_actors.policy.decoding.blocks import Arrays, Blocks, blocks_of
from grpo_actors.policy.decoding.draw import SamplingParams, draw
from grpo_actors.policy.decoding.findings import findings
from grpo_actors.policy.decoding.fixed_batch import FixedBatch, prefill
from grpo_actors.policy.decoding.slots import SlotLayer, Slots
from grpo_actors.policy.decoding.window import Prompts, Window
from grpo_actors.policy.dora import has_dora
from grpo_actors.policy.model import Policy, same_logits

Cache = Window | Slots | FixedBatch
#: The blocks' arrays where there are blocks, tokens, lengths, cache -> logits [R, V].
SlotLogits = Callable[..., mx.array]
#: uniforms, and with a repetition penalty the tokens seen, then as `SlotLogits` -> token, log-prob.
SlotStep = Callable[..., tuple[mx.array, mx.array]]


class Decoder:
    """The steps of one policy with one set of parameters and the weights of this moment.

    What is compiled is kept with the policy's `findings`.
    """

    def __init__(self, policy: Policy, params: SamplingParams) -> None:
        self._policy = policy
        self._params = params
        #: Whether the rows of a batch have to begin together.
        self.together = not fits(policy)
        self._slot_step: SlotStep | None = None
        self._arrays: list[Arrays] = []
        if not self.together and _over_slots(policy):
            blocks = _blocks(policy)
            if blocks:
                self._arrays = [blocks.arrays(policy.model)]
                mx.async_eval(self._arrays)  # type: ignore[no-untyped-call]
            self._slot_step = _slot_step(policy, params, blocks)

    def forget_weights(self) -> None:
        """Hold no copy any more; another decoder takes the next step."""
        self._arrays = []

    @property
    def over_slots(self) -> bool:
        """Whether rows are slots: a free one costs next to nothing then, and another number of them a compilation."""
        return self._slot_step is not None

    def cache(self, rows: int) -> Cache:
        """An empty cache of so many rows."""
        if self.together:
            return FixedBatch([])
        if self.over_slots:
            return Slots(rows, self._params.max_new_tokens)
        return Window(self._policy.model, rows)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Prompts | FixedBatch:
        """Run prompts through the model, for rows of a cache; they are under way."""
        if self.together:
            return FixedBatch(prefill(self._policy.model, prompts))
        run = Prompts(self._policy.model, prompts, few_shapes=self.over_slots)
        # Not with a step: they serve several.
        mx.async_eval(run.stacked if self.over_slots else run.layers)  # type: ignore[no-untyped-call]
        return run

    def step(
        self, cache: Cache, tokens: mx.array, uniforms: mx.array, seen: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        """Decode one token of every row; the cache must have room.

        Args:
            cache: Made by `cache`; it is written, and moves on.
            tokens: [R], what each row is fed.
            uniforms: [R] in [0, 1).
            seen: [R, V] bool, with a repetition penalty.

        Returns:
            Tokens [R] and log-probs [R], under way.
        """
        if isinstance(cache, Slots):
            assert self._slot_step is not None
            state = (*self._arrays, tokens, mx.array(cache.lengths), cache.cache)
            token, logprob = self._slot_step(uniforms, seen, *state)
        else:
            layers: Any = cache.layers
            logits = self._policy.model(tokens[:, None], cache=layers)[:, -1]
            token, logprob = draw(logits, uniforms, self._params, seen)
        cache.advance()
        mx.async_eval(token, logprob)  # type: ignore[no-untyped-call]
        return token, logprob


#: Prompts to try a model out with: long enough, and varied enough, that a wrong position shows in every one of them.
_UNLIKE = [[(5 * i + 1) * i % 29 + 1 for i in range(length)] for length in (40, 12, 31, 23, 17)]


def fits(policy: Policy) -> bool:
    """Whether a window can hold the model's cache: keys and values of every position, in every layer.

    And whether the model reads its positions and its mask from the cache, row by row: found out once, by
    decoding one token of unlike prompts.
    """
    found = findings(policy)
    if found.fits_window is None:
        plain = all(type(layer) is KVCache for layer in make_prompt_cache(policy.model))
        found.fits_window = plain and _decodes_unlike_rows(policy.model)
    return found.fits_window


def require_fit(policy: Policy, rule: str) -> None:
    """Refuse a model whose rows must begin and end together.

    Args:
        policy: The model.
        rule: The setting that needs continuous batching, and what it must be: ``rollout.x: must be false``.

    Raises:
        ConfigError: it is one.
    """
    if not fits(policy):
        raise ConfigError(
            f"{rule} for {policy.name}, whose layers cache something else than the keys and values of every "
            "position, so that the rows of a batch begin and end together"
        )


def _decodes_unlike_rows(model: Any) -> bool:
    """Whether prompts of unlike lengths give side by side what they give alone."""
    window = Window(model, len(_UNLIKE))
    window.place(np.arange(len(_UNLIKE)), Prompts(model, _UNLIKE), np.arange(len(_UNLIKE)))
    try:
        together = model(mx.array([[prompt[-1]] for prompt in _UNLIKE]), cache=window.layers)[:, -1]
        mx.eval(together)
    except (TypeError, ValueError):
        return False  # it takes a cache's offset for one number
    return _are_alone(together, model)


def _are_alone(logits: mx.array, model: Any) -> bool:
    """Whether logits [5, V] of the unlike prompts side by side are those of each by itself.

    Of most of them: in half precision one may land elsewhere by rounding alone (SmolLM2 does), and what is wrong with a
    batch is so for all rows but the longest, or all but the last.
    """
    alone = [model(mx.array([prompt]))[0, -1] for prompt in _UNLIKE]
    agree = sum(same_logits(*pair) for pair in zip(logits, alone, strict=True))
    return 2 * agree > len(_UNLIKE)


def _over_slots(policy: Policy) -> bool:
    """Whether the kernels fit this machine and this model."""
    found = findings(policy)
    if found.attention_callers is None:
        found.attention_callers = attention.callers(policy.model)
    return bool(found.attention_callers)


def _blocks(policy: Policy) -> Blocks | None:
    """The policy's blocks, if it is made of some that give what its own layers give."""
    found = findings(policy)
    blocks = None if found.fits_blocks is False else blocks_of(policy.model)
    if blocks and found.fits_blocks is None:
        found.fits_blocks = _gives_the_same(blocks, policy.model)
    return blocks if found.fits_blocks else None


def _gives_the_same(blocks: Blocks, model: Any) -> bool:
    """Whether the blocks decode one token of unlike prompts as the model does."""
    slots, rows = Slots(len(_UNLIKE), max_new_tokens=1), np.arange(len(_UNLIKE), dtype=np.int32)
    slots.place(rows, Prompts(model, _UNLIKE), rows)
    last, lengths = mx.array([prompt[-1] for prompt in _UNLIKE]), mx.array(slots.lengths)
    assert slots.cache is not None
    return _are_alone(blocks.logits(blocks.arrays(model), last, lengths, slots.cache), model)


def _slot_step(policy: Policy, params: SamplingParams, blocks: Blocks | None) -> SlotStep:
    """The step over slots; compiled where that is right."""
    found = findings(policy)
    logits = blocks.logits if blocks else partial(_by_layers, policy.model, found.attention_callers)
    step = partial(_drawn, logits, params)
    if not params.compiled or params.repetition_penalty != 1 or has_dora(policy.model):
        return step
    key = (params, blocks is not None)
    if key not in found.compiled_steps:
        # The blocks' weights are arguments; those of the layers are not, and must be named.
        found.compiled_steps[key] = mx.compile(step, inputs=None if blocks else [policy.model.state])
    compiled: SlotStep = found.compiled_steps[key]
    return compiled


def _drawn(
    logits: SlotLogits, params: SamplingParams, uniforms: mx.array, seen: mx.array | None, *state: Any
) -> tuple[mx.array, mx.array]:
    if draw_kernel.fits(params):
        return draw_kernel.draw(logits(*state), uniforms, params.temperature)
    return draw(logits(*state), uniforms, params, seen)


def _by_layers(
    model: Any, callers: attention.Callers, tokens: mx.array, lengths: mx.array, cache: mx.array
) -> mx.array:
    layers = [SlotLayer(cache, layer, lengths) for layer in range(len(cache))]
    with callers.calling(_attend):
        logits: mx.array = model(tokens[:, None], cache=layers)[:, -1]
    return logits


def _attend(  # noqa: PLR0917 - mlx-lm's arguments
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: SlotLayer,
    scale: float,
    mask: None,  # noqa: ARG001
) -> mx.array:
    return slot_kernels.attend_rows(queries, keys, values, cache, scale)
