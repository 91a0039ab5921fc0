"""Bound the memory of the learner: what training adds to the weights, and the activations of one micro-batch.

Of several ranks each has the gradient of all trained arrays (with ``divide_gradient`` of its own part), and float32 weights
and optimizer state of its own part; the rank with the largest part counts.

Every number is an upper bound that follows from shapes. The factors of the activations were fitted to measured peaks
(docs/development/performance.md); they depend on MLX's gradients of the operations, not on a model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from grpo_actors.config import Config
from grpo_actors.dealing import deal
from grpo_actors.devices import BackEnd
from grpo_actors.policy.architectures import Architecture
from grpo_actors.policy.gpu_rows import GRADIENT_PART, HEAD_ROWS, cuda_row
from grpo_actors.supervisor.model_files import Tensor, Widths

#: Bytes of a gradient: gradients and optimizer state are float32.
_GRADIENT_BYTES = 4
#: Bytes per weight for the running means of its gradient and of the gradient's square. Adafactor has none for each weight.
_STATE_BYTES = {"adamw": 8, "adam": 8, "lion": 4, "muon": 4}
#: Bytes per weight that a step holds besides the old state, and those of a gradient before it is added to the sum; there are
#: more while it is added up over ranks.
_STEP_BYTES, _NEW_GRADIENT_BYTES, _ADDED_GRADIENT_BYTES = 5, 6, 14
#: Length of a row in those of a prompt with a completion: in longer ones, which `pack` tries too, attention takes more time
#: than computing a prompt again.
LONG_ROW = 3
#: Bytes of an optimizer's numbers, such as its step, that a checkpoint holds besides arrays of the weights' shapes.
_NUMBERS_BYTES = 4096
#: A weight in a layer; the groups are the layer's number and the module's name within the layer.
_IN_LAYER = re.compile(r"\blayers\.(\d+)\.(.+)\.weight$")


@dataclass(frozen=True, slots=True)
class Arrays:
    """Numbers of arrays in a layer: [tokens, residual stream], [tokens, MLP], and the scores of attention."""

    hidden: float
    mlp: float
    scores: float


#: Arrays that each layer keeps for its backward pass. A GPU recomputes the products of gate and up.
_KEPT_ON_CPU, _KEPT_ON_GPU = Arrays(10, 5, 1.25), Arrays(10, 2, 1.25)
#: Arrays that the backward pass of one layer adds for a moment.
_BACKWARD = Arrays(18, 12, 3)
#: Arrays of the residual stream's width that a layer with the gated delta rule keeps besides those of its MLP: it is recomputed.
_KEPT_BY_DELTA = 3
#: Bytes that its backward pass adds for each token and element of its heads: 70 arrays in float32, whatever the model's type.
_DELTA_BACKWARD_BYTES = 70 * 4
#: Arrays of the vocabulary's width for each position of the head: the logits and their gradient, in the model's type where
#: MLX has a kernel for them (CUDA), else in float32 with the exponentials, and on Metal with those of the entropies.
_LOGITS_KEPT = {"cuda": 2.5, "metal": 4.25, "cpu": 5}
#: Parts of the head whose logits exist at the same time: a GPU is sent the next part before it has freed the first.
_HEAD_PARTS = 2


@dataclass(frozen=True, slots=True)
class LargestMicroBatch:
    """The size of the largest micro-batch that an update can hold; tokens include padding."""

    tokens: int
    #: Tokens of a row.
    row: int
    #: Number of positions with logits.
    logits: int
    #: Whether the backward pass of attention is one kernel that keeps no scores.
    fused_attention: bool

    @property
    def scores(self) -> int:
        """Number of pairs of a token and a position that it may attend to; 0 if they are not kept."""
        return 0 if self.fused_attention else self.tokens * self.row


def largest_micro_batch(config: Config, known: Architecture, back_end: BackEnd) -> LargestMicroBatch:
    """Return the largest micro-batch that `objective.micro_batches.pack` makes with these settings.

    Whether completions can share a row is tried out when the model is loaded; here only models of well-known layers count
    as such.
    """
    prompt, completion = config.data.max_prompt_length, config.rollout.max_new_tokens
    most, longest = config.micro_batch_tokens, prompt + completion
    completions = config.learner.batch_size * config.rollout.num_generations
    if back_end == "cuda":
        multiple = cuda_row(packed=known.plain_blocks)
        row = -(-longest // multiple) * multiple
        tokens = max(1, most // row) * row
        return LargestMicroBatch(tokens, row, tokens, fused_attention=True)
    if not known.plain_blocks:
        tokens = completions * longest
        logits = completions * completion if known.plain_head else tokens
        return LargestMicroBatch(tokens, longest, logits, fused_attention=False)
    group = prompt + config.rollout.num_generations * completion
    row = min(LONG_ROW * longest, group)
    return LargestMicroBatch(max(most, row), row, completions * completion, fused_attention=False)


@dataclass(frozen=True, slots=True)
class Trained:
    """The arrays that the optimizer updates, in numbers of elements, and the bytes that training them takes."""

    size: int
    largest: int
    #: Those of them that one rank's step moves.
    moved: int
    #: Bytes of their values in the model.
    weights: float
    #: Bytes that a rank holds of float32 weights, gradients, the optimizer's state and the reference.
    training: float
    #: Bytes of the arrays in a checkpoint, which exist twice until it is written.
    snapshot: float


def trained(config: Config, tensors: Sequence[Tensor], layers: int, width: int) -> Trained:
    """Return what a run trains: all weights, or an adapter."""
    full = config.model.fine_tune_type == "full"
    return _all_weights(config, tensors, width) if full else _adapter(config, tensors, layers)


def activation_bytes(
    config: Config, known: Architecture, *, widths: Widths, parts: Trained, width: int, back_end: BackEnd
) -> float:
    """Return the most bytes that gradients and steps hold besides the weights, the state and one gradient.

    The peak is at the beginning of a backward pass, when all activations exist, at its end, when all new gradients do, or
    in the optimizer's step.
    """
    batch = largest_micro_batch(config, known, back_end)

    def layer_bytes(arrays: Arrays) -> float:
        per_token = arrays.hidden * widths.hidden + arrays.mlp * widths.intermediate
        return width * (batch.tokens * per_token + arrays.scores * widths.heads * batch.scores)

    in_layer = _KEPT_ON_CPU if back_end == "cpu" else _KEPT_ON_GPU
    kept = layer_bytes(in_layer) * (widths.layers - widths.delta_layers)
    kept += layer_bytes(Arrays(_KEPT_BY_DELTA, in_layer.mlp, 0)) * widths.delta_layers
    backward = layer_bytes(_BACKWARD)
    if config.learner.gradient_checkpointing:
        # Each layer keeps its input.
        kept = width * batch.tokens * widths.hidden * widths.layers
        backward += layer_bytes(_KEPT_ON_CPU)
    # On a CPU and on Metal logits are float32, whatever the model's type.
    per_logit = _LOGITS_KEPT[back_end] * (width if back_end == "cuda" else 4)
    by_parts = known.plain_head and back_end != "cpu"
    rows = min(batch.logits, _HEAD_PARTS * HEAD_ROWS) if by_parts else batch.logits
    logits = per_logit * rows * widths.vocabulary
    at_once = max(backward, _DELTA_BACKWARD_BYTES * widths.delta * batch.tokens, logits)
    new = _NEW_GRADIENT_BYTES * parts.size
    if config.learner.divide_gradient and config.learner.ranks > 1:
        new = min(new, _ADDED_GRADIENT_BYTES * max(parts.largest, GRADIENT_PART))
    return max(
        kept + at_once + _NEW_GRADIENT_BYTES * parts.largest,
        new + at_once,
        _STEP_BYTES * parts.moved,
    )


def _all_weights(config: Config, tensors: Sequence[Tensor], width: int) -> Trained:
    # Half-precision weights are updated as float32 copies, or small steps would be lost.
    masters = 0 if width == 4 else 4
    reference = width if config.objective.kl_coeff else 0
    stored = reference if config.objective.reference_refresh_updates else 0
    size = sum(tensor.size for tensor in tensors)
    state = sum(_state_bytes(config, tensor) for tensor in tensors)
    moved, own_state = _largest_part(config, tensors)
    return Trained(
        size=size,
        largest=max(tensor.size for tensor in tensors),
        moved=moved,
        weights=size * width,
        training=_gradient_bytes(config, size, moved) + size * reference + moved * masters + own_state,
        snapshot=size * (width + masters + stored) + state + _NUMBERS_BYTES,
    )


def _gradient_bytes(config: Config, size: int, moved: int) -> int:
    """Return the bytes of the gradient that a rank holds between two micro-batches."""
    return _GRADIENT_BYTES * (moved if config.learner.divide_gradient else size)


def _state_bytes(config: Config, tensor: Tensor) -> int:
    optimizer = config.learner.optimizer
    if optimizer == "adafactor":  # a row and a column of each matrix, and all of a vector
        return 4 * (
            tensor.size // tensor.shape[-1] + tensor.size // tensor.shape[-2]
            if len(tensor.shape) > 1
            else tensor.size
        )
    by_adamw = optimizer == "muon" and not (len(tensor.shape) == 2 and _IN_LAYER.search(tensor.name))
    return tensor.size * _STATE_BYTES["adamw" if by_adamw else optimizer]


def _largest_part(config: Config, arrays: Sequence[Tensor]) -> tuple[int, int]:
    """Return the most elements that one rank's step moves, and the most bytes of optimizer state that one rank holds."""
    parts = [
        [arrays[number] for number in numbers]
        for numbers in deal([array.size for array in arrays], config.learner.ranks)
    ]
    return (
        max(sum(array.size for array in part) for part in parts),
        max(sum(_state_bytes(config, array) for array in part) for part in parts),
    )


