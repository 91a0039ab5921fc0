"""One GRPO update: the algorithm, in order.

    groups → rewards → advantages → micro-batches → log-probs → loss → gradient → step

Depends on the policy, its reference and one batch of groups, not on where the groups come from or where the
weights go. The maths is in `objective`, the gradient and the step in `policy.training`.
"""

import contextlib
import functools
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import mlx.core as mx
import numpy as np

from grpo_actors.config import Config
from grpo_actors.config.objective import LOSSES
from grpo_actors.errors import TrainingError
from grpo_actors.learner.gaps import gaps_by_lease, mean_gaps
from grpo_actors.learner.group_filter import penalties_of, rewards_of
from grpo_actors.learner.groups import SampledGroup
from grpo_actors.learner.ranks import Ranks, Share
from grpo_actors.learner.report import (
    length_metrics,
    reward_metrics,
    source_metrics,
    staleness,
    thinking_metrics,
)
from grpo_actors.objective.advantages import Advantages, compute_advantages
from grpo_actors.objective.batch_loss import objective_loss
from grpo_actors.objective.micro_batches import Completion, Layout, MicroBatch, empty_micro_batch, pack
from grpo_actors.objective.shaping import top_entropy_masks
from grpo_actors.objective.statistics import add_statistics, completion_gaps, summary, token_mismatches
from grpo_actors.policy.device import on_cuda
from grpo_actors.policy.expert_load import has_experts, largest_load, watched_experts
from grpo_actors.policy.gpu_rows import cuda_row
from grpo_actors.policy.logprobs import micro_batch_logprobs
from grpo_actors.policy.model import Policy
from grpo_actors.policy.packed_rows import packs_rows
from grpo_actors.policy.recurrent_layers import for_whole_texts
from grpo_actors.policy.training import AddUp, Training, learning_rate
from grpo_actors.progress import report_progress
from grpo_actors.schedule.quarantine import Gap

#: Consecutive steps without a finite gradient after which the run ends, with its last good checkpoint.
MAX_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True, slots=True)
class Step:
    """What is known of one optimizer step."""

    #: Statistics of each micro-batch of the update, of all ranks.
    statistics: Sequence[mx.array]
    #: Norm of the gradient.
    norm: float
    #: Learning rate.
    rate: float

    @property
    def total(self) -> mx.array | None:
        """The statistics of all micro-batches together; None if there are none."""
        return functools.reduce(add_statistics, self.statistics, None)


def layout_of(config: Config, *, packed: bool) -> Layout:
    """Return the sizes of micro-batches; `packed`: whether the model computes several completions in a row."""
    rollout = config.rollout
    completions = config.learner.batch_size * rollout.num_generations
    layout = Layout(config.micro_batch_tokens, completions, shared=packed)
    if not on_cuda():
        return layout
    # Shorter completions fill the same tokens, in greater numbers.
    return replace(
        layout,
        completions=4 * completions,
        fixed_row=cuda_row(packed=packed),
        longest=rollout.max_new_tokens,
    )


