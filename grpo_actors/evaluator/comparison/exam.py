"""Evaluate candidates on the same problems, with one policy in memory at a time."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from grpo_actors.config import Config
from grpo_actors.errors import DataError
from grpo_actors.evaluator.comparison.candidates import Candidate
from grpo_actors.evaluator.comparison.progress import Progress
from grpo_actors.evaluator.comparison.result import (
    Answers,
    Result,
    accuracy_of,
    completions_of,
    sampled_of,
)
from grpo_actors.evaluator.score import AnsweredProblem, Question, answer_problems, held_out
from grpo_actors.policy.carried import NO_SYSTEM, carried_system, template_text
from grpo_actors.policy.model import Policy
from grpo_actors.process import StopRequest
from grpo_actors.rollout.episodes import open_episodes
from grpo_actors.tasks.scoring import Scorer, TrainerState
from grpo_actors.tasks.task import Problem, Task


@dataclass(frozen=True, slots=True)
class Exam:
    """The evaluation that every candidate goes through: task, settings and number of samples."""

    task: Task
    config: Config
    scorer: Scorer
    #: Number of problems; None: evaluator.eval_subset_size, 0: all.
    samples: int | None
    #: Number of samples of each problem; 0: greedy answers only.
    k: int
    #: Set when the user wants to stop.
    stop: StopRequest

    def run(
        self, candidates: Sequence[Candidate], load: Callable[[Candidate], Policy]
    ) -> Iterator[tuple[Candidate, Answers, Result]]:
        """Evaluate the candidates one after another; yield the answers and the result of each.

        Raises:
            DataError: There are no problems, or a candidate's problems differ from those of the first one.
            KeyboardInterrupt: `stop` is set.
        """
        first_problems: list[Problem] = []
        with Progress() as progress:
            for candidate in candidates:
                started_s = time.monotonic()
                policy = load(candidate)
                policy.chat.settings = self.config.data.chat_template_kwargs
                if self.config.data.system_prompt == "" and carried_system(template_text(policy.tokenizer)):
                    policy.chat.settings = {**policy.chat.settings, NO_SYSTEM: True}
                questions = held_out(self.task, self.config, policy, self.samples)
                problems = [question.problem for question in questions]
                first_problems = first_problems or problems
                if problems != first_problems:
                    raise DataError(
                        f"{candidate.name}: its tokenizer makes other prompts longer than data.max_prompt_length = "
                        f"{self.config.data.max_prompt_length} than {candidates[0].name}'s; set it higher"
                    )
                progress.set_total(len(problems) * (1 + self.k) * len(candidates))
                progress.set_name(candidate.name)
                self.scorer.trainer_state = TrainerState(candidate.update or 0)
                answers = self._answers(policy, questions, progress)
                del policy
                mx.clear_cache()
                yield candidate, answers, self._result(candidate, answers, time.monotonic() - started_s)

    def _answers(self, policy: Policy, questions: Sequence[Question], progress: Progress) -> Answers:
        def on_step(tokens: int) -> None:
            if self.stop:
                raise KeyboardInterrupt
            progress.add_tokens(tokens)

        def answer_all(temperature: float, count: int) -> list[AnsweredProblem]:
            return answer_problems(
                *(policy, self.task, questions, self.config, self.scorer),
                temperature=temperature,
                count=count,
                episodes=turns,
                on_step=on_step,
                on_answers=progress.add_completions,
            )

        with open_episodes(self.config, policy) as turns:
            greedy = answer_all(0.0, 1)
            sampled = answer_all(self.config.evaluator.eval_temperature, self.k) if self.k else []
            return Answers(greedy, sampled)

    def _result(self, candidate: Candidate, answers: Answers, seconds: float) -> Result:
        temperature = self.config.evaluator.eval_temperature
        return Result(
            checkpoint=candidate.name,
            run=None if candidate.run is None else str(candidate.run),
            update=candidate.update,
            problems=len(answers.greedy),
            accuracy=accuracy_of(answers.greedy),
            completions=completions_of(answers.greedy),
            sampled=sampled_of(answers.sampled, temperature) if answers.sampled else None,
            seconds=seconds,
        )
