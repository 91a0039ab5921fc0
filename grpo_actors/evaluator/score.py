"""Score a policy on held-out problems: always the same ones with the same draws, so that scores are comparable.

Depends on one policy and one task, not on checkpoints, runs or the caller.
"""

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from grpo_actors.config import Config
from grpo_actors.config.data import Grade
from grpo_actors.errors import ConfigError, DataError, RewardError
from grpo_actors.evaluator.accuracy import mean_difference, mean_estimate
from grpo_actors.policy.decoding.sampling import Sample, SamplingParams, Submission, sample_in_turn
from grpo_actors.policy.model import Policy
from grpo_actors.rollout.episodes import Episodes, judged
from grpo_actors.rundir.scores import SavedScore
from grpo_actors.schedule.order import sample_seeds
from grpo_actors.score import ACCURACY, REWARD, Estimate, Measure, Report, Score
from grpo_actors.tasks.answers import find_answer
from grpo_actors.tasks.failures import ENVIRONMENT, Failures
from grpo_actors.tasks.rewards import text as last_text
from grpo_actors.tasks.scoring import Scorer, Scores, reward_means, weighted_reward
from grpo_actors.tasks.task import Problem, Task, digest

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out problem as one policy reads it."""

    problem: Problem
    #: Token ids of the problem's chat, up to the beginning of the assistant's turn.
    prompt: list[int]


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion of a problem, judged by its last turn."""

    text: str
    #: The answer that the task extracts from the text; empty if it finds none.
    answer: str
    #: What found it in the text (`tasks.answers.Found`).
    parser: str
    correct: bool
    #: Number of tokens that the policy sampled in all turns.
    tokens: int
    truncated: bool
    #: Unweighted value of each reward function; None if it does not apply or failed.
    rewards: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class AnsweredProblem:
    """A problem with all completions of one policy at one temperature."""

    problem: Problem
    answers: list[Answer]


