"""Problems of the library reasoning-gym: some hundred kinds, made on the spot by its generators, no download.

Knows how the two splits are drawn and how an answer is judged; `gym_library` knows the library, and both
making problems and scoring answers happen in child processes.
"""

import json
import logging
import os
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from typing import Any

from grpo_actors.errors import DataError, RewardError
from grpo_actors.tasks.answers import FORMAT_REQUEST, extract_answer
from grpo_actors.tasks.library_rewards import LIBRARY_REWARDS, is_installed
from grpo_actors.tasks.own.functions import OwnFunctions, search_path
from grpo_actors.tasks.task import Problem, Task

_log = logging.getLogger(__name__)

REWARD = "reasoning_gym"

#: An answer with this score is right; some scorers come to 1 by sums of parts.
RIGHT = 0.99

#: Problem i of a data set is made from seed + i. Those held out begin at 0 in every run, so that the accuracies of
#: different runs are about the same problems; those to train on begin at or above this number.
FIRST_TRAIN_SEED = 2**20

#: A completion may take so long to be judged, the library's import included the first time.
JUDGE_TIMEOUT_S = 10.0


class ReasoningGym(Task):
    """`gym_size` problems of one of the library's tasks, and `gym_eval_size` that are held out.

    The train split depends on `seed`, the eval split does not. A problem that repeats another's question
    is left out, and a training problem whose question is held out, so that there may be fewer. Raises DataError
    where the library is missing or refuses the name or the settings.
    """

    default_rewards: Mapping[str, float] = {REWARD: 2.0, "soft_format": 0.5, "xml_count": 0.5}

    def __init__(
        self, gym_task: str, gym_settings: Mapping[str, Any], *, seed: int, gym_size: int, gym_eval_size: int
    ) -> None:
        if not is_installed(REWARD):
            raise DataError(f'data.task: "reasoning_gym" {LIBRARY_REWARDS[REWARD].cure}')
        first = FIRST_TRAIN_SEED + _spread(seed)
        held_out_entries, entries = _make(gym_task, gym_settings, [(0, gym_eval_size), (first, gym_size)])
        seen: set[str] = set()
        origin = {"task": gym_task, "settings": dict(gym_settings)}
        held_out = _problems(f"{gym_task}/eval", held_out_entries, origin, seen)
        train = _problems(f"{gym_task}/{first}", entries, origin, seen)
        if not train:
            raise DataError(
                f"data.gym_task: {gym_task!r} must make a problem that is not held out, got none of {gym_size}; "
                "lower data.gym_eval_size or widen data.gym_settings"
            )
        left_out = gym_size - len(train)
        if left_out:
            _log.warning("%s: %d of %d problems repeat others and are left out", gym_task, left_out, gym_size)
        super().__init__(train, held_out)

    def is_correct(self, completion: str, problem: Problem) -> bool:
        """Whether the library's own scorer gives the text in ``<answer>`` tags all of its points."""
        arguments = {"completions": [[{"role": "assistant", "content": completion}]], **_listed(problem)}
        try:
            [score] = self._judge.call(0, arguments)
        except RewardError as error:
            _log.warning("%s: an answer could not be judged: %s", problem.id, str(error).splitlines()[0])
            return False
        return score is not None and score >= RIGHT

    def answer_of(self, completion: str) -> str:
        """The last ``<answer>…</answer>`` of the completion, as it is: what else is equal, only the scorer knows."""
        return extract_answer(completion)

    @cached_property
    def _judge(self) -> OwnFunctions:
        judge = OwnFunctions([LIBRARY_REWARDS[REWARD].spec], "reward", timeout_s=JUDGE_TIMEOUT_S)
        weakref.finalize(self, judge.close)
        return judge


def _listed(problem: Problem) -> dict[str, list[Any]]:
    return {name: [value] for name, value in problem.columns.items()}


def _spread(seed: int) -> int:
    """30 bits of the run's seed: neighbouring runs share no problems, and numpy takes seeds of 32 bits."""
    return int.from_bytes(blake2b(str(seed).encode(), digest_size=4).digest(), "big") >> 2


def _make(
    name: str, settings: Mapping[str, Any], ranges: Sequence[tuple[int, int]]
) -> list[list[dict[str, Any]]]:
    """Entries of the library for each (first seed, size), made in a child process."""
    request = json.dumps({"task": name, "settings": settings, "ranges": ranges}, default=str)
    done = subprocess.run(
        [sys.executable, "-m", "grpo_actors.tasks.gym_library"],
        input=request + "\n",
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": search_path(), "PYTHONHASHSEED": "0"},
        check=False,
    )
    if done.returncode:
        raise DataError(
            f"data.gym_task: {name!r} could not make problems with data.gym_settings {dict(settings)} "
            f"(exit status {done.returncode}); the library's traceback is above"
        )
    reply = json.loads(done.stdout)
    if "failure" in reply:
        raise DataError(reply["failure"])
    entries: list[list[dict[str, Any]]] = reply["entries"]
    return entries


def _problems(
    prefix: str, entries: Sequence[Mapping[str, Any]], origin: Mapping[str, Any], seen: set[str]
) -> list[Problem]:
    """The entries whose question is not in `seen`, which grows by them."""
    problems = []
    for index, made in enumerate(entries):
        question = made["question"]
        if question in seen:
            continue
        seen.add(question)
        answer = made["answer"]
        problem = Problem(
            id=f"reasoning_gym/{prefix}/{index}",
            messages=(
                {"role": "system", "content": FORMAT_REQUEST},
                {"role": "user", "content": question},
            ),
            # Some tasks have many right answers and name none.
            answer="" if answer is None else str(answer),
            columns={"gym": {**origin, "entry": made["entry"]}},
        )
        problems.append(problem)
    return problems
