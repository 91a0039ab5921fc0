"""Real sockets for the tests of this folder."""

import tempfile
from collections.abc import Iterator

import pytest
from real_sockets import KeepingContext

from grpo_actors.transport.sockets import Context


@pytest.fixture
def zmq_sockets() -> Iterator[Context]:
    """A context whose sockets are closed at the end of the test."""
    context = KeepingContext()
    yield context
    context.destroy(linger=0)
    KeepingContext.kept.clear()


@pytest.fixture
def ipc_address() -> Iterator[str]:
    """An ipc address, not in tmp_path: on macOS that is longer than an ipc path may be."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield f"ipc://{folder}/s"
