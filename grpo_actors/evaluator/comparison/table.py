"""Format the results for a reader: a table, and the comparison of two policies in a few sentences."""

from collections.abc import Sequence

from grpo_actors.evaluator.comparison.result import Completions, Pair, Result, Sampled
from grpo_actors.observe.text import aligned
from grpo_actors.score import Estimate

#: A difference with a smaller p-value counts as significant. It matches the 95 % intervals.
SIGNIFICANT = 0.05


def as_table(results: Sequence[Result], task: str, max_new_tokens: int) -> str:
    """Format the greedy results, one line per checkpoint, and below them those of the samples, if there are any."""
    parts = [
        f"{results[0].problems} held-out problems of {task}, answered greedily in at most {max_new_tokens} tokens",
        *aligned(_greedy_rows(results)),
    ]
    samples = results[0].sampled
    if samples is not None:
        count = f"{samples.k} samples" if samples.k > 1 else "one sample"
        parts += ["", f"{count} of each problem at temperature {samples.temperature:g}"]
        parts += aligned(_sampled_rows(results, samples))
    return "\n".join(parts)


def as_sentence(pair: Pair) -> str:
    """Describe which of the two is better, by how much, and whether the difference is significant."""
    total = pair.both_right + pair.both_wrong + pair.only_first + pair.only_second
    counts = (
        f"Of {total} problems both solve {pair.both_right} and neither {pair.both_wrong}; "
        f"{pair.only_second} only the former, {pair.only_first} only the latter."
    )
    lines = [
        f"{pair.second} against {pair.first}, greedy: {_points(pair.difference)}.",
        counts,
        f"McNemar's exact test: p = {pair.p_value:.2g}; {_verdict(pair)}.",
    ]
    if pair.sampled_difference is not None:
        lines.append(f"Sampled: {_points(pair.sampled_difference)}.")
    return "\n".join(lines)


def _verdict(pair: Pair) -> str:
    if pair.p_value >= SIGNIFICANT:
        return "greedy answers to these problems do not tell which of the two is better"
    better = pair.second if pair.difference.value > 0 else pair.first
    return f"{better} is better, and chance alone would rarely show it"


def _greedy_rows(results: Sequence[Result]) -> list[list[str]]:
    rewards = list(dict.fromkeys(name for result in results for name in result.completions.rewards))
    head = ["checkpoint", "update", "accuracy", "95 %", "length", "truncated", *rewards]
    return [
        head,
        *(
            [
                result.checkpoint,
                _update(result),
                *_with_interval(result.accuracy),
                *_lengths(result.completions),
                *(_reward(result.completions, name) for name in rewards),
            ]
            for result in results
        ),
    ]


def _sampled_rows(results: Sequence[Result], samples: Sampled) -> list[list[str]]:
    k = samples.k
    between = [i for i in samples.passed if 1 < i < k]
    head = ["checkpoint", "update", f"avg@{k}", "95 %"]
    if k > 1:
        head += [f"maj@{k}", "95 %", *(f"pass@{i}" for i in between), f"pass@{k}", "95 %"]
    rows = [[*head, "length", "truncated"]]
    for result in results:
        sampled = result.sampled
        assert sampled is not None
        row = [result.checkpoint, _update(result), *_with_interval(sampled.avg)]
        if k > 1:
            row += _with_interval(sampled.maj)
            row += [_percent(sampled.passed[i].value) for i in between]
            row += _with_interval(sampled.passed[k])
        rows.append([*row, *_lengths(sampled.completions)])
    return rows


def _update(result: Result) -> str:
    return "–" if result.update is None else str(result.update)


def _reward(completions: Completions, name: str) -> str:
    return f"{completions.rewards[name]:.3f}" if name in completions.rewards else "–"


def _lengths(completions: Completions) -> list[str]:
    return [f"{completions.length_mean:.1f}", _percent(completions.truncated_share)]


def _with_interval(estimate: Estimate) -> list[str]:
    return [_percent(estimate.value), f"{100 * estimate.low:.1f}–{100 * estimate.high:.1f}"]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(difference: Estimate) -> str:
    return f"{100 * difference.value:+.1f} points (95 %: {100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
