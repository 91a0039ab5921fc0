"""Runs that several test files share."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
from runs import Run, new_run


@pytest.fixture
def make_run() -> Iterator[Callable[..., Run]]:
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(new_run(**settings))


@pytest.fixture(scope="session")
def on_policy_run() -> Iterator[Run]:
    """Twelve updates with max_staleness = 0 and no interruption, for comparison with interrupted runs."""
    with new_run(max_updates=12, max_staleness=0, workers=1, record_groups=True) as run:
        assert run.run() == 0, run.stderr
        yield run
