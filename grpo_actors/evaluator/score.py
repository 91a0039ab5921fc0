"""How good a policy is on held-out problems: always the same ones with the same draws, so that scores compare.

Knows one policy and one task; refuses to know checkpoints, runs and who asks.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from grpo_actors.config import Config
from grpo_actors.errors import ConfigError, DataError
from grpo_actors.evaluator.accuracy import wilson_interval
from grpo_actors.policy.decoding.sampling import Sample, SamplingParams, sample_groups
from grpo_actors.policy.model import Policy
from grpo_actors.rollout.episodes import Episodes, chat_of
from grpo_actors.schedule.order import sample_seeds
from grpo_actors.tasks.rewards import text as last_text
from grpo_actors.tasks.scoring import Scorer, reward_means
from grpo_actors.tasks.task import Problem, Task

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Score:
    """What one policy achieves on the held-out problems."""

    samples: int
    #: Share of greedy completions that are right.
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    #: The same at the evaluator's temperature; None: not asked for.
    sampled_accuracy: float | None
    #: Unweighted mean of each reward over the greedy completions that it judged.
    rewards: dict[str, float]
    completion_length_mean: float
    truncated_share: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion of a problem, judged by its last turn."""

    text: str
    #: As the task reads it from the text; empty: it finds none.
    answer: str
    correct: bool
    #: What the policy sampled, in all turns.
    tokens: int
    truncated: bool
    #: Unweighted; None: not applicable, or the reward failed.
    rewards: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Answered:
    """A problem with all completions of one policy at one temperature."""

    problem: Problem
    answers: list[Answer]


def held_out(task: Task, config: Config, policy: Policy, samples: int | None = None) -> list[Problem]:
    """The problems to score: a subset of the held-out split that depends on nothing but the two sizes.

    Args:
        task: Its split "eval" is used.
        config: Sections [evaluator] and [data].
        policy: Its tokenizer says which prompts are short enough.
        samples: Instead of evaluator.eval_subset_size; 0: all.

    Raises:
        ConfigError: `samples` is negative.
        DataError: there is no held-out problem with a prompt short enough.
    """
    if samples is not None and samples < 0:
        raise ConfigError(f"--samples must be ≥ 0 (0: all), got {samples}")
    problems = task.problems("eval")
    count = config.evaluator.eval_subset_size if samples is None else samples
    indices = random.Random("evaluation").sample(
        range(len(problems)), k=min(count or len(problems), len(problems))
    )
    limit = config.data.max_prompt_length
    chosen = [p for p in map(problems.__getitem__, indices) if len(policy.encode_chat(p.messages)) <= limit]
    if not chosen:
        raise DataError(
            f"data: no held-out problem has a prompt of at most {limit} tokens (data.max_prompt_length)"
        )
    return chosen


def evaluate(
    policy: Policy,
    task: Task,
    problems: Sequence[Problem],
    config: Config,
    scorer: Scorer,
    *,
    episodes: Episodes | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Score:
    """Score a policy: greedy, and sampled too if the configuration asks for it; arguments as for `answer`."""
    started_s = time.monotonic()

    def first_answers(judge: Scorer | None, temperature: float) -> list[Answer]:
        answered = answer(
            *(policy, task, problems, config, judge),
            temperature=temperature,
            episodes=episodes,
            on_step=on_step,
        )
        return [problem.answers[0] for problem in answered]

    greedy = first_answers(scorer, 0.0)
    sampled = None
    if config.evaluator.eval_sampled:
        sampled = fmean(one.correct for one in first_answers(None, config.evaluator.eval_temperature))
    right = sum(one.correct for one in greedy)
    low, high = wilson_interval(right, len(problems))
    return Score(
        samples=len(problems),
        accuracy=right / len(problems),
        accuracy_low=low,
        accuracy_high=high,
        sampled_accuracy=sampled,
        rewards=reward_means(one.rewards for one in greedy),
        completion_length_mean=fmean(one.tokens for one in greedy),
        truncated_share=fmean(one.truncated for one in greedy),
        seconds=time.monotonic() - started_s,
    )


def answer(
    policy: Policy,
    task: Task,
    problems: Sequence[Problem],
    config: Config,
    scorer: Scorer | None,
    *,
    temperature: float,
    count: int = 1,
    episodes: Episodes | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[Answered]:
    """`count` completions of each problem, judged, in the order of the problems.

    Args:
        policy: Who answers.
        task: Judges the answers.
        problems: In batches of about evaluator.eval_batch_size completions; one problem's are always together.
        config: Sections [evaluator] and [rollout]; run.seed with a problem's id gives the draws.
        scorer: Its rewards are noted with each completion; None: no rewards.
        temperature: 0: greedy.
        count: Completions a problem.
        episodes: How a completion goes on after a turn; the last turn is judged. None: it has one.
        on_step: As for `sample_groups`.
    """
    params = SamplingParams(
        max_new_tokens=max_answer_tokens(config),
        temperature=temperature,
        stop=config.rollout.stop,
        compiled=config.learner.use_compile,
    )
    size = max(1, config.evaluator.eval_batch_size // count)
    for first in range(0, len(problems), size):
        batch = problems[first : first + size]
        prompts = [policy.encode_chat(problem.messages) for problem in batch]
        # The same draws for every checkpoint: two of them differ by their weights only.
        seeds = [sample_seeds(config.run.seed, 0, f"evaluation/{problem.id}", count) for problem in batch]
        responds = [episodes.of(problem) for problem in batch] if episodes else None
        groups = sample_groups(policy, prompts, seeds, params, on_step, responds=responds)
        for problem, group in zip(batch, groups, strict=True):
            yield Answered(problem, _judged(policy, task, problem, group, scorer))


def max_answer_tokens(config: Config) -> int:
    """Tokens after which an answer is cut."""
    return config.evaluator.eval_max_new_tokens or config.rollout.max_new_tokens


def _judged(
    policy: Policy, task: Task, problem: Problem, group: Sequence[Sample], scorer: Scorer | None
) -> list[Answer]:
    chats = [chat_of(policy, sample) for sample in group]
    rewards = scorer.score(problem, chats).rewards if scorer else {}
    for failure in dict.fromkeys(sample.failure for sample in group if sample.failure):
        _log.warning("counted as wrong: %s", failure)
    return [
        Answer(
            text=text,
            answer=task.answer_of(text),
            correct=not sample.failure and task.is_correct(text, problem),
            tokens=sample.sampled,
            truncated=not sample.finished,
            rewards={name: None if sample.failure else values[i] for name, values in rewards.items()},
        )
        for i, (text, sample) in enumerate(zip(map(last_text, chats), group, strict=True))
    ]
