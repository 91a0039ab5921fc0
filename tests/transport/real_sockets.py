"""What the tests of this folder need of real sockets: a context that keeps them, and patience with an end."""

import time
from collections.abc import Callable
from typing import Any

import zmq

DEADLINE_S = 10.0


class KeepingContext(zmq.Context["zmq.Socket[bytes]"]):
    """Keeps its sockets until the test is over, so that a test may drop what it does not read again."""

    kept: list[Any] = []  # noqa: RUF012 - zmq contexts take no attributes of their own

    def socket(self, *args: Any, **kwargs: Any) -> Any:
        made = super().socket(*args, **kwargs)
        self.kept.append(made)
        return made


def wait_until(condition: Callable[[], object]) -> None:
    """Poll until it holds; the condition does its own waiting."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
