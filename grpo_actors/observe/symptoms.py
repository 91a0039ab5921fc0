"""The signs that something is wrong with a run: from what was measured to one line with the likely cause.

Each rule is a pure function of `Memory`: the fact with its number, the threshold's name, the likely cause,
what to do; None while it does not hold. To add a rule: one function and one row in `RULES`.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_actors.config import Config

Metrics = Mapping[str, Any]

#: A single update may be extreme by one odd token; so many in a row are not.
CONFIRMING_UPDATES = 3
#: Built-in rewards that ask for an answer in its tags, right or wrong.
FORMAT_REWARDS = ("strict_format", "soft_format", "xml_count", "integer")


@dataclass(slots=True)
class Memory:
    """What the rules look at."""

    #: Of the run, with `reward.functions` resolved.
    config: Config
    #: The newest updates; `Health` bounds their number.
    updates: deque[Metrics]
    #: Mean completion length of each of the first `patience_updates` updates, tokens.
    first_lengths: list[float]

    @property
    def last(self) -> Metrics:
        """The update that has just been done."""
        return self.updates[-1]

    def held(self, count: int, holds: Callable[[Metrics], bool]) -> bool:
        """Whether there were `count` updates, and `holds` said yes to each of the last."""
        newest = list(self.updates)[-count:]
        return len(newest) == count and all(map(holds, newest))

    def held_long(self, holds: Callable[[Metrics], bool]) -> bool:
        """The same for `patience_updates`."""
        return self.held(self.config.health.patience_updates, holds)

    @property
    def trained(self) -> list[Metrics]:
        """Of the updates those in which a token trained: in the others nothing of the loss was measured."""
        return [update for update in self.updates if _trained(update)]

    @property
    def for_long(self) -> str:
        """How an alarm says that it has waited."""
        return f"for {self.config.health.patience_updates} updates (health.patience_updates)"


def reward_is_zero(memory: Memory) -> str | None:
    """Nothing was worth anything for long: there is nothing to learn from."""
    if not memory.held_long(_is_worth_nothing):
        return None
    fact = "the reward is 0" if memory.last["reward_mean"] == 0 else "no completion has a valid reward"
    return f"{fact} {memory.for_long}: {_why_nothing(memory)}"


def no_variance(memory: Memory) -> str | None:
    """The completions of each problem were worth the same for long: every advantage is 0."""
    if reward_is_zero(memory) or not memory.held_long(lambda m: value(m, "zero_variance_share") == 1):
        return None
    reward = value(memory.last, "reward_mean")
    best = sum(weight for weight in memory.config.reward.functions.values() if weight > 0)
    fact = f"all completions of a problem are worth the same {memory.for_long}, mean reward {reward:.3g}"
    if abs(reward - best) <= 0.05 * best:
        return f"{fact}: the problems are solved every time; pose harder ones, or end here"
    in_vain = "others were sampled in vain (selection.refill_limit); pose other problems"
    cure = in_vain if memory.config.selection.dynamic_sampling else "set selection.dynamic_sampling = true"
    return (
        f"{fact}: the problems are too easy or too hard, or the samples are all alike; "
        f"{cure}, or raise rollout.temperature"
    )


def gradient_is_zero(memory: Memory) -> str | None:
    """There are advantages, and yet no gradient."""
    held = memory.held(
        CONFIRMING_UPDATES,
        lambda m: value(m, "grad_norm") == 0 and value(m, "zero_variance_share") < 1,
    )
    if not held:
        return None
    fact = f"the gradient is 0 for {CONFIRMING_UPDATES} updates though rewards differ"
    if not _trained(memory.last):
        return (
            f"{fact}: no token trains, {value(memory.last, 'truncated_share'):.0%} of the completions are truncated; "
            "raise rollout.max_new_tokens, or set objective.mask_truncated = false"
        )
    clipped = value(memory.last, "clip_share")
    if clipped > 0.5:
        return f"{fact}: {clipped:.0%} of the tokens are clipped; raise objective.clip_eps"
    return f"{fact}: nothing that trains reaches the loss; look at model.lora_keys and model.lora_layers"


def kl_explodes(memory: Memory) -> str | None:
    """The policy has left its reference."""
    limit = memory.config.health.max_kl
    if not memory.held(CONFIRMING_UPDATES, lambda m: value(m, "kl") > limit):
        return None
    return (
        f"KL to the reference is {value(memory.last, 'kl'):.3g} nats a token (health.max_kl = {limit:g}): "
        "the policy runs away; lower learner.learning_rate, or raise objective.kl_coeff"
    )


def ratio_explodes(memory: Memory) -> str | None:
    """The policy that trains is far from the one that sampled."""
    limit = memory.config.health.max_ratio
    if not memory.held(CONFIRMING_UPDATES, lambda m: value(m, "ratio_max") > limit):
        return None
    return (
        f"the largest importance ratio is {value(memory.last, 'ratio_max'):.3g} (health.max_ratio = {limit:g}): "
        "an update moves the policy too far; lower learner.learning_rate, learner.num_iterations "
        "or rollout.max_staleness"
    )


def workers_disagree(memory: Memory) -> str | None:
    """Worker and learner give the same tokens other probabilities."""
    health = memory.config.health
    limits = (("logprob_gap_mean", health.max_logprob_gap), ("mismatch_kl", health.max_mismatch_kl))
    newest = memory.trained[-CONFIRMING_UPDATES:]
    exceeds = [any(value(update, key) > limit for key, limit in limits) for update in newest]
    if len(newest) < CONFIRMING_UPDATES or not all(exceeds):
        return None
    gap, gap_max, kl = (
        value(newest[-1], key) for key in ("logprob_gap_mean", "logprob_gap_max", "mismatch_kl")
    )
    return (
        f"log-probs of worker and learner differ by {gap:.3g} nats on average, {gap_max:.3g} at most, KL {kl:.3g} "
        f"(health.max_logprob_gap = {health.max_logprob_gap:g}, health.max_mismatch_kl = "
        f"{health.max_mismatch_kl:g}): {_why_disagree(memory)}"
    )


def entropy_collapses(memory: Memory) -> str | None:
    """The policy has stopped exploring."""
    limit = memory.config.health.min_entropy
    trained = memory.trained
    # Where nearly all samples are the same, many updates have no advantage, and measure nothing: that refutes nothing.
    collapsed = memory.held_long(lambda m: not _trained(m) or value(m, "entropy") < limit)
    if not collapsed or len(trained) < CONFIRMING_UPDATES:
        return None
    return (
        f"entropy is {value(trained[-1], 'entropy'):.3g} nats a token {memory.for_long}, health.min_entropy = "
        f"{limit:g}: nearly every sample is the same; raise objective.clip_eps_high or objective.entropy_coeff, "
        "or lower learner.learning_rate"
    )


def length_runs_away(memory: Memory) -> str | None:
    """Completions have become much longer than they were."""
    patience, growth = memory.config.health.patience_updates, memory.config.health.max_length_growth
    first = sum(memory.first_lengths) / len(memory.first_lengths)
    if not memory.held_long(lambda m: value(m, "completion_length_mean") > growth * first):
        return None
    now = value(memory.last, "completion_length_mean")
    return (
        f"completions have {now:.0f} tokens, at first {first:.0f} (health.max_length_growth = {growth:g}, for "
        f"{patience} updates): length pays, or the end token is forgotten; try objective.aggregation = "
        '"dr_grpo", objective.overlong_tokens, or a reward for brevity'
    )


def too_many_truncated(memory: Memory) -> str | None:
    """Most completions never come to an end."""
    limit = memory.config.health.max_truncated_share
    if reward_is_zero(memory) or not memory.held_long(lambda m: value(m, "truncated_share") > limit):
        return None
    return (
        f"{value(memory.last, 'truncated_share'):.0%} of the completions are cut {memory.for_long}, "
        f"health.max_truncated_share = {limit:g}: rollout.max_new_tokens = "
        f"{memory.config.rollout.max_new_tokens} is too few for an answer; raise it, or ask for short answers"
    )


def always_stale(memory: Memory) -> str | None:
    """All groups wait as long as they may. With a bound of 1 that is what sampling ahead means."""
    bound = memory.config.rollout.max_staleness
    if bound < 2 or not memory.held_long(lambda m: list(m.get("staleness", {})) == [str(bound)]):
        return None
    fact = f"all groups are {bound} updates old {memory.for_long}, the bound of rollout.max_staleness"
    waits = value(memory.last, "learner_wait_share")
    if waits < 0.5:
        return (
            f"{fact}: the learner is the slower half ({waits:.0%} of its time waiting) and the groups queue up; "
            "lower rollout.max_staleness, or use fewer workers"
        )
    return (
        f"{fact}: the workers are the slower half (the learner waits {waits:.0%} of its time) and hold a lease "
        "for long; use more workers, or lower rollout.batch_groups"
    )


def learning_rate_is_zero(memory: Memory) -> str | None:
    """Steps are taken and change nothing."""
    if not memory.held(CONFIRMING_UPDATES, lambda m: value(m, "learning_rate") == 0):
        return None
    return (
        f"the learning rate is 0 for {CONFIRMING_UPDATES} updates: nothing is learned; "
        f"learner.learning_rate = {memory.config.learner.learning_rate:g}, set it above 0"
    )


def steps_are_skipped(memory: Memory) -> str | None:
    """Steps without a finite gradient, which leave the weights as they were."""
    limit, patience = memory.config.health.max_skipped_steps, memory.config.health.patience_updates
    counts = [value(metrics, "skipped_steps") for metrics in memory.updates][-patience - 1 :]
    skipped = counts[-1] - counts[0]
    if not skipped > limit:
        return None
    return (
        f"{skipped:.0f} steps within {len(counts) - 1} updates had no finite gradient "
        f"(health.max_skipped_steps = {limit}): numbers overflow; lower learner.learning_rate, "
        'or set model.dtype = "float32"'
    )


#: Alarm -> its rule. In this order they are told.
RULES: Mapping[str, Callable[[Memory], str | None]] = {
    "reward is zero": reward_is_zero,
    "no variance": no_variance,
    "gradient is zero": gradient_is_zero,
    "KL explodes": kl_explodes,
    "ratio explodes": ratio_explodes,
    "workers disagree": workers_disagree,
    "entropy collapses": entropy_collapses,
    "length runs away": length_runs_away,
    "truncated": too_many_truncated,
    "always stale": always_stale,
    "learning rate is zero": learning_rate_is_zero,
    "steps are skipped": steps_are_skipped,
}


# --- what they share ------------------------------------------------------------------------------


def value(metrics: Metrics, key: str) -> float:
    """The number at `key`, NaN where there is none: then every comparison says no."""
    measured = metrics.get(key)
    return float(measured) if isinstance(measured, int | float) else math.nan


def _is_worth_nothing(metrics: Metrics) -> bool:
    """All completions have the reward 0, or none has a valid one (the mean of none is None)."""
    mean = metrics.get("reward_mean", math.nan)
    return mean is None or (mean == 0 and value(metrics, "reward_std") == 0)


def _trained(metrics: Metrics) -> bool:
    """Whether the loss had a token: without one nothing of it was measured."""
    return value(metrics, "ratio_mean") > 0


def _why_nothing(memory: Memory) -> str:
    """The likely cause of rewards that are 0, the most certain one first."""
    last, config = memory.last, memory.config
    if last["reward_mean"] is None:
        return (
            "no reward function gives a value (None, an error, or longer than reward.reward_timeout_s); "
            "see the warnings in the log"
        )
    truncated, length = value(last, "truncated_share"), value(last, "completion_length_mean")
    if truncated >= 0.5:
        return (
            f"{truncated:.0%} of the completions are cut before an answer; "
            f"raise rollout.max_new_tokens (now {config.rollout.max_new_tokens})"
        )
    if length < 2:
        return f"the completions are empty ({length:.2g} tokens); does the model have this chat template?"
    means = last.get("rewards", {})
    formats = [name for name in FORMAT_REWARDS if means.get(name) == 0]
    if formats:
        return (
            f"no answer tag is found ({', '.join(formats)} = 0 as well); ask for the format in data.system_prompt, "
            "show it with data.num_shots, or start from a model that knows it"
        )
    return (
        f"every completion gets 0 from {', '.join(means)}: the problems are too hard, or answers are not "
        "written as the reward expects; read completions.jsonl"
    )


def _why_disagree(memory: Memory) -> str:
    """The likely cause of log-probs that differ."""
    rollout, model = memory.config.rollout, memory.config.model
    if model.fine_tune_type != "full" and model.lora_dropout and memory.config.objective.ratio == "recorded":
        return (
            'only the learner\'s see dropout; set model.lora_dropout = 0, or objective.ratio = "recomputed"'
        )
    if rollout.quantize_for_rollouts:
        return "the workers quantise; raise rollout.rollout_bits, or set quantize_for_rollouts = false"
    if any(lag != "0" for lag in memory.last.get("staleness", {})):
        return "the policy moves far between sampling and training; lower learner.learning_rate or rollout.max_staleness"
    return (
        "the same weights compute otherwise there, or a replay has parted from the recorded policy; "
        'try model.dtype = "float32", top_p = 1, top_k = 0 and min_p = 0'
    )