def held_out(task: Task, config: Config, policy: Policy, samples: int | None = None) -> list[Question]:
    """Choose the problems to score: a subset of the held-out split, which depends only on the sizes.

    Of a mixture, each source has the same number of them, if it has as many.

    Problems with a prompt longer than data.max_prompt_length are left out.

    Args:
        task: Its split "eval" is used.
        config: Sections [evaluator] and [data].
        policy: Its tokenizer encodes the prompts.
        samples: Number of problems, instead of evaluator.eval_subset_size; 0: all.

    Raises:
        ConfigError: `samples` is negative.
        DataError: No held-out problem has a prompt that is short enough.
    """
    if samples is not None and samples < 0:
        raise ConfigError(f"--samples must be ≥ 0 (0: all), got {samples}")
    problems = task.problems("eval")
    count = config.evaluator.eval_subset_size if samples is None else samples
    sources = task.eval_sources()
    share = -(-count // len(sources))  # rounded up
    indices: list[int] = []
    start = 0
    for held_out_problems in sources.values():
        size = len(held_out_problems)
        chosen_here = random.Random("evaluation").sample(range(size), k=min(share or size, size))
        indices += [start + index for index in chosen_here]
        start += size
    limit = config.data.max_prompt_length
    with policy.chat.limited():
        policy.chat.encode(problems[indices[0]].messages)
    questions = (
        Question(problem, policy.chat.encode(problem.messages))
        for problem in map(problems.__getitem__, indices)
    )
    chosen = [question for question in questions if len(question.prompt) <= limit]
    if not chosen:
        raise DataError(
            f"data: no held-out problem has a prompt of at most {limit} tokens (data.max_prompt_length)"
        )
    return chosen


def evaluate(
    policy: Policy,
    task: Task,
    questions: Sequence[Question],
    config: Config,
    scorer: Scorer,
    *,
    episodes: Episodes | None = None,
    on_step: Callable[[int], None] | None = None,
) -> SavedScore:
    """Score a policy greedily, and also sampled with evaluator.eval_sampled; for the arguments see `answer_problems`.

    The score that decides is that of the sampled answers if there are any.

    Raises:
        RewardError: evaluator.metric is a reward that applies to no answer.
    """
    started_s = time.monotonic()
    weights = config.reward.functions

    def first_answers(temperature: float) -> list[Answer]:
        answered = answer_problems(
            *(policy, task, questions, config, scorer),
            temperature=temperature,
            episodes=episodes,
            on_step=on_step,
        )
        return [problem.answers[0] for problem in answered]

    def mean_reward(answers: Sequence[Answer]) -> float | None:
        return _mean(values_of(answers, REWARD, weights))

    greedy = first_answers(0.0)
    sampled = first_answers(config.evaluator.eval_temperature) if config.evaluator.eval_sampled else None
    measure = measure_of(questions, config)
    values = values_of(greedy if sampled is None else sampled, measure.metric, weights)
    known = [value for value in values if value is not None]
    if not known:
        raise RewardError(
            f"evaluator.metric: {measure.metric} applies to none of {len(values)} held-out answers"
        )
    accuracy = mean_estimate([float(answer.correct) for answer in greedy])
    report = Report(
        score=Score(measure=measure, **mean_estimate(known).model_dump()),
        accuracy=accuracy.value,
        accuracy_low=accuracy.low,
        accuracy_high=accuracy.high,
        reward=mean_reward(greedy),
        sampled_accuracy=None if sampled is None else fmean(answer.correct for answer in sampled),
        sampled_reward=None if sampled is None else mean_reward(sampled),
        rewards=reward_means(answer.rewards for answer in greedy),
        completion_length_mean=fmean(answer.tokens for answer in greedy),
        truncated_share=fmean(answer.truncated for answer in greedy),
        by_source=by_source([question.problem.source for question in questions], values),
        seconds=time.monotonic() - started_s,
    )
    return SavedScore(report=report, values=values)


def by_source(sources: Sequence[str], values: Sequence[float | None]) -> dict[str, Estimate]:
    """Return the mean of the values of each named source, with its interval; without any if none applies."""
    found: dict[str, list[float]] = {}
    for source, value in zip(sources, values, strict=True):
        if source and value is not None:
            found.setdefault(source, []).append(value)
    return {source: mean_estimate(known) for source, known in found.items()}


def measure_of(questions: Sequence[Question], config: Config) -> Measure:
    """Return what `evaluate` measures on these problems: it is known before anything is sampled.

    Args:
        questions: The held-out problems.
        config: The settings, with `reward.functions` and `evaluator.metric` resolved.
    """
    evaluator, metric = config.evaluator, config.evaluator.metric or ACCURACY
    return Measure(
        metric=metric,
        weights={name: w for name, w in config.reward.functions.items() if w} if metric == REWARD else {},
        problems=len(questions),
        digest=digest(question.problem for question in questions),
        temperature=evaluator.eval_temperature if evaluator.eval_sampled else 0.0,
        max_new_tokens=max_answer_tokens(config),
    )


def values_of(answers: Sequence[Answer], metric: str, weights: Mapping[str, float]) -> list[float | None]:
    """Return the value of each answer by a metric; None where it does not apply."""
    match metric:
        case "accuracy":
            return [float(answer.correct) for answer in answers]
        case "reward":
            return [weighted_reward(answer.rewards, weights) for answer in answers]
    return [answer.rewards.get(metric) for answer in answers]


def gain_over(base: SavedScore, other: SavedScore) -> Estimate | None:
    """Return how much the second score is above the first, on the same problems; None if they were measured differently."""
    if base.report.score.measure != other.report.score.measure:
        return None
    pairs = [
        (a, b) for a, b in zip(base.values, other.values, strict=True) if a is not None and b is not None
    ]
    return mean_difference(*zip(*pairs, strict=True)) if pairs else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def answer_problems(
    policy: Policy,
    task: Task,
    questions: Sequence[Question],
    config: Config,
    scorer: Scorer | None,
    *,
    temperature: float,
    count: int = 1,
    episodes: Episodes | None = None,
    on_step: Callable[[int], None] | None = None,
    on_answers: Callable[[int], None] | None = None,
) -> list[AnsweredProblem]:
    """Sample `count` completions of each problem and judge them; return them in the order of the questions.

    At most evaluator.eval_batch_size completions are sampled side by side. The longest prompt is first: prompts of similar
    length are padded little when they run through the model together, and long problems, which often have long answers,
    do not come last, when no others are left to fill the rows. A problem is judged when its last completion ends, while the
    device computes the next step of the others.

    Args:
        policy: The policy that answers.
        task: Judges the answers.
        questions: The problems to answer, encoded by this policy's tokenizer.
        config: Sections [evaluator] and [rollout]; run.seed and a problem's id give the draws.
        scorer: Computes the rewards of each completion; None: no rewards.
        temperature: Sampling temperature; 0: greedy.
        count: Number of completions per problem.
        episodes: Continues a completion after a turn; the last turn is judged. None: a completion has one turn.
        on_step: Called with the number of tokens that each decoding step adds; may raise to stop.
        on_answers: Called with the number of completions that were judged, as they are.
    """
    params = SamplingParams(
        max_new_tokens=max_answer_tokens(config),
        temperature=temperature,
        stop=config.rollout.stop,
        think_tokens=config.rollout.think_tokens,
        compiled=config.learner.use_compile,
    )
    submissions = [
        Submission(
            index,
            question.prompt,
            # The same draws for every checkpoint, so that two checkpoints differ by their weights only.
            sample_seeds(config.run.seed, 0, f"evaluation/{question.problem.id}", count),
            episodes.of(question.problem) if episodes else None,
        )
        for index, question in enumerate(questions)
    ]
    submissions.sort(key=lambda submission: len(submission.prompt), reverse=True)
    max_rows = min(config.evaluator.eval_batch_size, len(questions) * count)
    answered: dict[int, AnsweredProblem] = {}
    failures = Failures()
    for index, samples in sample_in_turn(policy, submissions, params, max_rows, on_step):
        problem = questions[index].problem
        answers = _judge(
            policy, task, questions[index], samples, scorer, config.reward.grade, reported=failures
        )
        answered[index] = AnsweredProblem(problem, answers)
        if on_answers:
            on_answers(count)
    return [answered[index] for index in range(len(questions))]


def max_answer_tokens(config: Config) -> int:
    """Return the number of tokens after which an answer is cut."""
    return config.evaluator.eval_max_new_tokens or config.rollout.max_new_tokens


def _judge(  # noqa: PLR0917
    policy: Policy,
    task: Task,
    question: Question,
    group: Sequence[Sample],
    scorer: Scorer | None,
    grade: Grade,
    *,
    reported: Failures,
) -> list[Answer]:
    problem = question.problem
    chats, thoughts = zip(*(judged(policy, question.prompt, sample, grade) for sample in group), strict=True)
    scores = (
        scorer.score(problem, chats, [sample.tokens for sample in group], thoughts=thoughts)
        if scorer
        else Scores({}, {})
    )
    rewards = scores.rewards
    for failure in reported.new(problem.id, scores.failures):
        _log.warning("no value: %s", failure)
    for sample in group:
        for failure in reported.new(problem.id, {ENVIRONMENT: sample.failure} if sample.failure else {}):
            _log.warning("counted as wrong: %s", failure)
    return [
        Answer(
            text=policy.decode(sample.turn),
            answer=task.answer_of(text, problem),
            parser=find_answer(text, mathematics=problem.mathematics).parser,
            correct=not sample.failure and task.is_correct(text, problem),
            tokens=sample.sampled,
            truncated=not sample.finished,
            rewards={name: None if sample.failure else values[i] for name, values in rewards.items()},
        )
        for i, (text, sample) in enumerate(zip(map(last_text, chats), group, strict=True))
    ]
