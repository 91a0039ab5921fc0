"""A process beside the bench, told what to do over pipes, a JSON object a line each way.

What it says first is its hello: by then it has loaded all it needs and is warm. Several that are told at
once begin at once. It ends when the pipe to it closes, however the bench has ended.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from grpo_actors.errors import RunError
from grpo_actors.supervisor.children import how_it_ended
from grpo_actors.supervisor.machine import Machine, equal_share

Answer = dict[str, Any]


class Companion:
    """The bench's end."""

    def __init__(self, module: str, *arguments: str, processes: int) -> None:
        """Start ``python -m MODULE ARGUMENTS…`` with its share of a machine on which so many processes compute."""
        self._module = module
        share = equal_share(Machine.here(asks_gpu=False), processes)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **share.environment},
            text=True,
        )

    def send(self, order: Mapping[str, Any]) -> None:
        """Have it begin; does not wait."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None

    def answer(self) -> Answer:
        """Wait for its hello, or for the answer to an order.

        Raises:
            RunError: it has ended instead; what it said of that is on standard error.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._gone()
        answer: Answer = json.loads(line)
        return answer

    def _gone(self) -> RunError:
        return RunError(f"{self._module}: a process of the bench {how_it_ended(self._process.wait())}")

    def close(self) -> None:
        """Let it end, and wait until it has."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def all_answers(companions: Sequence[Companion], order: Mapping[str, Any]) -> list[Answer]:
    """Have all of them do the same at once."""
    for companion in companions:
        companion.send(order)
    return [companion.answer() for companion in companions]


def say(answer: Mapping[str, Any]) -> None:
    """In the companion itself: its hello, or the answer to an order."""
    print(json.dumps(answer), flush=True)


def obey(act: Callable[[Answer], Mapping[str, Any]]) -> None:
    """In the companion itself: do what each line of standard input says, until there is no more."""
    for line in sys.stdin:
        say(act(json.loads(line)))
