"""The charts of the page, as a table: which curves of a run each of them shows, and how its numbers are written.

Pure data. A curve whose name ends in ``*`` stands for every curve of that beginning, such as one for each reward function.
To add a chart, add a row.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

Format = Literal["number", "share", "count", "scientific"]


class Curve(NamedTuple):
    """One curve of a chart."""

    name: str
    label: str


class Chart(NamedTuple):
    """One chart over updates."""

    key: str
    section: str
    title: str
    #: One sentence for a reader who does not know the number.
    help: str
    curves: tuple[Curve, ...]
    format: Format = "number"
    #: Whether 0 is part of the axis.
    from_zero: bool = False
    #: Names of the lower and upper bound of a band around the first curve.
    band: tuple[str, str] | None = None


CHARTS = (
    Chart(
        "reward",
        "reward",
        "Reward",
        "Mean of the weighted sum of all reward functions; the band is one standard deviation over the completions.",
        (Curve("reward_mean", "mean"),),
        band=("reward_low", "reward_high"),
    ),
    Chart(
        "rewards",
        "reward",
        "By function",
        "Unweighted mean of each reward function.",
        (Curve("rewards/*", ""),),
    ),
    Chart(
        "sources",
        "reward",
        "By source",
        "Mean weighted reward of the groups of each source of a mixture.",
        (Curve("reward_by_source/*", ""),),
    ),
    Chart(
        "signal",
        "reward",
        "Groups without a signal",
        "Share of the groups whose completions all have the same reward: they teach nothing.",
        (Curve("zero_variance_share", "share of groups"),),
        "share",
        from_zero=True,
    ),
    Chart(
        "length",
        "length",
        "Completion length",
        "Sampled tokens of a completion.",
        (Curve("completion_length_mean", "mean"), Curve("completion_length_max", "longest")),
        "count",
        from_zero=True,
    ),
    Chart(
        "truncated",
        "length",
        "Truncated",
        "Share of the completions that max_new_tokens cut. Near 1, the model has no room for an answer.",
        (Curve("truncated_share", "share of completions"),),
        "share",
        from_zero=True,
    ),
    Chart(
        "thinking",
        "length",
        "Thinking",
        "Tokens of thinking over sampled tokens.",
        (Curve("thinking_share", "share of tokens"), Curve("thinking_cut_share", "completions cut in it")),
        "share",
        from_zero=True,
    ),
    Chart(
        "loss",
        "learning",
        "Loss",
        "Over the update's tokens. It hovers around 0 by construction and need not fall.",
        (Curve("loss", "loss"),),
    ),
    Chart(
        "kl", "learning", "KL to the reference", "In nats per token.", (Curve("kl", "KL"),), from_zero=True
    ),
    Chart(
        "clip",
        "learning",
        "Clipped tokens",
        "Share of the tokens whose importance ratio was clipped.",
        (Curve("clip_share", "all"), Curve("clip_high_share", "above"), Curve("clip_low_share", "below")),
        "share",
        from_zero=True,
    ),
    Chart(
        "grad",
        "learning",
        "Gradient norm",
        "Before clipping.",
        (Curve("grad_norm", "norm"),),
        from_zero=True,
    ),
    Chart(
        "entropy",
        "learning",
        "Entropy",
        "In nats per token. Towards 0, all samples are the same and nothing new is tried.",
        (Curve("entropy", "entropy"),),
        from_zero=True,
    ),
    Chart(
        "gap",
        "learning",
        "Sampler–learner gap",
        "How far the log-probs of a sampled token differ between worker and learner, in nats, at the version that sampled it.",
        (Curve("logprob_gap_mean", "mean"), Curve("logprob_gaps/*", "")),
        from_zero=True,
    ),
    Chart(
        "ratio",
        "learning",
        "Largest importance ratio",
        "New policy to the one that sampled, over the update's tokens.",
        (Curve("ratio_max", "largest"),),
    ),
    Chart(
        "rate",
        "learning",
        "Learning rate",
        "Of the optimizer's step.",
        (Curve("learning_rate", "rate"),),
        "scientific",
    ),
    Chart(
        "waits",
        "actors",
        "Share of time waiting",
        "Learner: for groups. Workers: for something to sample. The one that hardly waits is the bottleneck.",
        (Curve("learner_wait_share", "learner"), Curve("rollout_wait_share", "workers")),
        "share",
        from_zero=True,
    ),
    Chart(
        "speed",
        "actors",
        "Tokens per second",
        "Workers: sampled, all together. Learner: computed, prompts and repetitions included.",
        (Curve("rollout_tokens_per_s", "sampled"), Curve("learner_tokens_per_s", "learned from")),
        "count",
        from_zero=True,
    ),
    Chart(
        "update_s",
        "actors",
        "Seconds per update",
        "Waiting included.",
        (Curve("update_s", "update"),),
        from_zero=True,
    ),
    Chart(
        "staleness",
        "actors",
        "Staleness",
        "Versions between the policy that sampled a group and the one that trains on it; mean of the groups.",
        (Curve("staleness_mean", "versions"),),
        from_zero=True,
    ),
    Chart(
        "memory",
        "actors",
        "Memory",
        "Peak of each process's arrays so far, in GB.",
        (Curve("memory/*", ""),),
        from_zero=True,
    ),
)


def curves_of(chart: Chart, names: Iterable[str]) -> list[Curve]:
    """Return the curves of a chart that a run has, with every ``*`` replaced by the names that it stands for."""
    known = list(names)
    found: list[Curve] = []
    for curve in chart.curves:
        if curve.name.endswith("*"):
            start = curve.name.removesuffix("*")
            found += [Curve(name, name.removeprefix(start)) for name in known if name.startswith(start)]
        elif curve.name in known:
            found.append(curve)
    # With one worker its own curve is the mean.
    return found[:1] if chart.key == "gap" and len(found) == 2 else found
