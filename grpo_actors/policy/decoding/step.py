"""One step of decoding: tokens in, the next tokens and their log-probs out.

There are several ways, which give the same result:

- On a CPU and on Metal, MLX's own attention masks the columns of a `window` that do not belong to a row. On CUDA too, if
  the cache is quantised or a layer has a sliding window: the kernel reads neither.
- On CUDA, a kernel reads each row's own columns (`slots`). Every array then keeps its shape, and at these sizes the GPU is
  fast: launching its kernels is what takes the time. Models that `blocks` supports need half as many kernels, and the
  driver launches them all at once (`recorded_step`). The others use their own layers, compiled.
- Models whose cache fits neither use mlx-lm's caches (`fixed_batch`).
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from grpo_actors.errors import ConfigError
from grpo_actors.policy.architectures import architecture_of
from grpo_actors.policy.attention import Callers
from grpo_actors.policy.decoding import attention, draw_kernel, recorded_step, slot_kernels
from grpo_actors.policy.decoding.blocks import Arrays, Blocks, blocks_of
from grpo_actors.policy.decoding.draw import Array, SamplingParams, draw
from grpo_actors.policy.decoding.findings import findings
from grpo_actors.policy.decoding.fixed_batch import FixedBatch, prefill
from grpo_actors.policy.decoding.recorded_step import RecordedStep
from grpo_actors.policy.decoding.slots import SlotLayer, Slots
from grpo_actors.policy.decoding.window import GROUP_SIZES, Prompts, Window, group_size, keeps_keys_and_values
from grpo_actors.policy.dora import has_dora
from grpo_actors.policy.model import RAGGED, Policy, logits_alone, same_logits
from grpo_actors.policy.sharding import from_first
from grpo_actors.policy.shared_library import CudaError

Cache = Window | Slots | FixedBatch
#: (the blocks' arrays, only if there are blocks; tokens, lengths, cache) -> logits [R, V].
SlotLogits = Callable[..., mx.array]
#: (uniforms; the tokens seen, or None without a repetition penalty; then as `SlotLogits`) -> (token, log-prob).
SlotStep = Callable[..., tuple[mx.array, mx.array]]
#: Waits for a step; returns the token and the log-prob of each row.
Results = Callable[[], tuple[list[int], list[float]]]


class Decoder:
    """The decoding steps of one policy, with one set of parameters and the current weights.

    Compiled steps are kept in the policy's `findings`.
    """

    def __init__(self, policy: Policy, params: SamplingParams) -> None:
        self._policy = policy
        self._params = params
        #: Whether the rows of a batch must begin together.
        self.together = not fits(policy)
        self._slot_step: SlotStep | None = None
        self._recorded: RecordedStep | None = None
        self._arrays: list[Arrays] = []
        # The kernels know no ranks: of a divided model they would compute a part.
        if not self.together and not params.kv_bits and policy.sharding is None and _over_slots(policy):
            blocks = _blocks(policy)
            if blocks:
                self._arrays = [blocks.arrays(policy.model)]
                mx.async_eval(self._arrays)  # type: ignore[no-untyped-call]
            self._recorded = _recorded(policy, params, blocks, self._arrays)
            self._slot_step = _slot_step(policy, params, blocks)

    def forget_weights(self) -> None:
        """Drop the copies of the weights; this decoder takes no further step. May be called twice."""
        self._arrays = []
        if self._recorded is not None:
            self._recorded.close()
            self._recorded = None

    def rest(self) -> None:
        """Wait for the step under way, if it does not wait itself for what MLX is given afterwards."""
        if self._recorded is not None:
            self._recorded.rest()

    @property
    def feeds(self) -> bool:
        """Whether the step itself remembers the tokens that it drew, and takes others as `given`."""
        return self._recorded is not None

    @property
    def over_slots(self) -> bool:
        """Whether rows are slots: a free row then costs next to nothing, but another number of rows costs a compilation."""
        return self._slot_step is not None

    def cache(self, rows: int) -> Cache:
        """Create an empty cache with `rows` rows."""
        if self.together:
            return FixedBatch([])
        if self.over_slots:
            return Slots(rows, self._params.max_new_tokens)
        return Window(self._policy.model, rows, self._params.kv_bits)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Prompts | FixedBatch:
        """Run prompts through the model, for rows of a cache; return before the device has finished."""
        if self.together:
            return FixedBatch(prefill(self._policy.model, prompts))
        run = Prompts(self._policy.model, prompts, few_shapes=self.over_slots)
        # Submitted separately from the steps, because the prompts serve several of them.
        mx.async_eval(run.stacked if self.over_slots else run.layers)  # type: ignore[no-untyped-call]
        return run

    def step(
        self, cache: Cache, tokens: mx.array, given: Mapping[int, int], uniforms: Array, seen: mx.array | None
    ) -> tuple[mx.array, Results]:
        """Decode one token of every row; the cache must have room for it.

        Args:
            cache: Made by `cache`; this call writes to it and advances it.
            tokens: [R], the token that each row is fed; only if the step does not feed itself.
            given: Tokens by row, fed instead of those that were drawn; only if the step feeds itself.
            uniforms: [R] float32 in [0, 1).
            seen: [R, V] bool, the tokens under the repetition penalty; None without one.

        Returns:
            The tokens [R] to feed next, and a function that waits for the tokens and log-probs of all rows.
        """
        if isinstance(cache, Slots) and self._recorded is not None:
            landing = self._recorded.step(cache, uniforms, given)
            cache.advance()
            return tokens, landing.read
        if isinstance(cache, Slots):
            assert self._slot_step is not None
            state = (*self._arrays, tokens, mx.array(cache.lengths), cache.cache)
            token, logprob = self._slot_step(mx.array(uniforms), seen, *state)
        else:
            layers: Any = cache.layers
            logits = self._policy.model(tokens[:, None], cache=layers)[:, -1]
            token, logprob = draw(logits, mx.array(uniforms), self._params, seen)
            if self._policy.sharding is not None:
                # Another rank may have rounded otherwise, and drawn another token.
                token = from_first(token, self._policy.sharding.group)
        cache.advance()
        mx.async_eval(token, logprob)  # type: ignore[no-untyped-call]
        return token, partial(_read, token, logprob)


def _read(token: mx.array, logprob: mx.array) -> tuple[list[int], list[float]]:
    return np.array(token).tolist(), np.array(logprob).tolist()


def fits(policy: Policy) -> bool:
    """Return whether a window can hold the model's cache: in every layer the keys and values of all or of the last positions.

    The model must also read positions and mask from the cache, row by row. Known blocks do; of others that is tested once,
    by decoding one token of prompts of different lengths.
    """
    found = findings(policy)
    if found.fits_window is None:
        known = architecture_of(policy.model).plain_blocks
        found.fits_window = keeps_keys_and_values(policy.model) and (
            known or _decodes_unlike_rows(policy.model)
        )
    return found.fits_window


def require_fit(policy: Policy, rule: str) -> None:
    """Check that the model can be batched continuously.

    Args:
        policy: The model.
        rule: The setting that needs continuous batching, and the value it must otherwise have:
            ``rollout.x: must be false``.

    Raises:
        ConfigError: the rows of a batch of this model must begin and end together.
    """
    if not fits(policy):
        raise ConfigError(
            f"{rule} for {policy.name}, whose layers cache something else than keys and values of positions, "
            "so that the rows of a batch begin and end together"
        )


def require_cache_bits(policy: Policy, kv_bits: int, setting: str) -> None:
    """Check that the model's keys and values can be cached in `kv_bits` bits; `setting` is their name for the user.

    Raises:
        ConfigError: they can not; the text says why.
    """
    if not kv_bits:
        return
    rule = f"{setting}: must be 0"
    require_fit(policy, rule)
    pairs = Prompts(policy.model, [[1, 1]]).layers  # nothing is computed: a shape needs no values
    unfit = [array.shape[3] for pair in pairs for array in pair if group_size(array.shape[3]) is None]
    if unfit:
        raise ConfigError(
            f"{rule} for {policy.name}, whose keys or values have a width of {unfit[0]} in a head (a multiple of "
            f"{GROUP_SIZES[-1]} can be quantised), got {kv_bits}"
        )


def _decodes_unlike_rows(model: Any) -> bool:
    """Return whether prompts of different lengths give the same logits side by side as alone."""
    window = Window(model, len(RAGGED))
    window.place(np.arange(len(RAGGED)), Prompts(model, RAGGED), np.arange(len(RAGGED)))
    try:
        together = model(mx.array([[prompt[-1]] for prompt in RAGGED]), cache=window.layers)[:, -1]
        mx.eval(together)
    except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError):
        return False  # the model reads other attributes of a cache, or expects a single number as the cache's offset
    return _same_as_alone(together, model)


def _same_as_alone(logits: mx.array, model: Any) -> bool:
    """Return whether the logits [5, V] of the unlike prompts side by side are those of each prompt alone.

    Most rows must agree, not all: in half precision, rounding alone may move one row far away (as with SmolLM2), while a
    real error affects all rows but the longest, or all but the last.
    """
    alone = [row[len(text) - 1] for row, text in zip(logits_alone(model, RAGGED), RAGGED, strict=True)]
    agree = sum(same_logits(*pair) for pair in zip(logits, alone, strict=True))
    return 2 * agree > len(RAGGED)


def _over_slots(policy: Policy) -> bool:
    """Return whether the kernels support this machine and this model."""
    found = findings(policy)
    if found.attention_callers is None:
        found.attention_callers = attention.callers(policy.model)
    return bool(found.attention_callers)


def _blocks(policy: Policy) -> Blocks | None:
    """Return the policy's blocks, if it has supported ones and they give the same logits as its own layers."""
    found = findings(policy)
    blocks = None if found.fits_blocks is False else blocks_of(policy.model)
    if blocks and found.fits_blocks is None:
        found.fits_blocks = _blocks_agree(blocks, policy.model)
    return blocks if found.fits_blocks else None


