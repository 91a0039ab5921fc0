"""ACTOR: scores checkpoints on held-out problems, always the same ones, so that scores are comparable.

    grpo eval CHECKPOINT … [--k 8] [--compare A B] [--plot FILE] [--answers FILE]

Started by hand, it scores any number of checkpoints (`comparison.compare`). Started by a run with ``--follow``, it
scores the checkpoints of a run as they appear (`following`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from grpo_actors.backend import submit_long_graphs
from grpo_actors.options import add_allow, add_overrides
from grpo_actors.process import bound_memory, enter_process, run_command

PROGRAM = "python -m grpo_actors.evaluator"


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """Build the command line. Its help hides ``--follow``, which only a run uses."""
    command = argparse.ArgumentParser(
        prog=prog, description="Score checkpoints on held-out problems, always the same ones."
    )
    add = command.add_argument
    add(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="a checkpoint, a run folder (its base model and all its checkpoints), a model folder or a hub id",
    )
    add("--config", metavar="FILE", help="TOML settings, as for grpo train (default: those of the run)")
    add_overrides(command)
    add("--samples", type=int, metavar="N", help="number of held-out problems to score; 0: all")
    add("--k", type=int, metavar="N", help="also draw N samples per problem: avg@N, maj@N, pass@1, 2, 4, … N")
    add(
        "--temperature",
        type=float,
        metavar="T",
        help="temperature of the samples of --k (default: eval_temperature)",
    )
    add(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="compare two checkpoints problem by problem, listed or not: base, checkpoint-44, best, or a path",
    )
    add(
        "--answers",
        type=Path,
        metavar="FILE.jsonl",
        help="write every completion to a new file, one line per problem",
    )
    add("--plot", type=Path, metavar="FILE.png|svg", help="plot accuracy over updates")
    add("--json", action="store_true", help="print one JSON object")
    add("--no-system", action="store_true", help="without the system prompt of the training")
    add_allow(command)
    add("--follow", metavar="ENDPOINT", help=argparse.SUPPRESS)
    add("--key", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    return command


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Parse the command line and score."""
    given = vars(parser(prog).parse_args(arguments))
    endpoint, key = given.pop("follow"), given.pop("key")
    stop = enter_process()
    submit_long_graphs()
    bound_memory()
    # These imports take seconds, so they come after the signal handlers are in place.
    if endpoint:
        from grpo_actors.evaluator.following import follow_run  # noqa: PLC0415

        return follow_run(Path(given["checkpoints"][0]), endpoint, stop, key_file=key, allowed=given["allow"])
    from grpo_actors.evaluator.comparison.compare import Options, evaluate_checkpoints  # noqa: PLC0415

    return evaluate_checkpoints(Options(**given), stop)


if __name__ == "__main__":
    run_command(main, "evaluator")
