"""Compute the log-probs of given completions, for the loss.

The head (hidden state -> vocabulary) runs only where a completion token is predicted, not on the prompt. The
distribution is the one that the rollout sampled from: logits divided by the temperature.

On a GPU the head runs part by part, and again in the backward pass: logits are the largest arrays of an update, and
computing them twice costs little. A CPU keeps them, because there the exponentials are expensive and memory is not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx import nn

from grpo_actors.policy.architectures import architecture_of
from grpo_actors.policy.device import on_cuda
from grpo_actors.policy.gpu_rows import HEAD_ROWS
from grpo_actors.policy.mean_logit import mean_logits
from grpo_actors.policy.model import whole_texts
from grpo_actors.policy.packed_rows import packed_outputs
from grpo_actors.policy.recomputation import recomputed

#: Tokens [N, T], and a cache -> hidden states [N, T, H].
Body = Callable[..., mx.array]


class Head:
    """The end of a model: hidden states [.., H] -> logits [.., V]; one product, and perhaps a soft cap."""

    def __init__(self, module: Any, *, tied: bool, cap: float | None = None) -> None:
        """Take the module that has the weights; `tied`: it is the embedding; `cap`: bound on the logits' size."""
        self.module = module
        self._tied = tied
        self._cap = cap

    @property
    def plain_weight(self) -> mx.array | None:
        """The weight [V, H], if the product is nothing else: not quantised, no bias, no adapter."""
        plain = type(self.module) is (nn.Embedding if self._tied else nn.Linear) and "bias" not in self.module
        return self.module.weight if plain else None

    def __call__(self, hidden: mx.array) -> mx.array:
        """Return the logits of hidden states."""
        return self.capped(self.module.as_linear(hidden) if self._tied else self.module(hidden))

    def capped(self, product: mx.array) -> mx.array:
        """Return the logits of the product's results."""
        return product if self._cap is None else mx.tanh(product / self._cap) * self._cap


def micro_batch_logprobs(
    model: Any, batch: Mapping[str, mx.array], temperature: float, *, packed: bool, entropies_train: bool
) -> tuple[mx.array, mx.array]:
    """Compute log π(target) and the entropy of π for every completion token of a micro-batch.

    Args:
        model: Maps [N, T] ids to [N, T, V] logits.
        batch: `MicroBatch.arrays()`.
        temperature: Temperature of the rollout; 0 counts as 1.
        packed: Whether a row holds several completions; only for a model for which `packed_rows.packs_rows` is true.
        entropies_train: Whether the entropies need a gradient.

    Returns:
        As `completion_logprobs`.
    """
    outputs = predicting_outputs(model, batch, packed=packed)
    return target_logprobs(model, outputs, batch, temperature, entropies_train=entropies_train)


def predicting_outputs(model: Any, batch: Mapping[str, mx.array], *, packed: bool) -> mx.array:
    """Return the outputs [K, …] of the model's body for the tokens that predict; see `micro_batch_logprobs`.

    They are hidden states, or logits of a model that `split_head` does not divide.
    """
    body, _ = split_head(model) or (model, None)
    outputs = (
        packed_outputs(model, body, batch)
        if packed
        else whole_texts(model, batch["tokens"], body).flatten(0, 1)
    )
    return outputs[batch["inputs_at"]] if batch["inputs_at"].size < len(outputs) else outputs


def target_logprobs(
    model: Any, outputs: mx.array, batch: Mapping[str, mx.array], temperature: float, *, entropies_train: bool
) -> tuple[mx.array, mx.array]:
    """Compute the log-probs and entropies [N, C] of a micro-batch from its `predicting_outputs`."""
    _, head = split_head(model) or (model, None)
    if head is None:
        logprobs, entropies = _logprobs(outputs, batch["targets"], temperature)
    elif mx.default_device().type == mx.DeviceType.gpu:
        inputs = (head, outputs, batch["targets"], temperature)
        logprobs, entropies = logprobs_by_parts(*inputs, entropies_train=entropies_train)
    else:
        logprobs, entropies = _logprobs(head(outputs), batch["targets"], temperature)
    return logprobs[batch["target_at"]], entropies[batch["target_at"]]


