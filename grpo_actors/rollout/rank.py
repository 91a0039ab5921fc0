"""A rank after the first of a worker whose model is divided; the worker starts it (`following`)."""

import argparse
from collections.abc import Sequence

from grpo_actors.backend import submit_long_graphs
from grpo_actors.options import add_allow
from grpo_actors.process import enter_process, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and follow rank 0."""
    command = argparse.ArgumentParser()
    add_allow(command)
    allowed = command.parse_args(arguments).allow
    enter_process()
    submit_long_graphs()
    from grpo_actors.rollout.following import follow  # noqa: PLC0415 - MLX takes a second to import

    return follow(allowed)


if __name__ == "__main__":
    run_command(main, "worker")
