"""The limit on open files, in a process of its own: a hard limit cannot be raised again."""

import subprocess
import sys

import pytest

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
