"""How good a policy is on held-out problems: always the same ones with the same draws, so that scores compare.

Knows one policy and one task; refuses to know checkpoints, runs and who asks.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from grpo_actors.config import Config
from grpo_actors.episodes import Episodes, chat_of
from grpo_actors.errors import ConfigError, DataError
from grpo_actors.policy.model import Policy
from grpo_actors.policy.sampling import Sample, SamplingParams, sample_groups
from grpo_actors.schedule.order import sample_seeds
from grpo_actors.tasks.rewards import Chat
from grpo_actors.tasks.rewards import text as last_text
from grpo_actors.tasks.scoring import Scorer
from grpo_actors.tasks.task import Problem, Task

#: The two-sided 95 % quantile of the normal distribution.
Z95 = 1.959964


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
    """Score a policy: greedy, and sampled too if the configuration asks for it. The last turn is what is judged."""
    started_s = time.monotonic()
    greedy = list(_answers(policy, problems, config, 0.0, episodes=episodes, on_step=on_step))
    chats = [chat_of(policy, sample) for sample in greedy]
    right = sum(
        task.is_correct(last_text(chat), problem) for chat, problem in zip(chats, problems, strict=True)
    )
    sampled = None
    if config.evaluator.eval_sampled:
        temperature = config.evaluator.eval_temperature
        drawn = _answers(policy, problems, config, temperature, episodes=episodes, on_step=on_step)
        sampled = fmean(
            task.is_correct(last_text(chat_of(policy, sample)), problem)
            for sample, problem in zip(drawn, problems, strict=True)
        )
    low, high = wilson_interval(right, len(problems))
    return Score(
        samples=len(problems),
        accuracy=right / len(problems),
        accuracy_low=low,
        accuracy_high=high,
        sampled_accuracy=sampled,
        rewards=_reward_means(scorer, problems, chats),
        completion_length_mean=fmean(sample.sampled for sample in greedy),
        truncated_share=fmean(not sample.finished for sample in greedy),
        seconds=time.monotonic() - started_s,
    )


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """95 % interval of the share right / total (Wilson, 1927): honest at 0 and at 1, where the usual one has no width."""
    share, z2 = right / total, Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def _answers(
    policy: Policy,
    problems: Sequence[Problem],
    config: Config,
    temperature: float,
    *,
    episodes: Episodes | None,
    on_step: Callable[[int], None] | None,
) -> Iterator[Sample]:
    """One completion for each problem, in order, sampled in batches."""
    params = SamplingParams(
        max_new_tokens=config.evaluator.eval_max_new_tokens or config.rollout.max_new_tokens,
        temperature=temperature,
        stop=config.rollout.stop,
        compiled=config.learner.use_compile,
    )
    size = config.evaluator.eval_batch_size
    for first in range(0, len(problems), size):
        batch = problems[first : first + size]
        prompts = [policy.encode_chat(problem.messages) for problem in batch]
        # The same draws for every checkpoint: two of them differ by their weights only.
        seeds = [sample_seeds(config.run.seed, 0, f"evaluation/{problem.id}", 1) for problem in batch]
        responds = [episodes.of(problem) for problem in batch] if episodes else None
        for group in sample_groups(policy, prompts, seeds, params, on_step, responds=responds):
            yield group[0]


def _reward_means(scorer: Scorer, problems: Sequence[Problem], chats: Sequence[Chat]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for problem, chat in zip(problems, chats, strict=True):
        for name, (value,) in scorer.score(problem, [chat]).rewards.items():
            if value is not None:
                values.setdefault(name, []).append(value)
    return {name: fmean(given) for name, given in values.items()}
