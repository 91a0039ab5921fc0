"""One step of decoding: tokens in, the next tokens and their log-probs out.

Two ways that give the same. With MLX's own attention each row's columns of a `window` are masked; that is the way
of a CPU and of Metal. On CUDA a kernel reads each row's own columns (`slots`), so that every array keeps
its shape, and the whole step is compiled: at these sizes it is not the GPU that is slow, but telling it what to do.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache

from grpo_actors.errors import ConfigError
from grpo_actors.policy import attention, slot_kernels
from grpo_actors.policy.dora import takes_norms
from grpo_actors.policy.draw import SamplingParams, draw
from grpo_actors.policy.model import Policy, same_logits
from grpo_actors.policy.slots import SlotLayer, Slots
from grpo_actors.policy.window import Prompts, Window

#: tokens, uniforms, lengths, keys and values by layer -> token, log-prob.
SlotStep = Callable[..., tuple[mx.array, mx.array]]


class Decoder:
    """The steps of one policy with one set of parameters; what is compiled is kept with the policy."""

    def __init__(self, policy: Policy, params: SamplingParams) -> None:
        self._policy = policy
        self._params = params
        self._slot_step = _slot_step(policy, params)

    @property
    def over_slots(self) -> bool:
        """Whether rows are slots: a free one costs next to nothing then, and another number of them a compilation."""
        return self._slot_step is not None

    def cache(self, rows: int) -> Window | Slots:
        """An empty cache of so many rows."""
        return (
            Slots(rows, self._params.max_new_tokens) if self.over_slots else Window(self._policy.model, rows)
        )

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Prompts:
        """Run prompts through the model, for rows of a cache."""
        return Prompts(self._policy.model, prompts, few_shapes=self.over_slots)

    def step(
        self, cache: Window | Slots, tokens: mx.array, uniforms: mx.array, seen: mx.array | None
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
            more = () if seen is None else (seen,)
            token, logprob = self._slot_step(tokens, uniforms, mx.array(cache.lengths), cache.layers, *more)
        else:
            layers: Any = cache.layers
            logits = self._policy.model(tokens[:, None], cache=layers)[:, -1]
            token, logprob = draw(logits, uniforms, self._params, seen)
        cache.advance()
        mx.async_eval(token, logprob)  # type: ignore[no-untyped-call]
        return token, logprob


def fits(policy: Policy) -> bool:
    """Whether a window can hold the model's cache: keys and values of every position, in every layer.

    And whether the model reads its positions and its mask from the cache, row by row: found out once, by
    decoding one token of two unlike prompts.
    """
    if policy.fits_window is None:
        plain = all(type(layer) is KVCache for layer in make_prompt_cache(policy.model))
        policy.fits_window = plain and _decodes_unlike_rows(policy.model)
    return policy.fits_window


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
    """Whether two prompts of unlike lengths give side by side what they give alone."""
    prompts = [[3, 1, 2, 1, 3, 2, 1, 1, 2], [2, 1, 3]]
    window = Window(model, len(prompts))
    window.place(np.arange(2), Prompts(model, prompts), np.arange(2))
    try:
        together = model(mx.array([[prompt[-1]] for prompt in prompts]), cache=window.layers)[:, -1]
        mx.eval(together)
    except (TypeError, ValueError):
        return False  # it takes a cache's offset for one number
    return all(
        same_logits(row, model(mx.array([prompt]))[0, -1])
        for row, prompt in zip(together, prompts, strict=True)
    )


def _slot_step(policy: Policy, params: SamplingParams) -> SlotStep | None:
    """The step over slots, if the kernel fits this machine and this model; compiled where that is right."""
    if policy.attention_callers is None:
        policy.attention_callers = attention.callers(policy.model)
    if not policy.attention_callers:
        return None
    step = partial(_over_slots, policy.model, params, policy.attention_callers)
    if not params.compiled or params.repetition_penalty != 1 or takes_norms(policy.model):
        return step
    if params not in policy.compiled_steps:
        policy.compiled_steps[params] = mx.compile(step, inputs=[policy.model.state])
    compiled: SlotStep = policy.compiled_steps[params]
    return compiled


def _over_slots(  # noqa: PLR0917 - what is compiled takes arrays by their place
    model: Any,
    params: SamplingParams,
    callers: attention.Callers,
    tokens: mx.array,
    uniforms: mx.array,
    lengths: mx.array,
    held: list[slot_kernels.Pair],
    seen: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    with callers.calling(_attend):
        logits = model(tokens[:, None], cache=[SlotLayer(lengths, *pair) for pair in held])[:, -1]
    return draw(logits, uniforms, params, seen)


def _attend(  # noqa: PLR0917 - mlx-lm's arguments
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: SlotLayer,
    scale: float,
    mask: None,  # noqa: ARG001
) -> mx.array:
    return slot_kernels.attend_rows(queries, (keys, values), (cache.keys, cache.values), cache.lengths, scale)
