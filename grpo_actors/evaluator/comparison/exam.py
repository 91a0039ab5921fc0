"""The same problems for every policy, one policy in memory at a time."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from grpo_actors.config import Config
from grpo_actors.errors import DataError
from grpo_actors.evaluator.comparison.candidates import Candidate
from grpo_actors.evaluator.comparison.progress import Progress
from grpo_actors.evaluator.comparison.result import Result, Sheet, accuracy_of, completions_of, sampled_of
from grpo_actors.evaluator.score import Answered, answer, held_out
from grpo_actors.policy.model import Policy
from grpo_actors.process import StopRequest
from grpo_actors.rollout.episodes import open_episodes
from grpo_actors.tasks.scoring import Scorer
from grpo_actors.tasks.task import Problem, Task


@dataclass(frozen=True, slots=True)
class Exam:
    """What is asked of every candidate."""

    task: Task
    config: Config
    scorer: Scorer
    #: Problems; None: as the configuration says, 0: all.
    samples: int | None
    #: Samples of each problem; 0: greedy alone.
    k: int
    #: Set where the user wants to leave.
    stop: StopRequest

    def take(
        self, candidates: Sequence[Candidate], load: Callable[[Candidate], Policy]
    ) -> Iterator[tuple[Candidate, Sheet, Result]]:
        """What each candidate answers, as soon as it has.

        Raises:
            DataError: there are no problems, or not the same ones for all.
            KeyboardInterrupt: stop is set.
        """
        asked: list[Problem] = []
        with Progress() as progress:
            for candidate in candidates:
                started_s = time.monotonic()
                policy = load(candidate)
                problems = held_out(self.task, self.config, policy, self.samples)
                asked = asked or problems
                if problems != asked:
                    raise DataError(
                        f"{candidate.name}: its tokenizer makes other prompts longer than data.max_prompt_length = "
                        f"{self.config.data.max_prompt_length} than {candidates[0].name}'s; set it higher"
                    )
                progress.expect(len(problems) * (1 + self.k) * len(candidates))
                progress.name(candidate.name)
                sheet = self._sheet(policy, problems, progress)
                del policy
                mx.clear_cache()
                yield candidate, sheet, self._result(candidate, sheet, time.monotonic() - started_s)

    def _sheet(self, policy: Policy, problems: Sequence[Problem], progress: Progress) -> Sheet:
        def on_step(tokens: int) -> None:
            if self.stop:
                raise KeyboardInterrupt
            progress.decoded(tokens)

        def answers(temperature: float, count: int) -> Iterator[Answered]:
            for answered in answer(
                *(policy, self.task, problems, self.config, self.scorer),
                temperature=temperature,
                count=count,
                episodes=turns,
                on_step=on_step,
            ):
                progress.finished(count)
                yield answered

        with open_episodes(self.config, policy) as turns:
            sampled = answers(self.config.evaluator.eval_temperature, self.k) if self.k else ()
            return Sheet(greedy=list(answers(0.0, 1)), sampled=list(sampled))

    def _result(self, candidate: Candidate, sheet: Sheet, seconds: float) -> Result:
        temperature = self.config.evaluator.eval_temperature
        return Result(
            checkpoint=candidate.name,
            run=None if candidate.run is None else str(candidate.run),
            update=candidate.update,
            problems=len(sheet.greedy),
            accuracy=accuracy_of(sheet.greedy),
            completions=completions_of(sheet.greedy),
            sampled=sampled_of(sheet.sampled, temperature) if sheet.sampled else None,
            seconds=seconds,
        )
