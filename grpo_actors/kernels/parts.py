"""The parts of a run's work that need kernels, each on a small model and a few short texts.

Every part runs the code that the actors run. Where one would need the kernels of another, it is given random numbers
instead: the gradient of the loss begins with random log-probs, and that of the head with random hidden states. `update`
is a whole update: it compiles what lies across the borders of the others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import log
from mmap import mmap
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from grpo_actors.config import Config
from grpo_actors.kernels.small_model import small_policy
from grpo_actors.learner.groups import SampledCompletion, SampledGroup
from grpo_actors.learner.grpo import Grpo, layout_of
from grpo_actors.objective.batch_loss import clip_bounds, objective_loss
from grpo_actors.objective.micro_batches import Completion, pack
from grpo_actors.objective.statistics import token_statistics
from grpo_actors.policy.config_json import text_part
from grpo_actors.policy.decoding.sampling import SamplingParams, sample_groups
from grpo_actors.policy.embedding import trained_embedding
from grpo_actors.policy.logprobs import predicting_outputs, split_head, target_logprobs
from grpo_actors.policy.model import Policy
from grpo_actors.policy.packed_rows import may_pack_rows
from grpo_actors.policy.pinned import pin
from grpo_actors.policy.training import Training
from grpo_actors.policy.weights import freeze, unpack
from grpo_actors.policy.weights import pack as pack_weights
from grpo_actors.rollout.worker import sampling_params
from grpo_actors.rundir import tensor_files
from grpo_actors.tasks.task import Problem

#: Groups, completions of each, and tokens: two micro-batches of several rows, on CUDA too.
GROUPS, GENERATIONS, PROMPT_TOKENS, TOKENS = 4, 4, 64, 256
#: Tokens that a sampled completion gets.
DECODED = 4
#: Ids of the texts are below this number.
IDS = 64


@dataclass(eq=False)
class Work:
    """A run in small: its settings with few and short completions, and what the parts share."""

    config: Config

    @cached_property
    def small(self) -> Config:
        """The settings of the learner's parts."""
        config = self.config
        lengths = {"num_generations": GENERATIONS, "max_new_tokens": TOKENS}
        sections = {
            "rollout": config.rollout.model_copy(update=lengths),
            "data": config.data.model_copy(update={"max_prompt_length": PROMPT_TOKENS}),
            "learner": config.learner.model_copy(update={"batch_size": GROUPS // 2}),
            "reward": config.reward.model_copy(update={"functions": {"reward": 1.0}}),
        }
        return config.model_copy(update=sections)

    @cached_property
    def policy(self) -> Policy:
        """The small model."""
        return small_policy(self.config.model, self.config.run.seed)

    @cached_property
    def groups(self) -> list[SampledGroup]:
        """Groups of random ids, as workers send them."""
        return [
            SampledGroup(i, 0, Problem(f"kernels/{i}", (), ""), _ids(PROMPT_TOKENS - i), "", completions)
            for i, completions in enumerate(
                [_completion(TOKENS - 3 * i - j, float(j % 2)) for j in range(GENERATIONS)]
                for i in range(GROUPS)
            )
        ]

    def batch(self, *, packed: bool) -> dict[str, mx.array]:
        """Return the first micro-batch of these groups, with what the objective needs besides."""
        objective, config = self.config.objective, self.small
        completions = [
            Completion(group.prompt, c.tokens, c.logprobs, float(i % 2) - 0.5)
            for group in self.groups
            for i, c in enumerate(group.completions)
        ]
        update = pack(
            completions,
            layout_of(config, packed=packed),
            aggregation=objective.aggregation,
            max_new_tokens=TOKENS,
        )
        arrays = update.micro_batches[0].arrays()
        if objective.kl_coeff > 0:
            arrays["reference_logprobs"] = arrays["behaviour_logprobs"] - 0.1
        if objective.ratio != "recorded" or objective.top_entropy_share < 1:
            arrays["old_logprobs"] = arrays["behaviour_logprobs"] + 0.1
        if objective.top_entropy_share < 1:
            arrays["entropy_mask"] = arrays["mask"]
        mx.eval(arrays)
        return arrays

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile as `Training` does."""
        on_gpu = mx.default_device().type == mx.DeviceType.gpu
        return mx.compile(function) if on_gpu and self.config.learner.use_compile else function

    def trained(self, loss: Callable[..., tuple[mx.array, mx.array]]) -> Training:
        """Return the training of the small model by another loss."""
        return Training(self.policy.model, self.small.learner, loss)


def loss(work: Work) -> None:
    """Compute the objective, and its gradient down to the log-probs and entropies of all targets; no statistics."""
    # Kernels are the same whether rows are packed or not, here and in the next two parts.
    objective, batch = work.config.objective, work.batch(packed=True)
    optional = ("reference_logprobs", "old_logprobs", "entropy_mask")

    def value(
        logprobs: mx.array, entropies: mx.array, arrays: Mapping[str, mx.array]
    ) -> tuple[mx.array, mx.array]:
        at = arrays["target_at"]
        given = {name: arrays.get(name) for name in optional}
        keeps = work.config.metrics.record_groups
        return objective_loss(
            logprobs[at], arrays, objective, entropies=entropies[at], keeps_tokens=keeps, **given
        )

    gradient = work.compiled(mx.value_and_grad(value, argnums=(0, 1)))
    logprobs, entropies = (mx.random.uniform(shape=batch["targets"].shape) for _ in range(2))
    # The statistics are results too, as in an update, but are not evaluated.
    (total, _), gradients = gradient(-logprobs, entropies, batch)
    mx.eval(total, gradients)


def statistics(work: Work) -> None:
    """Compute the statistics of a loss."""
    objective, batch = work.config.objective, work.batch(packed=True)
    bounds, second_bound = clip_bounds(objective)
    mask, random = batch["mask"], mx.random.uniform(shape=batch["mask"].shape)

    def measure(ratio: mx.array, log_mismatch: mx.array, entropies: mx.array, kl: mx.array) -> mx.array:
        return token_statistics(
            loss=mx.array(1.0),
            mask=mask,
            ratio=ratio,
            bounds=bounds,
            second_bound=second_bound,
            advantages=batch["advantages"],
            kl=kl if objective.kl_coeff > 0 else None,
            log_mismatch=log_mismatch,
            cut=mask if objective.correction != "none" else None,
            entropies=entropies,
        )

    mx.eval(work.compiled(measure)(random, -random, random + 1, random + 2))


def head(work: Work) -> None:
    """Compute log-probs and entropies from hidden states, and the gradient of these; a head of its own kind is in `body`."""
    model, entropies_train = work.policy.model, work.config.objective.entropy_coeff != 0
    if split_head(model) is None:
        return

    def value(hidden: mx.array, arrays: Mapping[str, mx.array]) -> tuple[mx.array, Any]:
        inputs = (model, hidden, arrays, work.config.rollout.temperature)
        logprobs, entropies = target_logprobs(*inputs, entropies_train=entropies_train)
        weighted = (arrays["token_weights"] * logprobs).sum()
        if entropies_train:
            weighted = weighted + (arrays["token_weights"] * entropies).sum()
        # Both are results, as they are inputs of the loss: what is computed only for a gradient is fused differently.
        return weighted, (logprobs, entropies)

    value_and_grad = mx.value_and_grad(value)

    def gradient(*inputs: Any) -> tuple[Any, mx.array]:
        (_, results), gradients = value_and_grad(*inputs)
        return results, gradients

    floats = (x.dtype for _, x in tree_flatten(model.parameters()) if mx.issubdtype(x.dtype, mx.floating))
    batch = work.batch(packed=True)
    shape = (batch["targets"].size, text_part(work.policy.architecture)["hidden_size"])
    hidden = mx.random.normal(shape).astype(next(floats))
    mx.eval(work.compiled(gradient)(hidden, batch))


def body(work: Work) -> None:
    """Compute the gradient of the layers, for the first micro-batch and for one that is added to it."""
    packed = may_pack_rows(work.policy.model)  # without its trial, which `update` does
    batch = work.batch(packed=packed)

    def value(model: Any, arrays: Mapping[str, mx.array]) -> tuple[mx.array, mx.array]:
        outputs = predicting_outputs(model, arrays, packed=packed)
        # With the head's products: a head that is the embedding too adds to the embedding's gradient.
        _, head = split_head(model) or (model, None)
        total = (outputs if head is None else head(outputs)).sum()
        return total, total

    training = work.trained(value)
    work.policy.model.train()
    training.accumulate(batch)
    training.accumulate(batch)


def embedding(work: Work) -> None:
    """Add up the gradient of an embedding that trains: over equal tokens, and over two micro-batches."""
    model = work.policy.model
    table = trained_embedding(model)
    if table is None:
        return
    model.freeze()
    table.unfreeze()

    def value(model: Any, arrays: Mapping[str, mx.array]) -> tuple[mx.array, mx.array]:
        del model
        total = table(arrays["tokens"]).sum()
        return total, total

    training, batch = work.trained(value), work.batch(packed=True)
    training.accumulate(batch)
    training.accumulate(batch)


def step(work: Work) -> None:
    """Clip a gradient, and take an optimizer step with it."""

    def value(model: Any, arrays: Mapping[str, mx.array]) -> tuple[mx.array, mx.array]:
        del arrays
        parameters = [array.sum() for _, array in tree_flatten(model.trainable_parameters())]
        return mx.stack(parameters).sum(), mx.zeros(1)

    training = work.trained(value)
    training.accumulate({})
    training.step(work.config.learner.learning_rate)


def sampling(work: Work) -> None:
    """Sample as a worker does."""
    rollout = work.config.rollout
    if rollout.quantize_for_rollouts:
        work.policy.quantize(rollout.rollout_bits)
    _sample(
        work.policy, sampling_params(work.config), groups=rollout.batch_groups, each=rollout.num_generations
    )


def evaluation(work: Work) -> None:
    """Sample as the evaluator does: greedily, and at its temperature if the settings ask for it."""
    evaluator = work.config.evaluator
    for temperature in (0.0, evaluator.eval_temperature) if evaluator.eval_sampled else (0.0,):
        params = SamplingParams(
            DECODED, temperature, stop=work.config.rollout.stop, compiled=work.config.learner.use_compile
        )
        _sample(work.policy, params, groups=evaluator.eval_batch_size, each=1)


def weights(work: Work) -> None:
    """Publish and adopt a version, and lay out a checkpoint."""
    policy, rollout = work.policy, work.config.rollout
    frozen = freeze(0, policy.trainable())
    memory = memoryview(mmap(-1, frozen.size))
    pinned = pin(memory)
    manifest, data = pack_weights(frozen, 2**20, memory, pinned)
    arrays = unpack(manifest, data, of_this_host=True, pinned=pinned)
    if pinned is not None:
        pinned.close()
    tensor_files.freeze("model", policy.trainable())
    if rollout.quantize_for_rollouts:
        policy.quantize(rollout.rollout_bits)
    policy.load_trainable(arrays)
    mx.eval(policy.model.parameters())


def update(work: Work) -> None:
    """Do whole updates."""
    grpo = Grpo(work.small, work.policy, total_updates=2)
    grpo.update(work.groups)
    grpo.update(work.groups)


#: The parts by name; see `stage.parts_of`.
PARTS: dict[str, Callable[[Work], None]] = {
    part.__name__: part
    for part in (loss, statistics, head, body, embedding, step, sampling, evaluation, weights, update)
}


def _sample(policy: Policy, params: SamplingParams, *, groups: int, each: int) -> None:
    prompts = [_ids(PROMPT_TOKENS - i % PROMPT_TOKENS // 2) for i in range(groups)]
    seeds = [list(range(i * each, (i + 1) * each)) for i in range(groups)]
    sample_groups(policy, prompts, seeds, replace(params, max_new_tokens=DECODED))


def _ids(count: int) -> list[int]:
    ids: list[int] = np.random.default_rng(count).integers(1, IDS, count).tolist()
    return ids


def _completion(length: int, reward: float) -> SampledCompletion:
    logprobs = [-log(IDS)] * length
    return SampledCompletion(_ids(length), logprobs, [0] * length, True, {"reward": reward})
