"""What came out: of one policy, and of two on the same problems. Pure: answers in, figures out."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from grpo_actors.evaluator.accuracy import (
    Estimate,
    majority,
    mcnemar_p,
    mean_difference,
    mean_estimate,
    paired_difference,
    pass_at_k,
)
from grpo_actors.evaluator.score import Answer, Answered
from grpo_actors.tasks.scoring import reward_means


@dataclass(frozen=True, slots=True)
class Completions:
    """How long the completions of a policy are."""

    #: In tokens.
    length_mean: float
    truncated_share: float
    #: Unweighted mean of each reward over the completions that it judged.
    rewards: dict[str, float]


@dataclass(frozen=True, slots=True)
class Sampled:
    """What k samples of each problem show."""

    k: int
    temperature: float
    #: Mean accuracy of a sample: avg@k, which is pass@1.
    avg: Estimate
    #: Accuracy of a majority vote among the k.
    maj: Estimate
    #: i -> share of problems that at least one of i samples solves, for i = 1, 2, 4, … and k.
    passed: dict[int, Estimate]
    completions: Completions


@dataclass(frozen=True, slots=True)
class Result:
    """One policy on all problems."""

    checkpoint: str
    #: Folder of its run, and updates behind it; None: of no run.
    run: str | None
    update: int | None
    problems: int
    #: Of greedy completions.
    accuracy: Estimate
    completions: Completions
    #: None: not asked for.
    sampled: Sampled | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Pair:
    """Two policies on the same problems: greedy, the 2 × 2 table of who is right."""

    first: str
    second: str
    both_right: int
    only_first: int
    only_second: int
    both_wrong: int
    #: Second's accuracy − first's.
    difference: Estimate
    #: McNemar's exact test, two-sided.
    p_value: float
    #: The same difference of avg@k; None: no samples.
    sampled_difference: Estimate | None


@dataclass(frozen=True, slots=True)
class Sheet:
    """All that one policy answered."""

    greedy: Sequence[Answered]
    #: k samples of each problem; empty: none were asked for.
    sampled: Sequence[Answered]


def powers_of_two(k: int) -> list[int]:
    """1, 2, 4, … up to k, and k itself."""
    return sorted({2**i for i in range(k.bit_length())} | {k})


def completions_of(answered: Sequence[Answered]) -> Completions:
    """Lengths and rewards of all completions together."""
    answers: list[Answer] = [one for problem in answered for one in problem.answers]
    return Completions(
        length_mean=fmean(one.tokens for one in answers),
        truncated_share=fmean(one.truncated for one in answers),
        rewards=reward_means(one.rewards for one in answers),
    )


def accuracy_of(answered: Sequence[Answered]) -> Estimate:
    """Share of completions that are right."""
    return mean_estimate(_shares(answered))


def sampled_of(answered: Sequence[Answered], temperature: float) -> Sampled:
    """The figures of k samples a problem, k ≥ 1."""
    k = len(answered[0].answers)
    right = [sum(one.correct for one in problem.answers) for problem in answered]
    votes = [
        majority([one.answer for one in problem.answers], [one.correct for one in problem.answers])
        for problem in answered
    ]
    return Sampled(
        k=k,
        temperature=temperature,
        avg=accuracy_of(answered),
        maj=mean_estimate(votes),
        passed={i: mean_estimate([pass_at_k(k, c, i) for c in right]) for i in powers_of_two(k)},
        completions=completions_of(answered),
    )


def compare(names: tuple[str, str], first: Sheet, second: Sheet) -> Pair:
    """Both on the same problems, in the same order."""
    outcomes = [
        (a.answers[0].correct, b.answers[0].correct) for a, b in zip(first.greedy, second.greedy, strict=True)
    ]
    only_first, only_second = outcomes.count((True, False)), outcomes.count((False, True))
    return Pair(
        first=names[0],
        second=names[1],
        both_right=outcomes.count((True, True)),
        only_first=only_first,
        only_second=only_second,
        both_wrong=outcomes.count((False, False)),
        difference=paired_difference(only_first, only_second, len(outcomes)),
        p_value=mcnemar_p(only_first, only_second),
        sampled_difference=(
            mean_difference(_shares(first.sampled), _shares(second.sampled)) if first.sampled else None
        ),
    )


def _shares(answered: Sequence[Answered]) -> list[float]:
    return [fmean(one.correct for one in problem.answers) for problem in answered]
