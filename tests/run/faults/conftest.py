"""Runs that must survive what a test does to them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import pytest
from faulty_run import FaultyRun
from runs import new_run


@pytest.fixture
def faulty_run() -> Iterator[Callable[..., FaultyRun]]:
    """Make runs with these arguments, environment and settings; none is started."""
    with contextlib.ExitStack() as stack:

        def make(*arguments: str, environment: Mapping[str, str] | None = None, **settings) -> FaultyRun:
            run = stack.enter_context(new_run(FaultyRun, **settings))
            run.arguments = arguments
            run.environment |= environment or {}
            return run

        yield make


@pytest.fixture
def start_run(faulty_run) -> Callable[..., FaultyRun]:
    """Make runs, and start them; they have trained once when the test gets them."""

    def start(*arguments: str, **settings) -> FaultyRun:
        run = faulty_run(*arguments, **settings)
        run.start()
        run.wait_for_update(1)
        return run

    return start
