"""A process that the bench controls over pipes, with one JSON object a line in each direction.

Its first line is a hello: the process has then loaded everything and is warm. Processes that get their orders at
the same time start at the same time. A process ends when the pipe to it closes, however the bench itself ended.
"""

import contextlib
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


class BenchProcess:
    """One process, as the bench sees it."""

    def __init__(self, module: str, *arguments: str, processes: int) -> None:
        """Start ``python -m MODULE ARGUMENTS…``.

        Args:
            module: The module to run.
            arguments: Its arguments.
            processes: Number of processes that compute at the same time; this one gets an equal share of the machine.
        """
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
        """Send an order; does not wait for the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None

    def answer(self) -> Answer:
        """Wait for the hello or for the answer to an order.

        Raises:
            RunError: the process has ended instead; its own message is on standard error.
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
        """Close the pipe and wait until the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, before it read the last order
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ask_all(processes: Sequence[BenchProcess], order: Mapping[str, Any]) -> list[Answer]:
    """Send the same order to all processes at the same time, and wait for their answers."""
    for process in processes:
        process.send(order)
    return [process.answer() for process in processes]


def reply(answer: Mapping[str, Any]) -> None:
    """Send the hello or an answer; called in the process itself."""
    print(json.dumps(answer), flush=True)


def serve(act: Callable[[Answer], Mapping[str, Any]]) -> None:
    """Answer each order on standard input with `act`, until the pipe closes; called in the process itself."""
    for line in sys.stdin:
        reply(act(json.loads(line)))
