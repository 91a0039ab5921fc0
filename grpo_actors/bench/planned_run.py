"""A run as launch.py starts it, but with workers whose completions have planned lengths (`planned_worker`).

``python -m grpo_actors.bench.planned_run CONFIG LENGTHS``; `launched` starts it.
"""

import os
import sys

from grpo_actors.bench.workload import LENGTHS
from grpo_actors.config import load_config
from grpo_actors.process import run_command
from grpo_actors.supervisor import worker_pool
from grpo_actors.supervisor.run import run


def main() -> int:
    """Run a whole training; return its exit code."""
    file, os.environ[LENGTHS] = sys.argv[1:]
    worker_pool.WORKER = "grpo_actors.bench.planned_worker"
    return run(load_config(file).config)


if __name__ == "__main__":
    run_command(main)
