"""Compute the result of one policy, and the comparison of two on the same problems. Pure: answers in, figures out."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from grpo_actors.evaluator.accuracy import (
    majority,
    mcnemar_p,
    mean_difference,
    mean_estimate,
    paired_difference,
    pass_at_k,
)
from grpo_actors.evaluator.score import AnsweredProblem
from grpo_actors.score import Estimate
from grpo_actors.tasks.scoring import reward_means


@dataclass(frozen=True, slots=True)
class Completions:
    """Lengths and rewards of a policy's completions."""

    #: Mean length in tokens.
    length_mean: float
    truncated_share: float
    #: Unweighted mean of each reward function over the completions to which it applies.
    rewards: dict[str, float]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The figures of k samples of each problem."""

    k: int
    temperature: float
    #: Mean accuracy of a sample: avg@k, which is pass@1.
    avg: Estimate
    #: Accuracy of a majority vote among the k.
    maj: Estimate
    #: pass@i: i -> share of problems that at least one of i samples solves, for i = 1, 2, 4, … and k.
    passed: dict[int, Estimate]
    completions: Completions


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one candidate on all problems."""

    #: Name of the candidate.
    checkpoint: str
    #: Folder of its run and its number of updates; None if it belongs to no run.
    run: str | None
    update: int | None
    #: Number of problems.
    problems: int
    #: Accuracy of the greedy completions.
    accuracy: Estimate
    #: Lengths and rewards of the greedy completions.
    completions: Completions
    #: None if no samples were requested.
    sampled: Sampled | None
    #: Time of loading and answering.
    seconds: float


@dataclass(frozen=True, slots=True)
class Pair:
    """The comparison of two candidates on the same problems: the 2 × 2 table of right and wrong greedy answers."""

    first: str
    second: str
    both_right: int
    only_first: int
    only_second: int
    both_wrong: int
    #: Second's accuracy − first's.
    difference: Estimate
    #: Two-sided p-value of McNemar's exact test.
    p_value: float
    #: Second's avg@k − first's; None without samples.
    sampled_difference: Estimate | None


@dataclass(frozen=True, slots=True)
class Answers:
    """All answers of one candidate."""

    greedy: Sequence[AnsweredProblem]
    #: k samples of each problem; empty if none were requested.
    sampled: Sequence[AnsweredProblem]


def powers_of_two(k: int) -> list[int]:
    """Return 1, 2, 4, … up to k, and k itself."""
    return sorted({2**i for i in range(k.bit_length())} | {k})


def completions_of(answered: Sequence[AnsweredProblem]) -> Completions:
    """Return the lengths and rewards of all completions together."""
    answers = [answer for problem in answered for answer in problem.answers]
    return Completions(
        length_mean=fmean(answer.tokens for answer in answers),
        truncated_share=fmean(answer.truncated for answer in answers),
        rewards=reward_means(answer.rewards for answer in answers),
    )


def accuracy_of(answered: Sequence[AnsweredProblem]) -> Estimate:
    """Return the share of completions that are right."""
    return mean_estimate(_shares(answered))


def sampled_of(answered: Sequence[AnsweredProblem], temperature: float) -> Sampled:
    """Return the figures of k samples per problem, k ≥ 1."""
    k = len(answered[0].answers)
    right = [sum(answer.correct for answer in problem.answers) for problem in answered]
    majorities = [
        majority(
            [answer.answer for answer in problem.answers], [answer.correct for answer in problem.answers]
        )
        for problem in answered
    ]
    return Sampled(
        k=k,
        temperature=temperature,
        avg=accuracy_of(answered),
        maj=mean_estimate(majorities),
        passed={i: mean_estimate([pass_at_k(k, c, i) for c in right]) for i in powers_of_two(k)},
        completions=completions_of(answered),
    )


def compare(names: tuple[str, str], first: Answers, second: Answers) -> Pair:
    """Compare the answers of two candidates to the same problems in the same order."""
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


def _shares(answered: Sequence[AnsweredProblem]) -> list[float]:
    """Return the share of right completions of each problem."""
    return [fmean(answer.correct for answer in problem.answers) for problem in answered]