@dataclass
class Grpo:
    """The policy that learns, with its optimizer and its reference; `update` is the one operation on it."""

    config: Config
    #: As loaded: the weights that it holds when this object is made are the reference.
    policy: Policy
    total_updates: int
    #: The processes that share each update.
    ranks: Ranks = field(default_factory=Ranks)
    training: Training = field(init=False)
    #: The reference: the trainable arrays at the start or at the last refresh; None without a KL term. Until the
    #: first step they are the policy's own arrays, not copies. A new adapter is the base model, as it changes nothing.
    reference: dict[str, mx.array] | None = field(init=False)
    #: Whether the reference was ever refreshed. If not, loading the model gives it again; no checkpoint stores it.
    reference_refreshed: bool = False
    version: int = 0
    #: Steps without a finite gradient: consecutive ones up to now, and all of the run.
    skipped_in_a_row: int = 0
    skipped: int = 0
    #: Lease -> gaps of the completions that the last update computed.
    gaps: dict[int, list[Gap]] = field(init=False, default_factory=dict)
    #: With metrics.record_groups: of the last update, number of a completion, counted over all groups -> of each of its
    #: tokens, its log-prob before the update minus the one reported by the sampler. Only what was computed.
    log_ratios: dict[int, list[float]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.objective = self.config.objective
        owned = self.ranks.owned(self.policy.trainable())
        self.training = Training(self.policy.model, self.config.learner, self._loss, owned=owned)
        self.reference = self.policy.trainable() if self.objective.kl_coeff > 0 else None

    @cached_property
    def layout(self) -> Layout:
        """The sizes of micro-batches; the first read tries on the model whether completions may share a row."""
        layout = layout_of(self.config, packed=packs_rows(self.policy.model))
        return replace(layout, ranks=self.ranks.dealt_among)

    def warm_up(self) -> None:
        """Compute the gradient of padding and drop it: on CUDA this plans and compiles the gradient of the first update.

        Call it while the workers sample their first batch.
        """
        if not self.layout.fixed_row:
            return
        longest = self.config.data.max_prompt_length + self.config.rollout.max_new_tokens
        [arrays] = self._inputs(_alone([empty_micro_batch(self.layout, longest)]), Ranks())
        for _ in range(2):  # the first micro-batch of an update, and one that adds to its gradient
            with self._training_mode():
                self.training.accumulate(arrays, self._add_up_alone)
        self.training.forget_gradient()

    def rehearse(
        self, completions: Sequence[Completion], *, gradient: bool
    ) -> tuple[float, float, float | None]:
        """Compute an update on `completions` as far as its gradient, and drop it.

        Args:
            completions: Completions with their log-probs as sampled.
            gradient: Whether to compute the gradient; without it, the log-probs are those of a forward pass.

        Returns:
            The largest and the mean difference of a sampled token's log-prob from the learner's, in nats; and the norm of
            the gradient that this rank holds, None without one.
        """
        packed = pack(
            completions,
            self.layout,
            aggregation=self.objective.aggregation,
            max_new_tokens=self.config.rollout.max_new_tokens,
        )
        gaps, statistics = [], None
        for arrays in self._inputs(_alone(packed.micro_batches), Ranks()):
            if gradient:
                with self._training_mode():
                    measured = self.training.accumulate(arrays, self._add_up_alone)
                    statistics = add_statistics(statistics, measured)
            else:
                logprobs, _ = self._frozen_logprobs(arrays)
                gap = mx.abs(logprobs - arrays["behaviour_logprobs"])
                gaps.append(np.array(gap)[np.array(arrays["mask"])])
        if gradient:
            norm = self.training.norm()
            self.training.forget_gradient()
            found = summary(statistics)
            return float(found["logprob_gap_max"] or 0), float(found["logprob_gap_mean"] or 0), norm
        every = np.concatenate(gaps)
        return float(every.max()), float(every.mean()), None

    def update(self, groups: Sequence[SampledGroup]) -> dict[str, Any]:
        """Do one update on the groups, and return its metrics."""
        config, started_s = self.config, time.monotonic()
        advantages = compute_advantages(
            self.objective.advantage,
            [rewards_of(group, config) for group in groups],
            list(config.reward.functions.values()),
            penalties=[penalties_of(group, config) for group in groups]
            if self.objective.overlong_tokens
            else None,
        )
        packed = pack(
            list(_completions(groups, advantages)),
            self.layout,
            aggregation=self.objective.aggregation,
            max_new_tokens=config.rollout.max_new_tokens,
            mask_truncated=self.objective.mask_truncated,
            skip_zero_advantage=config.learner.skip_zero_advantage and self._only_advantage_trains,
        )
        steps = self.learn(self.ranks.deal(packed.micro_batches))
        # Completion -> sum over its tokens, before this batch has moved the policy.
        gaps: dict[int, float] = {}
        self.log_ratios = {}
        for numbers, part, vector in zip(
            packed.numbers, packed.micro_batches, steps[0].statistics, strict=True
        ):
            gaps.update(zip(numbers, completion_gaps(vector), strict=False))  # padding follows
            if config.metrics.record_groups:
                ratios = token_mismatches(vector, part.mask.shape)
                self.log_ratios.update(zip(numbers, ratios.tolist(), strict=False))
        self.gaps = gaps_by_lease(groups, gaps, self.version - 1)
        seconds = time.monotonic() - started_s
        loads = [float(vector[-1]) for vector in steps[0].statistics]
        return {
            **self._measured(steps[-1].total, steps[0].total),
            "logprob_gaps": mean_gaps(groups, self.gaps),
            **reward_metrics(groups, advantages),
            **source_metrics(groups, advantages),
            **length_metrics(groups),
            **thinking_metrics(groups, self.policy),
            "expert_load_max": fmean(loads) if loads and has_experts(self.policy.model) else None,
            "staleness": staleness(groups, self.version - 1),
            "grad_norm": steps[-1].norm,
            "learning_rate": steps[-1].rate,
            "padding_share": packed.padding_share,
            "skipped_steps": self.skipped,
            "learner_tokens_per_s": packed.tokens * config.learner.num_iterations / seconds,
            "memory_gb": mx.get_peak_memory() / 1e9,
        }

    def learn(self, share: Share) -> list[Step]:
        """Take the optimizer steps of one update with this rank's share of its micro-batches, and all others with theirs.

        Returns:
            The steps, one for each iteration.
        """
        config, steps = self.config, []
        batches = self._inputs(share, self.ranks)
        for iteration in range(config.learner.num_iterations):
            statistics = []
            with self._training_mode():
                for number, arrays in zip(share.numbers, batches, strict=True):
                    self._seed_dropout(iteration, number)
                    measured = self.training.accumulate(arrays, self.ranks.add_each)
                    statistics.append(np.array(measured))
                    report_progress()
            self.ranks.add_gradients(share, self.training, self.policy.partial_gradients)
            every = [mx.array(vector) for vector in self.ranks.collect(share, statistics)]
            step = self.version * config.learner.num_iterations + iteration
            rate = learning_rate(config.learner, step, self.total_updates * config.learner.num_iterations)
            norm, taken = self.training.step(rate, self.ranks.agree)
            if taken:
                self.ranks.share_weights(self.training)
            self._count_step(taken=taken or not share.total, norm=norm)
            steps.append(Step(every, norm, rate))
        self.version += 1
        self._refresh_reference()
        return steps

    @property
    def _add_up_alone(self) -> AddUp | None:
        """What takes the place of `Ranks.add_each` where this rank computes without the others: its gradient is the sum."""
        return None if self.ranks.add_each is None else lambda _: None

    def _seed_dropout(self, iteration: int, number: int) -> None:
        """Make what micro-batch `number` drops (model.lora_dropout) depend on nothing else: no resume and no rank."""
        key = (self.config.run.seed, self.version, iteration, number)
        mx.random.seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8]))

    def _measured(self, statistics: mx.array | None, first: mx.array | None) -> dict[str, float | None]:
        """Return the statistics of the loss; a value is None if this objective does not have it.

        Args:
            statistics: Those of the last iteration.
            first: Those of the first iteration.
        """
        measured = summary(statistics)
        if self.reference is None:
            measured["kl"] = None  # not measured, which is not the same as 0
        if LOSSES[self.objective.loss].second_bound is None:
            measured["clip_delta_share"] = None
        # The gap to the worker's log-probs is meaningful only before this batch has moved the policy.
        before = summary(first)
        return measured | {key: before[key] for key in ("logprob_gap_mean", "logprob_gap_max", "mismatch_kl")}

    @contextlib.contextmanager
    def _training_mode(self) -> Iterator[None]:
        """Switch dropout on and mlx-lm's kernels without a gradient off; switch back afterwards, for sampling."""
        self.policy.model.train()
        try:
            with for_whole_texts(self.policy.model):
                yield
        finally:
            self.policy.model.eval()

    @property
    def _only_advantage_trains(self) -> bool:
        """Whether a completion's gradient is proportional to its advantage, and nothing else reads its tokens."""
        objective = self.objective
        return objective.kl_coeff == 0 and objective.entropy_coeff == 0 and objective.top_entropy_share == 1

    def _loss(self, model: Any, arrays: Mapping[str, mx.array]) -> tuple[mx.array, mx.array]:
        """Return the micro-batch's share of the update's loss, and its statistics, those of experts last."""
        with watched_experts() as choices:
            logprobs, entropies = self._logprobs(model, arrays)
        loss, statistics = objective_loss(
            logprobs,
            arrays,
            self.objective,
            reference_logprobs=arrays.get("reference_logprobs"),
            old_logprobs=arrays.get("old_logprobs"),
            entropies=entropies,
            entropy_mask=arrays.get("entropy_mask"),
            keeps_tokens=self.config.metrics.record_groups,
        )
        if choices:  # the last element
            statistics = mx.concatenate([statistics, largest_load(choices, arrays)[None]])
        return loss, statistics

    def _inputs(self, share: Share, ranks: Ranks) -> list[dict[str, mx.array]]:
        """Move the micro-batches to the device, and add what is computed once and without a gradient.

        These are the log-probs of the reference and of the old policy, and the mask of the top-entropy tokens, for which
        `ranks` know the entropies of the whole update.
        """
        batches = [batch.arrays() for batch in share.micro_batches]
        if self.reference is not None:
            with self.policy.holding(self.reference):
                for arrays in batches:
                    arrays["reference_logprobs"], _ = self._frozen_logprobs(arrays)
        top = self.objective.top_entropy_share
        if self.objective.ratio == "recorded" and top == 1:
            return batches
        entropies = []
        for arrays, batch in zip(batches, share.micro_batches, strict=True):
            arrays["old_logprobs"], entropy = self._frozen_logprobs(arrays)
            entropies.append(np.where(batch.mask, np.array(entropy), -np.inf))
        if top < 1:
            every = ranks.collect(share, entropies)
            masks = top_entropy_masks(every, [entropy != -np.inf for entropy in every], share=top)
            for arrays, number in zip(batches, share.numbers, strict=True):
                arrays["entropy_mask"] = mx.array(masks[number])
        return batches

    def _frozen_logprobs(self, arrays: Mapping[str, mx.array]) -> tuple[mx.array, mx.array]:
        """Return log-probs and entropies under the policy's present weights, already evaluated: no graph is kept."""
        with for_whole_texts(self.policy.model):
            frozen = self._logprobs(self.policy.model, arrays)
        mx.eval(*frozen)
        report_progress()
        return frozen

    def _logprobs(self, model: Any, arrays: Mapping[str, mx.array]) -> tuple[mx.array, mx.array]:
        return micro_batch_logprobs(
            *(model, arrays, self.config.rollout.temperature),
            packed=self.layout.shared,
            entropies_train=self.objective.entropy_coeff != 0,
        )

    def _refresh_reference(self) -> None:
        """Every N updates, set reference ← α · policy + (1 − α) · reference. TR-DPO, 2404.09656."""
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
        self.reference_refreshed = True

    def restore_reference(self, arrays: dict[str, mx.array]) -> None:
        """Continue from a refreshed reference; do nothing if the run no longer has a KL term."""
        if self.reference is not None:
            self.reference, self.reference_refreshed = arrays, True

    def _count_step(self, *, taken: bool, norm: float) -> None:
        """Count a skipped step; raise `TrainingError` if too many were skipped in a row."""
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


def _alone(micro_batches: Sequence[MicroBatch]) -> Share:
    """Return a share of all of these, for what one rank computes without the others."""
    return Ranks().deal(micro_batches)


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
                sampled=completion.sampled if completion.inserted or completion.forced else None,
            )