def _blocks_agree(blocks: Blocks, model: Any) -> bool:
    """Return whether the blocks decode one token of the unlike prompts as the model does."""
    slots, rows = Slots(len(RAGGED), max_new_tokens=1), np.arange(len(RAGGED), dtype=np.int32)
    slots.place(rows, Prompts(model, RAGGED), rows)
    last, lengths = mx.array([prompt[-1] for prompt in RAGGED]), mx.array(slots.lengths)
    assert slots.cache is not None
    return _same_as_alone(blocks.logits(blocks.arrays(model), last, lengths, slots.cache), model)


def _recorded(
    policy: Policy, params: SamplingParams, blocks: Blocks | None, arrays: Sequence[Arrays]
) -> RecordedStep | None:
    """Return the recorded step of these blocks, if it can be recorded here and gives the model's logits."""
    found = findings(policy)
    if blocks is None or found.records is False or not recorded_step.fits(arrays[0], params):
        return None
    if found.records is None:
        found.records = _recording_agrees(blocks, arrays[0], params, policy.model)
    return RecordedStep(blocks, arrays[0], params) if found.records else None


def _recording_agrees(blocks: Blocks, arrays: Arrays, params: SamplingParams, model: Any) -> bool:
    """Return whether a recorded step decodes one token of the unlike prompts as the model does."""
    slots, rows = Slots(len(RAGGED), max_new_tokens=1), np.arange(len(RAGGED), dtype=np.int32)
    slots.place(rows, Prompts(model, RAGGED), rows)
    try:
        with contextlib.closing(RecordedStep(blocks, arrays, params)) as recorded:
            given = {row: prompt[-1] for row, prompt in enumerate(RAGGED)}
            recorded.step(slots, np.zeros(len(RAGGED), np.float32), given).read()
            assert recorded.logits is not None
            return _same_as_alone(recorded.logits, model)
    except CudaError:
        return False


def _slot_step(policy: Policy, params: SamplingParams, blocks: Blocks | None) -> SlotStep:
    """Return the step over slots, compiled if the parameters and the model allow it."""
    found = findings(policy)
    logits = blocks.logits if blocks else partial(_layer_logits, policy.model, found.attention_callers)
    step = partial(_draw_step, logits, params)
    if not params.compiled or params.repetition_penalty != 1 or has_dora(policy.model):
        return step
    key = (params, blocks is not None)
    if key not in found.compiled_steps:
        # The blocks' weights are arguments of the step. Those of the layers are not, so they must be declared as inputs.
        found.compiled_steps[key] = mx.compile(step, inputs=None if blocks else [policy.model.state])
    compiled: SlotStep = found.compiled_steps[key]
    return compiled


def _draw_step(
    logits: SlotLogits, params: SamplingParams, uniforms: mx.array, seen: mx.array | None, *state: Any
) -> tuple[mx.array, mx.array]:
    if draw_kernel.fits(params):
        return draw_kernel.draw(logits(*state), uniforms, params.temperature)
    return draw(logits(*state), uniforms, params, seen)


def _layer_logits(
    model: Any, callers: Callers, tokens: mx.array, lengths: mx.array, cache: mx.array
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
