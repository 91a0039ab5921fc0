"""Whether a model computes the same when it samples as when it trains, measured before the first update.

A worker decodes token by token, with a cache, and prompts of several lengths side by side. The learner computes whole texts
at once, without a cache, for the gradient. Not all of mlx-lm's models give the same log-probs both ways; training would
then correct for a difference between two programs, not between two policies.

`check_agreement` is the check of a run; `measure` is its measurement, for whoever wants the figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
from mlx.utils import tree_flatten

from grpo_actors.errors import ModelError, first_line
from grpo_actors.learner.grpo import Grpo
from grpo_actors.objective.micro_batches import Completion
from grpo_actors.out_of_memory import is_out_of_memory
from grpo_actors.policy.architectures import is_known
from grpo_actors.policy.decoding.fixed_batch import respects_padding
from grpo_actors.policy.decoding.sampling import sample_groups
from grpo_actors.policy.decoding.step import fits
from grpo_actors.policy.device import on_cuda
from grpo_actors.rollout.worker import sampling_params

#: Tokens of the longest prompt (the others are its first two thirds and its first third), completions of each prompt, and
#: their tokens.
PROMPT_TOKENS, COMPLETIONS, TOKENS = 48, 2, 8
#: Those of a known architecture, which the tests keep right: every run pays for this check.
KNOWN_PROMPT_TOKENS, KNOWN_COMPLETIONS, KNOWN_TOKENS = 16, 1, 3
#: Largest difference of a token's log-prob in float32, in nats. Small random models agree to 1e-5; Qwen2.5-Coder-0.5B, whose
#: key biases reach 211, to 6e-4. Models that compute something else were off by 0.4 and more.
FLOAT32_NATS = 0.01


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far the log-probs of the two ways are apart, over the tokens of a few completions, in nats."""

    largest: float
    mean: float
    #: Norm of the gradient; None if it was not computed.
    gradient_norm: float | None


def check_agreement(grpo: Grpo, prompt: Sequence[int]) -> str | None:
    """Check that sampling and training agree on a few completions of `prompt` and of its beginnings.

    In float32 every token must agree to `FLOAT32_NATS`; in half precision, and on CUDA, the mean must be within
    health.max_logprob_gap. Weights and cache are not quantised: what `rollout.quantize_for_rollouts` and `rollout.kv_bits`
    change is measured by the updates (`logprob_gap_mean`).

    Returns:
        What works in a slower way with this model, as a sentence for the user; None: nothing.

    Raises:
        ModelError: they do not agree, one of them fails, or the gradient is not finite; the text says which.
    """
    name, module = grpo.policy.name, type(grpo.policy.model).__module__
    try:
        found = measure(grpo, prompt)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{name} cannot be trained: {module} fails: {type(error).__name__}: {first_line(error)}"
        ) from error
    if found.gradient_norm is not None and not mx.isfinite(mx.array(found.gradient_norm)):
        raise ModelError(f"{name} cannot be trained: the gradient of {module} is not finite")
    gap, limit, which = found.largest, FLOAT32_NATS, "at most"
    temperature = grpo.config.rollout.temperature
    if temperature < 1:
        limit /= temperature  # as it divides the logits, it multiplies their rounding
    if on_cuda() or _lowest_dtype(grpo) != mx.float32:
        gap, limit, which = found.mean, grpo.config.health.max_logprob_gap, "at most a mean of"
    if not gap <= limit:
        raise ModelError(
            f"{name} cannot be trained: log-probs of the same tokens differ by {gap:.2g} nats between sampling and training "
            f"({which} {limit:g} is rounding): {module} computes something else token by token than all at once"
        )
    if not fits(grpo.policy) and not respects_padding(grpo.policy):
        return (
            f"{name}: only prompts of equal length are sampled side by side, because {module} gives other log-probs for "
            "prompts of different lengths, or fails"
        )
    return None


def measure(grpo: Grpo, prompt: Sequence[int]) -> Agreement:
    """Sample completions of `prompt` and its beginnings as a worker does, and compute them as an update does."""
    known = is_known(grpo.policy.model)
    length, completions, tokens = (
        (KNOWN_PROMPT_TOKENS, KNOWN_COMPLETIONS, KNOWN_TOKENS)
        if known
        else (PROMPT_TOKENS, COMPLETIONS, TOKENS)
    )
    longest = prompt[:length]
    prompts = [longest[: max(1, len(longest) * thirds // 3)] for thirds in (2, 3, 1)]
    # Compiling would take longer than these steps; it changes no result.
    params = replace(sampling_params(grpo.config), max_new_tokens=tokens, stop=(), compiled=False, kv_bits=0)
    seeds = [range(completions * i, completions * (i + 1)) for i in range(len(prompts))]
    groups = sample_groups(grpo.policy, prompts, seeds, params)
    sampled = [
        Completion(prompt, sample.tokens, sample.logprobs, advantage=1.0)
        for prompt, samples in zip(prompts, groups, strict=True)
        for sample in samples
    ]
    # On an accelerator the gradient is compiled now, for the first update; on a CPU it would only cost time.
    gradient = not known or mx.default_device().type == mx.DeviceType.gpu
    # Dropout in a trained adapter changes the log-probs on purpose; in a new one it changes nothing.
    gradient = gradient and not (grpo.config.model.lora_dropout and grpo.version)
    return Agreement(*grpo.rehearse(sampled, gradient=gradient))


def _lowest_dtype(grpo: Grpo) -> mx.Dtype:
    """Return the type of the model's floats with the fewest bits."""
    floats = [
        array.dtype
        for _, array in tree_flatten(grpo.policy.model.parameters())
        if mx.issubdtype(array.dtype, mx.floating)
    ]
    lowest: mx.Dtype = min(floats, key=lambda dtype: dtype.size)
    return lowest