def _adapter(config: Config, tensors: Sequence[Tensor], layers: int) -> Trained:
    """Return the sizes of an adapter, which is always float32."""
    model = config.model
    first = 0 if model.lora_layers < 0 else layers - model.lora_layers
    arrays: list[Tensor] = []
    for tensor in tensors:
        match = _IN_LAYER.search(tensor.name)
        if match is None or len(tensor.shape) < 2 or int(match[1]) < first:
            continue
        if not model.lora_keys or {match[2], tensor.name.removesuffix(".weight")} & {*model.lora_keys}:
            *stack, rows, columns = tensor.shape
            shapes = [(*stack, rows, model.lora_rank), (*stack, model.lora_rank, columns)]
            shapes += [(*stack, rows)] if model.fine_tune_type == "dora" else []
            arrays += [Tensor(tensor.name, shape) for shape in shapes]
    size, state = sum(array.size for array in arrays), sum(_state_bytes(config, array) for array in arrays)
    moved, own_state = _largest_part(config, arrays)
    reference = 4 if config.objective.kl_coeff else 0
    stored = reference if config.objective.reference_refresh_updates else 0
    return Trained(
        size=size,
        largest=max((array.size for array in arrays), default=0),
        moved=moved,
        weights=4 * size,
        training=_gradient_bytes(config, size, moved) + size * reference + own_state,
        snapshot=size * (4 + stored) + state + _NUMBERS_BYTES,
    )
