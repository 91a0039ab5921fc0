"""One step of decoding over a `window`: tokens in, the next tokens and their log-probs out.

Two ways that give the same. With MLX's own attention each row's columns are masked; that is the way of a CPU
and of Metal. On CUDA a kernel reads each row's own columns (`attention`), so that every array keeps its shape,
and the whole step is compiled: at these sizes it is not the GPU that is slow, but telling it what to do.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache

from grpo_actors.policy import attention
from grpo_actors.policy.dora import takes_norms
from grpo_actors.policy.draw import SamplingParams, draw
from grpo_actors.policy.model import Policy, same_logits
from grpo_actors.policy.window import Prompts, Window

#: tokens, uniforms, starts, column, keys and values by layer -> token, log-prob, keys and values.
Compiled = Callable[..., tuple[mx.array, mx.array, list[tuple[mx.array, mx.array]]]]


class Decoder:
    """The steps of one policy with one set of parameters; what is compiled is kept with the policy."""

    def __init__(self, policy: Policy, params: SamplingParams) -> None:
        self._policy = policy
        self._params = params
        compiled = params.compiled and params.repetition_penalty == 1
        self._compiled = _compiled(policy, params) if compiled else None

    @property
    def worth_shrinking(self) -> float:
        """Share of rows in use at which to go on without the others: a compiled step is traced again for it."""
        return 0.75 if self._compiled is None else 0.5

    def step(
        self, window: Window, tokens: mx.array, uniforms: mx.array, seen: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        """Decode one token of every row; the window must have room.

        Args:
            window: Its layers are written, and its end moves on.
            tokens: [R], what each row is fed.
            uniforms: [R] in [0, 1).
            seen: [R, V] bool, with a repetition penalty.

        Returns:
            Tokens [R] and log-probs [R], under way.
        """
        if self._compiled is not None:
            token, logprob = self._compiled_step(window, tokens, uniforms, self._compiled)
        else:
            layers: Any = window.layers
            logits = self._policy.model(tokens[:, None], cache=layers)[:, -1]
            token, logprob = draw(logits, uniforms, self._params, seen)
        window.advance()
        mx.async_eval(token, logprob)  # type: ignore[no-untyped-call]
        return token, logprob

    @staticmethod
    def _compiled_step(
        window: Window, tokens: mx.array, uniforms: mx.array, compiled: Compiled
    ) -> tuple[mx.array, mx.array]:
        pasts = [(layer.keys, layer.values) for layer in window.layers]
        column = mx.array([window.end], mx.int32)
        token, logprob, pasts = compiled(tokens, uniforms, window.device_starts, column, pasts)
        for layer, (keys, values) in zip(window.layers, pasts, strict=True):
            layer.keys, layer.values = keys, values
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


def _compiled(policy: Policy, params: SamplingParams) -> Compiled | None:
    """The compiled step, if the kernel fits this machine and this model."""
    if policy.attention_callers is None:
        policy.attention_callers = attention.callers(policy.model)
    if not policy.attention_callers or takes_norms(policy.model):
        return None
    if params not in policy.compiled_steps:
        policy.compiled_steps[params] = _compile(policy.model, params, policy.attention_callers)
    compiled: Compiled = policy.compiled_steps[params]
    return compiled


def _compile(model: Any, params: SamplingParams, callers: attention.Callers) -> Compiled:
    def step(
        tokens: mx.array,
        uniforms: mx.array,
        starts: mx.array,
        column: mx.array,
        pasts: list[tuple[mx.array, mx.array]],
    ) -> tuple[mx.array, mx.array, list[tuple[mx.array, mx.array]]]:
        layers = [_TracedLayer(starts, column, *past) for past in pasts]
        with callers.calling(_attend):
            logits = model(tokens[:, None], cache=layers)[:, -1]
        token, logprob = draw(logits, uniforms, params)
        return token, logprob, [(layer.keys, layer.values) for layer in layers]

    compiled: Compiled = mx.compile(step, inputs=[model.state])
    return compiled


class _TracedLayer:
    """A layer's window while the step is being traced: all that changes from step to step is an array."""

    def __init__(self, starts: mx.array, column: mx.array, keys: mx.array, values: mx.array) -> None:
        self.starts, self.column, self.keys, self.values = starts, column, keys, values
        self.offset = column - starts

    def make_mask(self, *_: Any, **__: Any) -> None:
        """The kernel knows."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write the step's keys and values [R, H, 1, D]; returns the whole buffers, which the kernel reads."""
        self.keys = mx.slice_update(self.keys, keys, self.column, axes=(2,))
        self.values = mx.slice_update(self.values, values, self.column, axes=(2,))
        return self.keys, self.values


def _attend(  # noqa: PLR0917 - mlx-lm's arguments
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: _TracedLayer,
    scale: float,
    mask: None,  # noqa: ARG001
) -> mx.array:
    return attention.attend_rows(
        queries, keys, values, starts=cache.starts, stop=cache.column + 1, scale=scale
    )
