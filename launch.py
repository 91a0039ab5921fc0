"""Train a model with GRPO: ``python launch.py --config quickstart.toml`` is ``grpo train quickstart``."""

import grpo_actors  # noqa: F401 - before all others: it moves this folder behind the standard library

# isort: split
from functools import partial

from grpo_actors.process import run_command
from grpo_actors.train.__main__ import main

if __name__ == "__main__":
    run_command(partial(main, prog="launch.py"))
