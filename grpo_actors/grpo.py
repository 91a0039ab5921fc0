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
from grpo_actors.errors import TrainingError
from grpo_actors.groups import SampledGroup
from grpo_actors.objective.advantages import Advantages, compute_advantages
from grpo_actors.objective.batch import Completion, MicroBatch, pack
from grpo_actors.objective.objective import Objective, objective_loss
from grpo_actors.objective.statistics import add_statistics, summary
from grpo_actors.policy.logprobs import completion_logprobs
from grpo_actors.policy.model import Policy
from grpo_actors.policy.training import Training, learning_rate
from grpo_actors.report import length_metrics, reward_metrics, staleness

#: So many steps in a row without a finite gradient, and the run stops with its last good checkpoint.
MAX_SKIPPED_IN_A_ROW = 10


@dataclass
class Grpo:
    """The policy that learns, and the one operation on it: `update`."""

    config: Config
    policy: Policy
    #: A frozen copy of the base; None where the adapter is switched off instead, or no KL is asked for.
    reference: Policy | None
    objective: Objective
    total_updates: int
    training: Training = field(init=False)
    version: int = 0
    skipped_in_a_row: int = 0
    skipped: int = 0

    def __post_init__(self) -> None:
        self.training = Training(self.policy.model, self.config.learner, self._loss)

    def update(self, groups: Sequence[SampledGroup]) -> dict[str, Any]:
        """One update; returns what there is to tell about it."""
        config, started_s = self.config, time.monotonic()
        advantages = compute_advantages(
            self.objective.advantage,
            [self._rewards(group) for group in groups],
            list(config.reward.functions.values()),
        )
        packed = pack(
            list(_completions(groups, advantages)),
            rows=config.learner.batch_size * config.rollout.num_generations,
            aggregation=self.objective.aggregation,
            max_new_tokens=config.rollout.max_new_tokens,
            mask_truncated=self.objective.mask_truncated,
        )
        batches = [self._arrays(batch) for batch in packed.micro_batches]

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
        seconds = time.monotonic() - started_s
        told = summary(statistics)
        # The gap to the worker's log-probs means something only before this batch has moved the policy.
        before = summary(first_statistics)
        told |= {key: before[key] for key in ("logprob_gap_mean", "logprob_gap_max", "mismatch_kl")}
        return {
            **told,
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

    @contextlib.contextmanager
    def _in_training(self) -> Iterator[None]:
        """Dropout on, and mlx-lm's kernels without a gradient replaced; off again for whoever samples."""
        self.policy.model.train()
        try:
            yield
        finally:
            self.policy.model.eval()

    def _loss(self, model: Any, arrays: Mapping[str, mx.array]) -> tuple[mx.array, mx.array]:
        """The micro-batch's share of the update's loss, and its statistics."""
        logprobs, entropies = completion_logprobs(
            model, arrays["tokens"], arrays["start"], arrays["targets"], self.config.rollout.temperature
        )
        return objective_loss(
            logprobs,
            arrays,
            self.objective,
            reference_logprobs=arrays.get("reference_logprobs"),
            old_logprobs=arrays.get("old_logprobs"),
            entropies=entropies,
        )

    def _arrays(self, batch: MicroBatch) -> dict[str, mx.array]:
        """A micro-batch on the device, with the log-probs that take no gradient."""
        arrays = batch.arrays()
        if self.objective.kl_coeff > 0:
            if self.reference is not None:
                arrays["reference_logprobs"] = self._frozen_logprobs(self.reference, arrays)
            else:
                with self.policy.adapter_off():
                    arrays["reference_logprobs"] = self._frozen_logprobs(self.policy, arrays)
        if self.objective.ratio == "recomputed":
            arrays["old_logprobs"] = self._frozen_logprobs(self.policy, arrays)
        return arrays

    def _frozen_logprobs(self, policy: Policy, arrays: Mapping[str, mx.array]) -> mx.array:
        logprobs, _ = completion_logprobs(
            policy.model,
            arrays["tokens"],
            arrays["start"],
            arrays["targets"],
            self.config.rollout.temperature,
        )
        mx.eval(logprobs)
        return logprobs

    def _rewards(self, group: SampledGroup) -> np.ndarray[Any, np.dtype[np.float64]]:
        """[G, K] float64, NaN where a reward function gave none."""
        return np.array(
            [
                [
                    np.nan if (value := c.rewards.get(name)) is None else value
                    for name in self.config.reward.functions
                ]
                for c in group.completions
            ],
            dtype=np.float64,
        )

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
            )
