"""The task for problems of the library reasoning-gym: about a hundred kinds, generated on demand, without a download.

This module draws the two splits and judges answers; `gym_library` calls the library. Both making problems and scoring
answers happen in child processes.
"""

import json
import logging
import os
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import Any

from grpo_actors.errors import DataError, RewardError
from grpo_actors.tasks.answers import FORMAT_REQUEST, extract_answer
from grpo_actors.tasks.library_rewards import LIBRARY_REWARDS, is_installed
from grpo_actors.tasks.own.child_process import search_path
from grpo_actors.tasks.own.functions import OwnFunctions
from grpo_actors.tasks.task import Problem, Task

_log = logging.getLogger(__name__)

REWARD = "reasoning_gym"

#: An answer with at least this score is right; some scorers reach 1 as a sum of parts, with rounding.
RIGHT = 0.99

#: Problem i of a data set is made from seed + i. Held-out problems begin at seed 0 in every run, so that the
#: accuracies of different runs refer to the same problems; training problems begin at or above this number.
FIRST_TRAIN_SEED = 2**20

#: Seconds for judging a completion, including the import of the library the first time.
JUDGE_TIMEOUT_S = 10.0


class ReasoningGym(Task):
    """`gym_size` training problems and `gym_eval_size` held-out problems of one task of the library.

    The train split depends on `seed`, the eval split does not. There may be fewer problems: a problem that repeats
    an earlier question is left out, and so is a training problem whose question is held out. Raises DataError if the
    library is missing or rejects the name or the settings.
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
        """Return whether the library's own scorer gives full score to the text in ``<answer>`` tags."""
        arguments = {"completions": [[{"role": "assistant", "content": completion}]], **_listed(problem)}
        try:
            [score] = self._judge.call(0, arguments)
        except RewardError as error:
            _log.warning("%s: an answer could not be judged: %s", problem.id, str(error).splitlines()[0])
            return False
        return score is not None and score >= RIGHT

    def answer_of(self, completion: str, problem: Problem) -> str:
        """Return the last ``<answer>…</answer>`` unchanged, because only the scorer can compare answers."""
        del problem
        return extract_answer(completion)

    @cached_property
    def _judge(self) -> OwnFunctions:
        judge = OwnFunctions([LIBRARY_REWARDS[REWARD].spec], "reward", timeout_s=JUDGE_TIMEOUT_S)
        weakref.finalize(self, judge.close)
        return judge


def _listed(problem: Problem) -> dict[str, list[Any]]:
    return {name: [value] for name, value in problem.columns.items()}


def _spread(seed: int) -> int:
    """Hash the run's seed to 30 bits: neighbouring seeds share no problems, and numpy takes seeds of 32 bits."""
    return int.from_bytes(blake2b(str(seed).encode(), digest_size=4).digest(), "big") >> 2


def _make(
    name: str, settings: Mapping[str, Any], ranges: Sequence[tuple[int, int]]
) -> list[list[dict[str, Any]]]:
    """Make entries of the library for each (first seed, size) in a child process."""
    reply = json.loads(
        _reply(json.dumps({"task": name, "settings": settings, "ranges": ranges}, default=str))
    )
    if "failure" in reply:
        raise DataError(reply["failure"])
    entries: list[list[dict[str, Any]]] = reply["entries"]
    return entries


@lru_cache(maxsize=1)  # a process opens its task more than once, and the library takes two seconds to import
def _reply(request: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "grpo_actors.tasks.gym_library"],
        input=request + "\n",
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": search_path(), "PYTHONHASHSEED": "0"},
        check=False,
    )
    if done.returncode:
        asked = json.loads(request)
        raise DataError(
            f"data.gym_task: {asked['task']!r} could not make problems with data.gym_settings {asked['settings']} "
            f"(exit status {done.returncode}); the library's traceback is above"
        )
    return done.stdout


def _problems(
    prefix: str, entries: Sequence[Mapping[str, Any]], origin: Mapping[str, Any], seen: set[str]
) -> list[Problem]:
    """Return problems for the entries whose question is not in `seen`, and add their questions to `seen`."""
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
            # Some tasks have many right answers and give none.
            answer="" if answer is None else str(answer),
            columns={"gym": {**origin, "entry": made["entry"]}},
        )
        problems.append(problem)
    return problems
