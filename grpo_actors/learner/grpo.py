"""One GRPO update: the algorithm, in order.

    groups → rewards → advantages → micro-batches → log-probs → loss → gradient → step

Knows the policy, its reference and one batch of groups; refuses to know where the groups come from
and where the weights go. The maths is `objective`'s, the gradient `policy.training`'s.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from grpo_actors.config import Config
from grpo_actors.config.objective import LOSSES
from grpo_actors.errors import TrainingError
from grpo_actors.learner.group_filter import penalties_of, rewards_of
from grpo_actors.learner.groups import SampledGroup
from grpo_actors.learner.report import length_metrics, reward_metrics, staleness
from grpo_actors.objective.advantages import Advantages, compute_advantages
from grpo_actors.objective.batch_loss import objective_loss
from grpo_actors.objective.micro_batches import PROMPT_MULTIPLE, ROW_MULTIPLE, Completion, MicroBatch, pack
from grpo_actors.objective.shaping import top_entropy_masks
from grpo_actors.objective.statistics import add_statistics, summary
from grpo_actors.policy.device import on_cuda
from grpo_actors.policy.logprobs import micro_batch_logprobs
from grpo_actors.policy.model import Policy
from grpo_actors.policy.shared_prompts import shares_prompts
from grpo_actors.policy.training import Training, learning_rate

#: So many steps in a row without a finite gradient, and the run stops with its last good checkpoint.
MAX_SKIPPED_IN_A_ROW = 10

#: Tokens that prompts are padded to a multiple of on CUDA: the gradient of MLX's attention there is one kernel for
#: whole tiles of 128 alone, and computed from its parts otherwise.
CUDA_PROMPT_MULTIPLE = 128

#: So many numbers of rows may a micro-batch have on CUDA, where each shape is compiled.
CUDA_ROW_COUNTS = 4


@dataclass
class Grpo:
    """The policy that learns, and the one operation on it: `update`."""

    config: Config
    #: As it was loaded: what it holds now is the reference.
    policy: Policy
    total_updates: int
    training: Training = field(init=False)
    #: Whether a prompt is computed once for all of its completions, as the model allows it or not.
    shared_prompts: bool = field(init=False)
    #: The reference: what trains, as it was at the start or at the last refresh; None without a KL term. The
    #: arrays are those of the policy itself until that moves on, and a new adapter is the base.
    reference: dict[str, mx.array] | None = field(init=False)
    #: Whether it was ever refreshed: one that was not is what loading the model gives again.
    reference_moved: bool = False
    version: int = 0
    skipped_in_a_row: int = 0
    skipped: int = 0

    def __post_init__(self) -> None:
        self.objective = self.config.objective
        self.shared_prompts = shares_prompts(self.policy.model)
        self.training = Training(self.policy.model, self.config.learner, self._loss)
        self.reference = self.policy.trainable() if self.objective.kl_coeff > 0 else None

    def update(self, groups: Sequence[SampledGroup]) -> dict[str, Any]:
        """One update; returns what there is to tell about it."""
        config, started_s = self.config, time.monotonic()
        advantages = compute_advantages(
            self.objective.advantage,
            [rewards_of(group, config) for group in groups],
            list(config.reward.functions.values()),
            penalties=[penalties_of(group, config) for group in groups]
            if self.objective.overlong_tokens
            else None,
        )
        rows = config.learner.batch_size * config.rollout.num_generations
        packed = pack(
            list(_completions(groups, advantages)),
            rows=rows,
            aggregation=self.objective.aggregation,
            max_new_tokens=config.rollout.max_new_tokens,
            mask_truncated=self.objective.mask_truncated,
            skip_zero_advantage=config.learner.skip_zero_advantage and self._advantage_is_all,
            row_multiple=max(ROW_MULTIPLE, -(-rows // CUDA_ROW_COUNTS)) if on_cuda() else ROW_MULTIPLE,
            shared_prompts=self.shared_prompts,
            prompt_multiple=CUDA_PROMPT_MULTIPLE if self.shared_prompts and on_cuda() else PROMPT_MULTIPLE,
        )
        batches = self._inputs(packed.micro_batches)

        statistics = first_statistics = None
        norm = rate = 0.0
        # Of this update alone, so that a resumed run drops the same inputs (model.lora_dropout).
        mx.random.seed((config.run.seed + self.version) % 2**64)
        for iteration in range(config.learner.num_iterations):
            statistics = None
            for arrays in batches:
                with self._in_training():
                    statistics = add_statistics(statistics, self.training.accumulate(arrays))
            step = self.version * config.learner.num_iterations + iteration
            rate = learning_rate(config.learner, step, self.total_updates * config.learner.num_iterations)
            norm, taken = self.training.step(rate)
            self._guard(taken=taken or not batches, norm=norm)
            first_statistics = statistics if first_statistics is None else first_statistics
        self.version += 1
        self._refresh_reference()
        seconds = time.monotonic() - started_s
        return {
            **self._measured(statistics, first_statistics),
            **reward_metrics(groups, advantages),
            **length_metrics(groups),
            "staleness": staleness(groups, self.version - 1),
            "grad_norm": norm,
            "learning_rate": rate,
            "padding_share": packed.padding_share,
            "skipped_steps": self.skipped,
            "learner_tokens_per_s": packed.tokens * config.learner.num_iterations / seconds,
            "memory_gb": mx.get_peak_memory() / 1e9,
        }

    def _measured(self, statistics: mx.array | None, first: mx.array | None) -> dict[str, float | None]:
        """Return what the loss measured in the last and the first iteration; None where it has nothing to measure."""
        told = summary(statistics)
        if self.reference is None:
            told["kl"] = None  # not measured, which is another thing than 0
        if LOSSES[self.objective.loss].second_bound is None:
            told["clip_delta_share"] = None
        # The gap to the worker's log-probs means something only before this batch has moved the policy.
        before = summary(first)
        return told | {key: before[key] for key in ("logprob_gap_mean", "logprob_gap_max", "mismatch_kl")}

    @contextlib.contextmanager
    def _in_training(self) -> Iterator[None]:
        """Dropout on, and mlx-lm's kernels without a gradient replaced; off again for whoever samples."""
        self.policy.model.train()
        try:
            yield
        finally:
            self.policy.model.eval()

    @property
    def _advantage_is_all(self) -> bool:
        """Whether a completion's gradient is a multiple of its advantage, and nothing else asks for its tokens."""
        objective = self.objective
        return objective.kl_coeff == 0 and objective.entropy_coeff == 0 and objective.top_entropy_share == 1

    def _loss(self, model: Any, arrays: Mapping[str, mx.array]) -> tuple[mx.array, mx.array]:
        """The micro-batch's share of the update's loss, and its statistics."""
        logprobs, entropies = self._logprobs(model, arrays)
        return objective_loss(
            logprobs,
            arrays,
            self.objective,
            reference_logprobs=arrays.get("reference_logprobs"),
            old_logprobs=arrays.get("old_logprobs"),
            entropies=entropies,
            entropy_mask=arrays.get("entropy_mask"),
        )

    def _inputs(self, micro_batches: Sequence[MicroBatch]) -> list[dict[str, mx.array]]:
        """The micro-batches on the device, with what is computed once and takes no gradient."""
        batches = [batch.arrays() for batch in micro_batches]
        if self.reference is not None:
            with self.policy.holding(self.reference):
                for arrays in batches:
                    arrays["reference_logprobs"], _ = self._frozen_logprobs(arrays)
        share = self.objective.top_entropy_share
        if self.objective.ratio == "recorded" and share == 1:
            return batches
        entropies = []
        for arrays in batches:
            arrays["old_logprobs"], entropy = self._frozen_logprobs(arrays)
            entropies.append(np.array(entropy))
        if share < 1:
            masks = top_entropy_masks(entropies, [batch.mask for batch in micro_batches], share=share)
            for arrays, mask in zip(batches, masks, strict=True):
                arrays["entropy_mask"] = mx.array(mask)
        return batches

    def _frozen_logprobs(self, arrays: Mapping[str, mx.array]) -> tuple[mx.array, mx.array]:
        """Log-probs and entropies of the weights that the policy holds now, evaluated: no graph is kept."""
        frozen = self._logprobs(self.policy.model, arrays)
        mx.eval(*frozen)
        return frozen

    def _logprobs(self, model: Any, arrays: Mapping[str, mx.array]) -> tuple[mx.array, mx.array]:
        temperature = self.config.rollout.temperature
        return micro_batch_logprobs(model, arrays, temperature, shared_prompts=self.shared_prompts)

    def _refresh_reference(self) -> None:
        """Every N updates: reference ← α · policy + (1 − α) · reference. TR-DPO, 2404.09656."""
        every, alpha = self.objective.reference_refresh_updates, self.objective.reference_refresh_alpha
        if self.reference is None or not every or self.version % every:
            return
        policy = self.policy.trainable()
        self.reference = {
            name: (alpha * policy[name].astype(mx.float32) + (1 - alpha) * old.astype(mx.float32)).astype(
                old.dtype
            )
            for name, old in self.reference.items()
        }
        mx.eval(self.reference)
        self.reference_moved = True

    def restore_reference(self, arrays: dict[str, mx.array]) -> None:
        """Go on from a refreshed reference, unless none is needed any more."""
        if self.reference is not None:
            self.reference, self.reference_moved = arrays, True

    def _guard(self, *, taken: bool, norm: float) -> None:
        if taken:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row had no finite gradient (norm {norm}); the weights are those "
                "of the last good step; lower learner.learning_rate, or use model.dtype = float32"
            )


def _completions(groups: Sequence[SampledGroup], advantages: Sequence[Advantages]) -> Iterator[Completion]:
    for group, advantage in zip(groups, advantages, strict=True):
        for completion, value, valid in zip(
            group.completions, advantage.values, advantage.valid, strict=True
        ):
            yield Completion(
                prompt_ids=group.prompt,
                completion_ids=completion.tokens,
                behaviour_logprobs=completion.logprobs,
                advantage=float(value),
                valid=bool(valid),
                truncated=not completion.finished,
                sampled=completion.sampled if completion.inserted else None,
            )
