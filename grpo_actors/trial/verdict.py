"""The verdict of a trial: what must change before the run, and what is worth knowing. Pure.

The symptoms are those of the run's alarms (`observe.symptoms`), judged on one update; a few more show only before a run.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_actors.config import Config
from grpo_actors.observe.symptoms import NO_END, RULES, RuleInput, value
from grpo_actors.observe.text import share

#: Alarms that one update can show.
SYMPTOMS = (
    "no reward",
    "reward is zero",
    "no variance",
    "gradient is zero",
    "workers disagree",
    "entropy collapses",
    "truncated",
)
#: Share of problems left out from which on the run should not start; fewer are worth a note.
MAX_LEFT_OUT = 0.1


@dataclass(frozen=True, slots=True)
class Prompts:
    """Lengths of the first prompts of the run, in tokens."""

    lengths: list[int]
    limit: int

    @property
    def left_out(self) -> float:
        """Share of the prompts over the limit."""
        return sum(length > self.limit for length in self.lengths) / len(self.lengths)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the trial found: a name, and one line with the fact and the cure."""

    name: str
    text: str
    #: Whether to change it before the run.
    blocks: bool = True


@dataclass(frozen=True, slots=True)
class Facts:
    """What the trial measured."""

    config: Config
    #: Metrics of the one update, as a run records them.
    metrics: Mapping[str, Any]
    prompts: Prompts
    #: Reward that failed, or "environment" -> its first error.
    failures: Mapping[str, str]
    #: Whether the chat template ends a turn with a token that ends a completion.
    ends_turns: bool
    #: Seconds of sampling and of all rewards.
    sampling_s: float
    rewards_s: float
    #: Whether no completion had the time to end.
    cut: bool
    #: Sentences of the learner on this model, as at the start of a run.
    notes: list[str]


def findings(facts: Facts) -> list[Finding]:
    """Return what was found, the most certain cause of a bad run first."""
    return [
        *_model(facts),
        *_prompts(facts),
        *_failures(facts),
        *_symptoms(facts),
        *_silent_rewards(facts),
        *_times(facts),
    ]


def _model(facts: Facts) -> Iterator[Finding]:
    never_ends = not facts.ends_turns and not facts.config.rollout.stop
    if never_ends:
        yield Finding("end of turn", NO_END)
    yield from (Finding("model", note, blocks=False) for note in facts.notes)


def _prompts(facts: Facts) -> Iterator[Finding]:
    prompts = facts.prompts
    if prompts.left_out:
        yield Finding(
            "prompt too long",
            f"{share(prompts.left_out)} of {len(prompts.lengths)} prompts have more than {prompts.limit} tokens "
            f"(data.max_prompt_length) and are left out; the longest has {max(prompts.lengths)}",
            blocks=prompts.left_out > MAX_LEFT_OUT,
        )


def _failures(facts: Facts) -> Iterator[Finding]:
    for name, error in facts.failures.items():
        reason, *traceback = error.splitlines()
        last = f" ({traceback[-1].strip()})" if traceback else ""
        failed = facts.metrics["reward_failures"].get(name)
        count = "" if failed is None else f" for {failed} of {facts.metrics['completions']} completions"
        yield Finding(f"{name} fails", f"{reason}{last}{count}")


def _symptoms(facts: Facts) -> Iterator[Finding]:
    length = value(facts.metrics, "completion_length_mean")
    rule_input = RuleInput(facts.config, deque([facts.metrics]), [length], facts.ends_turns, at_once=True)
    for name in SYMPTOMS:
        text = RULES[name](rule_input)
        # Completions that the trial itself cut say nothing about answers.
        if text and not (facts.cut and name in ("reward is zero", "no variance", "truncated")):
            yield Finding(name, text)
    if value(facts.metrics, "skipped_steps"):
        yield Finding(
            "gradient is not finite",
            'the first step was skipped; set model.dtype = "float32", or choose another model',
        )


def _silent_rewards(facts: Facts) -> Iterator[Finding]:
    """Yield the reward functions that alone are silent while others are not."""
    means: Mapping[str, float | None] = facts.metrics["rewards"]
    if facts.cut or not value(facts.metrics, "reward_mean"):
        return
    for name in _all_zero(means):
        yield Finding(
            f"{name} is 0",
            f"for all {facts.metrics['completions']} completions: as long as it stays so, it teaches nothing",
            blocks=False,
        )


def _all_zero(means: Mapping[str, float | None]) -> Iterable[str]:
    return (name for name, mean in means.items() if mean == 0)


def _times(facts: Facts) -> Iterator[Finding]:
    if facts.cut:
        yield Finding(
            "sampling is slow",
            "no group ended within the time of a trial, so answers were not judged; lower rollout.max_new_tokens or "
            "rollout.num_generations, or take a smaller model",
        )
    elif facts.rewards_s > max(1.0, facts.sampling_s):
        yield Finding(
            "rewards are slow",
            f"they take {facts.rewards_s:.1f} s where sampling takes {facts.sampling_s:.1f} s; workers wait for them",
            blocks=False,
        )
