"""Real sockets for the tests of this folder."""

import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from grpo_actors.transport.sockets import Context

DEADLINE_S = 10.0


class KeepingContext(zmq.Context["zmq.Socket[bytes]"]):
    """Keeps its sockets until the test is over, so that a test may drop what it does not read again."""

    kept: list[Any] = []  # noqa: RUF012 - zmq contexts take no attributes of their own

    def socket(self, *args: Any, **kwargs: Any) -> Any:
        made = super().socket(*args, **kwargs)
        self.kept.append(made)
        return made


@pytest.fixture
def zmq_sockets() -> Iterator[Context]:
    """A context whose sockets are closed when the test is over."""
    context = KeepingContext()
    yield context
    context.destroy(linger=0)
    KeepingContext.kept.clear()


@pytest.fixture
def ipc_address() -> Iterator[str]:
    """An ipc address: not in tmp_path, which on macOS is longer than one may be."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield f"ipc://{folder}/s"


def wait_until(condition: Callable[[], object]) -> None:
    """Poll until it holds; the condition does its own waiting."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
