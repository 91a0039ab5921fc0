"""Define the alarm rules: from a run's metrics to one line with the likely cause.

Each rule is a pure function of `RuleInput`. It returns the fact with its number, the threshold's name, the
likely cause and what to do; None while it does not hold. To add a rule: one function and one row in `RULES`.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_actors.config import Config

Metrics = Mapping[str, Any]

#: Updates in a row that confirm an extreme value; in a single update one odd token may cause it.
CONFIRMING_UPDATES = 3
#: Built-in rewards that check only the tags around an answer, right or wrong.
FORMAT_REWARDS = ("strict_format", "soft_format", "xml_count", "integer", "think_format")
#: Cause and cure of completions that nothing ends.
NO_END = (
    "the model's chat template ends a turn with no token that ends a completion; "
    "set rollout.stop to the text that ends one, or data.chat_template to another template"
)


@dataclass(slots=True)
class RuleInput:
    """The input of the rules: settings and recent metrics."""

    #: The run's settings, with `reward.functions` resolved.
    config: Config
    #: Metrics of the newest updates; `Health` bounds their number.
    updates: deque[Metrics]
    #: Mean completion length, in tokens, of each of the first `patience_updates` updates.
    first_lengths: list[float]
    #: Whether the chat template ends a turn with a token that ends a completion.
    ends_turns: bool = True
    #: Whether a single update is judged, as before a run. Otherwise a rule must hold for several updates.
    at_once: bool = False

    @property
    def last(self) -> Metrics:
        """The metrics of the newest update."""
        return self.updates[-1]

    def held(self, count: int, holds: Callable[[Metrics], bool]) -> bool:
        """Return whether there are `count` updates and `holds` is true for each of the last `count`."""
        newest = list(self.updates)[-count:]
        return len(newest) == count and all(map(holds, newest))

    @property
    def confirming(self) -> int:
        """Number of updates that confirm an extreme value."""
        return 1 if self.at_once else CONFIRMING_UPDATES

    @property
    def patience(self) -> int:
        """Number of updates after which a state that may be passing counts."""
        return 1 if self.at_once else self.config.health.patience_updates

    def held_long(self, holds: Callable[[Metrics], bool]) -> bool:
        """Return the same for the last `patience` updates."""
        return self.held(self.patience, holds)

    @property
    def recent(self) -> list[Metrics]:
        """The metrics of the last `patience` updates, or of all if there were fewer."""
        return list(self.updates)[-self.patience :]

    @property
    def recent_completions(self) -> int:
        """Number of completions in these updates."""
        return sum(update.get("completions") or 0 for update in self.recent)

    @property
    def trained(self) -> list[Metrics]:
        """The updates in which at least one token trained; the others have no loss metrics."""
        return [update for update in self.updates if _trained(update)]

    @property
    def for_long(self) -> str:
        """The words in an alarm for how long it has held."""
        if self.at_once:
            return "in one update"
        return f"for {self.config.health.patience_updates} updates (health.patience_updates)"


def reward_is_zero(rule_input: RuleInput) -> str | None:
    """Check for rewards that are all 0 for long: there is nothing to learn from."""
    if not rule_input.held_long(_has_no_reward):
        return None
    fact = "the reward is 0" if rule_input.last["reward_mean"] == 0 else "no completion has a valid reward"
    return f"{fact} {rule_input.for_long}: {_why_no_reward(rule_input)}"


def reward_fails(rule_input: RuleInput) -> str | None:
    """Check for a reward function that fails for some completions, or for all."""
    failed: Counter[str] = Counter()
    for update in rule_input.recent:
        failed.update(update.get("reward_failures") or {})
    if not failed:
        return None
    [(name, count)] = failed.most_common(1)
    if count <= rule_input.config.health.max_failed_share * rule_input.recent_completions:
        return None
    return (
        f"{name} failed for {count} of the last {rule_input.recent_completions} completions, which have no value from "
        "it; the log has the error"
    )


def unscored(rule_input: RuleInput) -> str | None:
    """Check for completions to which no reward applies, although none failed."""
    counts = [
        value(update, "invalid_completions")
        for update in rule_input.recent
        if not update.get("reward_failures")
    ]
    count = sum(count for count in counts if count > 0)
    if count <= rule_input.config.health.max_failed_share * rule_input.recent_completions:
        return None
    return (
        f"{count:.0f} of the last {rule_input.recent_completions} completions have no value from any reward with a weight "
        "(None or NaN, or their environment failed) and do not train; let one reward apply to every problem"
    )


def no_variance(rule_input: RuleInput) -> str | None:
    """Check whether the completions of each problem have had equal rewards for long: every advantage is 0."""
    if reward_is_zero(rule_input) or not rule_input.held_long(lambda m: value(m, "zero_variance_share") == 1):
        return None
    reward = value(rule_input.last, "reward_mean")
    best = sum(weight for weight in rule_input.config.reward.functions.values() if weight > 0)
    fact = f"all completions of a problem are worth the same {rule_input.for_long}, mean reward {reward:.3g}"
    if abs(reward - best) <= 0.05 * best:
        return f"{fact}: the problems are solved every time; use harder ones, or stop here"
    limit_hit = "sampling other problems did not help (selection.refill_limit); use other problems"
    cure = (
        limit_hit if rule_input.config.selection.dynamic_sampling else "set selection.dynamic_sampling = true"
    )
    return (
        f"{fact}: the problems are too easy or too hard, or the samples are all alike; "
        f"{cure}, or raise rollout.temperature"
    )


def gradient_is_zero(rule_input: RuleInput) -> str | None:
    """Check for a gradient of 0 although there are advantages."""
    held = rule_input.held(
        rule_input.confirming,
        lambda m: value(m, "grad_norm") == 0 and value(m, "zero_variance_share") < 1,
    )
    if not held:
        return None
    fact = f"the gradient is 0 for {rule_input.confirming} updates though rewards differ"
    if not _trained(rule_input.last):
        return (
            f"{fact}: no token trains, {value(rule_input.last, 'truncated_share'):.0%} of the completions are truncated; "
            "raise rollout.max_new_tokens, or set objective.mask_truncated = false"
        )
    clipped = value(rule_input.last, "clip_share")
    if clipped > 0.5:
        return f"{fact}: {clipped:.0%} of the tokens are clipped; raise objective.clip_eps"
    return f"{fact}: no trainable weight takes part in the loss; check model.lora_keys and model.lora_layers"


def kl_explodes(rule_input: RuleInput) -> str | None:
    """Check whether the policy is far from its reference."""
    limit = rule_input.config.health.max_kl
    if not rule_input.held(rule_input.confirming, lambda m: value(m, "kl") > limit):
        return None
    return (
        f"KL to the reference is {value(rule_input.last, 'kl'):.3g} nats a token (health.max_kl = {limit:g}): "
        "the policy moves too far; lower learner.learning_rate, or raise objective.kl_coeff"
    )


def ratio_explodes(rule_input: RuleInput) -> str | None:
    """Check whether the trained policy is far from the one that sampled."""
    limit = rule_input.config.health.max_ratio
    if not rule_input.held(rule_input.confirming, lambda m: value(m, "ratio_max") > limit):
        return None
    return (
        f"the largest importance ratio is {value(rule_input.last, 'ratio_max'):.3g} (health.max_ratio = {limit:g}): "
        "an update moves the policy too far; lower learner.learning_rate, learner.num_iterations "
        "or rollout.max_staleness"
    )


def workers_disagree(rule_input: RuleInput) -> str | None:
    """Check whether worker and learner give the same tokens different probabilities."""
    health = rule_input.config.health
    limits = (("logprob_gap_mean", health.max_logprob_gap), ("mismatch_kl", health.max_mismatch_kl))
    newest = rule_input.trained[-rule_input.confirming :]
    exceeds = [any(value(update, key) > limit for key, limit in limits) for update in newest]
    if len(newest) < rule_input.confirming or not all(exceeds):
        return None
    gap, gap_max, kl = (
        value(newest[-1], key) for key in ("logprob_gap_mean", "logprob_gap_max", "mismatch_kl")
    )
    return (
        f"log-probs of worker and learner differ by {gap:.3g} nats on average, {gap_max:.3g} at most, KL {kl:.3g} "
        f"(health.max_logprob_gap = {health.max_logprob_gap:g}, health.max_mismatch_kl = "
        f"{health.max_mismatch_kl:g}): {_why_disagree(rule_input)}"
    )


def entropy_collapses(rule_input: RuleInput) -> str | None:
    """Check whether the policy has stopped exploring."""
    limit = rule_input.config.health.min_entropy
    trained = rule_input.trained
    # If nearly all samples are equal, many updates have no advantage and measure no entropy. These count as collapsed.
    collapsed = rule_input.held_long(lambda m: not _trained(m) or value(m, "entropy") < limit)
    if not collapsed or len(trained) < rule_input.confirming:
        return None
    return (
        f"entropy is {value(trained[-1], 'entropy'):.3g} nats a token {rule_input.for_long}, health.min_entropy = "
        f"{limit:g}: nearly every sample is the same; raise objective.clip_eps_high or objective.entropy_coeff, "
        "or lower learner.learning_rate"
    )


def length_runs_away(rule_input: RuleInput) -> str | None:
    """Check whether completions have become much longer than at first."""
    patience, growth = rule_input.config.health.patience_updates, rule_input.config.health.max_length_growth
    first = sum(rule_input.first_lengths) / len(rule_input.first_lengths)
    if not rule_input.held_long(lambda m: value(m, "completion_length_mean") > growth * first):
        return None
    now = value(rule_input.last, "completion_length_mean")
    return (
        f"completions have {now:.0f} tokens, at first {first:.0f} (health.max_length_growth = {growth:g}, for "
        f"{patience} updates): length is rewarded, or the end token is unlearned; try objective.aggregation = "
        '"dr_grpo", objective.overlong_tokens, or a reward for brevity'
    )


def too_many_truncated(rule_input: RuleInput) -> str | None:
    """Check whether most completions are truncated."""
    limit = rule_input.config.health.max_truncated_share
    if reward_is_zero(rule_input) or not rule_input.held_long(lambda m: value(m, "truncated_share") > limit):
        return None
    fact = (
        f"{value(rule_input.last, 'truncated_share'):.0%} of the completions are cut {rule_input.for_long}, "
        f"health.max_truncated_share = {limit:g}"
    )
    if never_ends(rule_input):
        return f"{fact}: {NO_END}"
    return (
        f"{fact}: rollout.max_new_tokens = {rule_input.config.rollout.max_new_tokens} is too few for an answer; "
        "raise it, or ask for short answers"
    )


def always_stale(rule_input: RuleInput) -> str | None:
    """Check whether all groups are as old as allowed. A bound of 1 is exempt: sampling ahead makes that normal."""
    bound = rule_input.config.rollout.max_staleness
    if bound < 2 or not rule_input.held_long(lambda m: list(m.get("staleness", {})) == [str(bound)]):
        return None
    fact = f"all groups are {bound} updates old {rule_input.for_long}, the bound of rollout.max_staleness"
    waits = value(rule_input.last, "learner_wait_share")
    if waits < 0.5:
        return (
            f"{fact}: the learner is the slower half ({waits:.0%} of its time waiting) and the groups queue up; "
            "lower rollout.max_staleness, or use fewer workers"
        )
    return (
        f"{fact}: the workers are the slower half (the learner waits {waits:.0%} of its time) and hold a lease "
        "for long; use more workers, or lower rollout.batch_groups"
    )


def learning_rate_is_zero(rule_input: RuleInput) -> str | None:
    """Check for steps with a learning rate of 0, which change nothing."""
    if not rule_input.held(rule_input.confirming, lambda m: value(m, "learning_rate") == 0):
        return None
    return (
        f"the learning rate is 0 for {rule_input.confirming} updates: nothing is learned; "
        f"learner.learning_rate = {rule_input.config.learner.learning_rate:g}, set it above 0"
    )


def steps_are_skipped(rule_input: RuleInput) -> str | None:
    """Check for steps without a finite gradient, which leave the weights unchanged."""
    limit, patience = rule_input.config.health.max_skipped_steps, rule_input.config.health.patience_updates
    counts = [value(metrics, "skipped_steps") for metrics in rule_input.updates][-patience - 1 :]
    skipped = counts[-1] - counts[0]
    if not skipped > limit:
        return None
    return (
        f"{skipped:.0f} steps within {len(counts) - 1} updates had no finite gradient "
        f"(health.max_skipped_steps = {limit}): numbers overflow; lower learner.learning_rate, "
        'or set model.dtype = "float32"'
    )


#: Alarm -> its rule, in the order in which alarms are reported.
RULES: Mapping[str, Callable[[RuleInput], str | None]] = {
    "reward is zero": reward_is_zero,
    "reward fails": reward_fails,
    "no reward": unscored,
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


# --- shared by the rules --------------------------------------------------------------------------


def value(metrics: Metrics, key: str) -> float:
    """Return the number at `key`, or NaN if there is none, so that every comparison is false."""
    measured = metrics.get(key)
    return float(measured) if isinstance(measured, int | float) else math.nan


def _has_no_reward(metrics: Metrics) -> bool:
    """Return whether all completions have the reward 0, or none has a valid reward (then the mean is None)."""
    mean = metrics.get("reward_mean", math.nan)
    return mean is None or (mean == 0 and value(metrics, "reward_std") == 0)


def never_ends(rule_input: RuleInput) -> bool:
    """Return whether nothing that the model was taught ends a completion."""
    return not rule_input.ends_turns and not rule_input.config.rollout.stop


def _trained(metrics: Metrics) -> bool:
    """Return whether the loss had a token; without one it has no metrics."""
    return not math.isnan(value(metrics, "ratio_mean"))


def _why_no_reward(rule_input: RuleInput) -> str:
    """Return the likely cause of rewards of 0; the most certain cause is tested first."""
    last, config = rule_input.last, rule_input.config
    if last["reward_mean"] is None:
        return (
            "no reward function gives a value (None, an error, or longer than reward.reward_timeout_s); "
            "see the warnings in the log"
        )
    truncated, length = value(last, "truncated_share"), value(last, "completion_length_mean")
    if truncated >= 0.5:
        if never_ends(rule_input):
            return f"{truncated:.0%} of the completions are cut: {NO_END}"
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
            "show it with data.num_shots, or start from a model that can write it"
        )
    return (
        f"every completion gets 0 from {', '.join(means)}: the problems are too hard, or answers are not "
        "written as the reward expects; read completions.jsonl"
    )


def _why_disagree(rule_input: RuleInput) -> str:
    """Return the likely cause of log-probs that differ."""
    rollout, model = rule_input.config.rollout, rule_input.config.model
    if (
        model.fine_tune_type != "full"
        and model.lora_dropout
        and rule_input.config.objective.ratio == "recorded"
    ):
        return (
            'only the learner applies dropout; set model.lora_dropout = 0, or objective.ratio = "recomputed"'
        )
    if rollout.quantize_for_rollouts:
        return "the workers quantise; raise rollout.rollout_bits, or set quantize_for_rollouts = false"
    if rollout.kv_bits:
        return "the workers quantise their cache; raise rollout.kv_bits, or set it to 0"
    if any(lag != "0" for lag in rule_input.last.get("staleness", {})):
        return "the policy moves far between sampling and training; lower learner.learning_rate or rollout.max_staleness"
    return (
        "the workers compute differently with the same weights, or a replay has left the recorded policy; "
        'try model.dtype = "float32", top_p = 1, top_k = 0 and min_p = 0'
    )
