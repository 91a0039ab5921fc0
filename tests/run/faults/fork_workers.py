"""Start workers as forks of one process: it has loaded every package, which takes seconds, and has computed nothing.

python fork_workers.py RUN_DIR     # for each name on standard input, a worker that attaches; its process id is printed
"""

import contextlib
import os
import sys

import grpo_actors.rollout.participation  # noqa: F401 - what a worker loads
from grpo_actors.process import run_command
from grpo_actors.rollout.__main__ import main


def reap(options: int) -> bool:
    """Take note of a worker that has ended; return whether there was one."""
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(-1, options)[0] != 0
    return False


for line in sys.stdin:
    while reap(os.WNOHANG):
        pass
    worker = os.fork()
    if worker == 0:
        # Where a test fails, nobody ends them: they do not wait long for a learner that is gone.
        sys.argv = ["rollout", "--attach", sys.argv[1], "--name", line.strip(), "--patience", "60"]
        run_command(main, "worker")
    print(worker, flush=True)
while reap(0):
    pass
