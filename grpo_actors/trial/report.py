"""Print what a trial sees, section by section, as soon as it is known."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from grpo_actors.config import Config
from grpo_actors.learner.exchange.supply import Supply
from grpo_actors.learner.groups import SampledCompletion
from grpo_actors.learner.rendering import rendered, system_origin
from grpo_actors.observe.symptoms import value
from grpo_actors.observe.text import UNKNOWN, aligned, count, duration, fixed, printable, share
from grpo_actors.policy.model import Policy
from grpo_actors.policy.quantization import parameter_count
from grpo_actors.tasks.scoring import reward_means
from grpo_actors.trial.sampling import Sampled
from grpo_actors.trial.update import Update
from grpo_actors.trial.verdict import Finding, Prompts

#: Lines of a prompt or completion that are shown: from its beginning and from its end.
_FIRST_LINES, _LAST_LINES = 12, 8
#: Characters of a line that are shown.
_WIDTH = 110
#: Groups whose rewards are shown one by one.
_SHOWN_GROUPS = 4


def model(config: Config, policy: Policy, seconds: float) -> None:
    """Print what was loaded."""
    size = count(parameter_count(policy.model))
    _print(f"model        {config.model.model_name}, {size} parameters, loaded in {seconds:.1f} s")


def prompt(config: Config, policy: Policy, supply: Supply, prompts: Prompts) -> None:
    """Print the first prompt with its special tokens, where its system prompt comes from, and the lengths of all."""
    first = next(supply.posed())
    _, problem = supply.problem(first)
    origin = system_origin(policy, config.data, problem.messages)
    _section(
        f"first prompt: problem {problem.id}, {len(supply.prompt(first))} tokens; system prompt: {origin}"
    )
    _quote(rendered(policy, supply.prompt(first)))
    _print(
        f"prompts      {_percentiles(prompts.lengths)} tokens; {share(prompts.left_out)} of {len(prompts.lengths)} "
        f"over data.max_prompt_length = {prompts.limit}"
    )


def completions(config: Config, policy: Policy, sampled: Sampled) -> None:
    """Print two completions with their rewards, every reward's values and time, lengths and shares."""
    weights = config.reward.functions
    for group in sampled.groups[:1]:
        ranked = sorted(group.completions, key=lambda completion: _reward(completion, weights), reverse=True)
        for which, completion in (("best", ranked[0]), ("worst", ranked[-1])):
            end = "ended" if completion.finished else "cut"
            reward, length = _reward(completion, weights), sum(completion.sampled)
            _section(f"{which} completion of {len(ranked)}: reward {reward:g}, {length} tokens, {end}")
            _quote(rendered(policy, completion.tokens))
    for group in sampled.groups[:_SHOWN_GROUPS]:
        _section(
            f"rewards of problem {group.problem.id}, answer {printable(group.problem.answer) or UNKNOWN}"
        )
        rows = [(name, *(_value(each.rewards[name]) for each in group.completions)) for name in weights]
        _indent(aligned(rows))
    _print()
    means = reward_means(completion.rewards for completion in sampled.completions)
    for name, weight in weights.items():
        per_group_ms = 1000 * sampled.reward_s[name] / len(sampled.groups)
        _print(
            f"reward       {name}, weight {weight:g}: mean {fixed(means.get(name))}, {per_group_ms:.1f} ms a group"
        )


def update(config: Config, sampled: Sampled, done: Update, total: int) -> None:
    """Print what sampling and one update take, and what that gives for the whole run."""
    metrics, each = done.metrics, [sum(completion.sampled) for completion in sampled.completions]
    rate, groups = sampled.tokens / sampled.sampling_s, len(sampled.groups)
    whole = config.groups_per_update / groups
    sampling_s = (sampled.sampling_s + sum(sampled.reward_s.values())) * whole
    update_s = done.seconds * whole
    _print(
        f"sampled      {groups} of the {config.groups_per_update} groups of an update, {len(each)} completions, "
        f"{count(rate)} tokens/s; {_percentiles(each)} tokens"
    )
    _print(
        f"             {share(value(metrics, 'truncated_share'))} cut at rollout.max_new_tokens = "
        f"{config.rollout.max_new_tokens}; {share(value(metrics, 'zero_variance_share'))} of the groups have equal rewards"
    )
    _print(
        f"log-probs    sampler and learner differ by {fixed(value(metrics, 'logprob_gap_mean'), 5)} nats on average, "
        f"{fixed(value(metrics, 'logprob_gap_max'), 4)} at most"
    )
    _print(
        f"update       {update_s:.2f} s for {config.groups_per_update} groups, peak {done.peak_bytes / 1e9:.2f} GB"
    )
    # Sampling and training overlap, but share the device: between the longer of the two and their sum.
    low, high = max(sampling_s, update_s) * total, (sampling_s + update_s) * total
    _print(
        f"whole run    {duration(low)} to {duration(high)} for {total} updates on this machine, evaluations not counted"
    )


def verdict(found: Sequence[Finding]) -> None:
    """Print the findings, those that block last, and the verdict."""
    _print()
    for finding in sorted(found, key=lambda finding: finding.blocks):
        _print(f"{'CHANGE' if finding.blocks else 'note'}: {finding.name}: {finding.text}")
    blocking = sum(finding.blocks for finding in found)
    _print("ready" if not blocking else f"not ready: {blocking} to change first")


def _reward(completion: SampledCompletion, weights: Mapping[str, float]) -> float:
    return sum(weights[name] * value for name, value in completion.rewards.items() if value)


def _value(reward: float | None) -> str:
    return UNKNOWN if reward is None else f"{reward:.3g}"


def _percentiles(lengths: Sequence[int]) -> str:
    """Format the median, the 90th percentile and the maximum."""
    half, most = np.percentile(lengths, [50, 90])
    return f"median {half:.0f}, 90 % up to {most:.0f}, longest {max(lengths)}"


def _section(title: str) -> None:
    _print(f"\n{title}")


def _quote(text: str) -> None:
    """Print a text with its line breaks; a long one without its middle."""
    lines = [line[:_WIDTH] + "…" * (len(line) > _WIDTH) for line in map(printable, text.split("\n"))]
    if len(lines) > _FIRST_LINES + _LAST_LINES:
        left_out = len(lines) - _FIRST_LINES - _LAST_LINES
        lines = [*lines[:_FIRST_LINES], f"… {left_out} lines …", *lines[-_LAST_LINES:]]
    _indent(lines)


def _indent(lines: Iterable[str]) -> None:
    for line in lines:
        _print(f"  | {line}".rstrip())


def _print(text: str = "") -> None:
    print(text, flush=True)
