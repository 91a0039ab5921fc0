"""Start workers at once.

    python nursery.py RUN_DIR

For each name on standard input a worker attaches to the run under it; the answer is its process id. The workers are forks
of a process that has loaded all packages and computed nothing.
"""

import os
import signal
import sys

import grpo_actors.rollout.participation  # noqa: F401 - what a worker loads when it begins
from grpo_actors.process import run_command
from grpo_actors.rollout.__main__ import main


def run() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system forgets forks that have ended
    for name in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            sys.argv = [*sys.argv[:1], "--attach", *sys.argv[1:], "--name", name.strip()]
            run_command(main, "worker")
        print(pid, flush=True)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


if __name__ == "__main__":
    run()
