"""Helpers for tests with real sockets: a context that keeps its sockets, and a wait with a deadline."""

import time
from collections.abc import Callable
from typing import Any

import zmq
from bounds import HANG_S


class KeepingContext(zmq.Context["zmq.Socket[bytes]"]):
    """A context that keeps its sockets until the end of the test, so that a test may drop sockets that it no longer reads."""

    kept: list[Any] = []  # noqa: RUF012 - zmq contexts accept no instance attributes

    def socket(self, *args: Any, **kwargs: Any) -> Any:
        made = super().socket(*args, **kwargs)
        self.kept.append(made)
        return made


def wait_until(condition: Callable[[], object]) -> None:
    """Poll until the condition holds; the condition itself has to wait."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