def logprobs_by_parts(
    head: Head,
    hidden: mx.array,
    targets: mx.array,
    temperature: float,
    *,
    entropies_train: bool,
    rows: int = HEAD_ROWS,
) -> tuple[mx.array, mx.array]:
    """Compute log-probs and entropies [K] of hidden states [K, H] and targets [K], `rows` of them at a time.

    Each part's logits are freed at once, and computed again for the gradient. A head with an adapter runs as a whole:
    few models have one.
    """
    weight, bounds = head.plain_weight, list(range(rows, len(targets), rows))
    if weight is None and head.module.trainable_parameters():
        return _logprobs(head(hidden), targets, temperature)

    def part(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        logprobs, entropies = _logprobs(logits, targets, temperature)
        return logprobs, entropies if entropies_train else mx.stop_gradient(entropies)

    def part_of_product(product: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        return part(head.capped(product), targets)

    if weight is None:
        again = recomputed(lambda _, hidden, targets: part(head(hidden), targets))
        pieces = zip(mx.split(hidden, bounds), mx.split(targets, bounds), strict=True)
        return _joined([again(head.module, *piece) for piece in pieces])

    @mx.custom_function
    def by_parts(hidden: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
        pieces = zip(mx.split(hidden, bounds), mx.split(targets, bounds), strict=True)
        return _joined([part_of_product(hidden @ weight.T, targets) for hidden, targets in pieces])

    @by_parts.vjp
    def gradient(primals: Any, cotangents: Any, results: Any) -> tuple[mx.array, mx.array]:
        del results
        hidden, weight = primals
        hidden_gradients, weight_gradient = [], mx.zeros_like(weight)
        for piece, chosen, *wanted in zip(
            *(mx.split(array, bounds) for array in (hidden, targets, *cotangents)), strict=True
        ):
            _, (product,) = mx.vjp(
                lambda product, chosen=chosen: part_of_product(product, chosen), [piece @ weight.T], wanted
            )
            hidden_gradients.append(product @ weight)
            # The product adds to the sum itself. A sum of all parts would be another kernel for each number of them.
            weight_gradient = mx.addmm(weight_gradient, product.T, piece)
        return mx.concatenate(hidden_gradients), weight_gradient

    results: tuple[mx.array, mx.array] = by_parts(hidden, weight)  # type: ignore[assignment]
    return results


def _joined(parts: Sequence[tuple[mx.array, mx.array]]) -> tuple[mx.array, mx.array]:
    return mx.concatenate([one for one, _ in parts]), mx.concatenate([one for _, one in parts])


def completion_logprobs(
    model: nn.Module, tokens: mx.array, start: mx.array, targets: mx.array, temperature: float
) -> tuple[mx.array, mx.array]:
    """Compute log π(target) and the entropy of π at every completion position.

    Rows are padded on the right, so a causal model computes the same for a row as without the other rows.

    Args:
        model: Maps [N, T] ids to [N, T, V] logits.
        tokens: [N, T] int32, prompt and completion, padded.
        start: [N] int32, index of the last prompt token, which predicts the first completion token.
        targets: [N, C] int32, completion ids, padded with any valid id.
        temperature: Temperature of the rollout; 0 counts as 1.

    Returns:
        float32 log-probs [N, C] and entropies [N, C] (nats), both with a gradient. Values at padding positions are
        meaningless.
    """
    positions = mx.minimum(start[:, None] + mx.arange(targets.shape[1]), tokens.shape[1] - 1)
    split = split_head(model)
    if split is None:
        logits = mx.take_along_axis(whole_texts(model, tokens), positions[:, :, None], axis=1)
    else:
        body, head = split
        logits = head(mx.take_along_axis(whole_texts(model, tokens, body), positions[:, :, None], axis=1))
    logprobs, entropies = _logprobs(logits.flatten(0, 1), targets.flatten(), temperature)
    return logprobs.reshape(targets.shape), entropies.reshape(targets.shape)


def _logprobs(logits: mx.array, targets: mx.array, temperature: float) -> tuple[mx.array, mx.array]:
    """Compute log-probs and entropies [K] of logits [K, V]."""
    if temperature not in (0.0, 1.0):
        logits = logits.astype(mx.float32) / temperature
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    return _fused(logits, targets) if on_gpu else _shared_exponential(logits, targets)


def _fused(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Use MLX's kernel on CUDA, which keeps no float32 array of the vocabulary's size for the backward pass.

    Elsewhere MLX takes the difference of log-sum-exp and logit in the type of the logits. In bfloat16 that is off by up to
    0.08 nats, so they are float32 there.
    """
    if not on_cuda():
        logits = logits.astype(mx.float32)
    logprobs = -mx.fast.cross_entropy(logits, targets)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0].astype(mx.float32)
    log_total = chosen - logprobs
    return logprobs, log_total - mean_logits(logits, log_total)


def _shared_exponential(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Spell out the maths, so that forward and backward share one exponential, the expensive operation on a CPU."""
    logits = logits.astype(mx.float32)
    logits = logits - mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = mx.exp(logits)
    total = weights.sum(axis=-1)
    log_total = mx.log(total)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    entropy = log_total - (weights * logits).sum(axis=-1) / total
    return chosen - log_total, entropy


def split_head(model: nn.Module) -> tuple[Body, Head] | None:
    """Return the model's body and head, if its logits are exactly head(body(tokens)).

    Returns None for a model that does more (scaling, several heads); use its full logits then.
    """
    if not architecture_of(model).plain_head:
        return None
    # A model that may see images too holds one for texts.
    texts: Any = model.get("language_model", model)
    body: Any = texts["model"]
    cap = getattr(texts, "final_logit_softcapping", None)
    if "lm_head" in texts:
        return body, Head(texts["lm_head"], tied=False, cap=cap)
    return body, Head(body["embed_tokens"], tied=True, cap=cap)
