"""The limit on open files, in a process of its own: a hard limit cannot be raised again."""

import resource
import subprocess
import sys

import pytest

from grpo_actors.supervisor.open_files import WANTED, raise_limit

RAISE = """
import resource, sys
soft, hard = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
from grpo_actors.supervisor.open_files import raise_limit
print(raise_limit())
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "note"),
    [
        (256, 4096, 4096, "None"),
        (4096, 4096, 4096, "None"),
        (256, 1000, 1000, "a process may open 1000 files here, fewer than 4096"),
    ],
)
def test_the_limit_is_raised_as_far_as_the_system_allows_and_less_is_explained(soft, hard, raised, note):
    command = [sys.executable, "-c", RAISE, str(soft), str(hard)]
    said, limits = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said.startswith(note)
    assert limits == f"{raised} {hard}"


@pytest.mark.parametrize(
    ("soft", "raised"), [(256, [WANTED]), (WANTED, []), (WANTED + 1, []), (resource.RLIM_INFINITY, [])]
)
def test_where_the_system_sets_no_limit_a_lower_one_is_raised(soft, raised, monkeypatch):
    unlimited, found = resource.RLIM_INFINITY, []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, unlimited))
    monkeypatch.setattr(resource, "setrlimit", lambda *limit: found.append(limit))
    assert raise_limit() is None
    assert found == [(resource.RLIMIT_NOFILE, (limit, unlimited)) for limit in raised]
