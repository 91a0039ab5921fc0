"""A running exchange."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peers_for_tests import Run

from grpo_actors.transport.sockets import remove_endpoints, zmq_context


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    # Keep the runs until their contexts are closed: an open socket that is garbage-collected warns instead of closing,
    # and its context would wait for it.
    runs: list[Run] = []
    with contextlib.ExitStack() as stack:

        def begin(**settings: Any) -> Run:
            run = Run(tmp_path, stack.enter_context(zmq_context()), **settings)
            stack.callback(remove_endpoints, run.folder, run.endpoints)
            stack.enter_context(contextlib.closing(run.exchange))
            runs.append(run)
            run.exchange.start()
            run.publish(run.table.version)
            return run

        yield begin


@pytest.fixture
def run(start: Callable[..., Run]) -> Run:
    return start()
