"""The learner's command lines.

python -m grpo_actors.learner RUN_DIR                    train with workers, by RUN_DIR/config.json; a run starts this
python -m grpo_actors.learner RUN_DIR --replay SOURCE    train on recorded groups instead (`grpo_actors.learner.replay`)
grpo replay SOURCE RUN_DIR                               the same
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_actors.options import add_allow, add_overrides
from grpo_actors.process import bound_memory, enter_process, run_command

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from grpo_actors.learner.loop import Run

PROGRAM = "python -m grpo_actors.learner"
EPILOG = "It needs no worker and no evaluator; the same command continues from the last checkpoint."
SOURCE = "the run whose groups to train on: its folder or its groups.jsonl; it kept them with metrics.record_groups = true"


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """Build the learner's command line."""
    command = argparse.ArgumentParser(
        prog=prog, description="Take batches of groups, update the policy, write checkpoints.", epilog=EPILOG
    )
    command.add_argument(
        "run_dir",
        type=Path,
        help="run folder with config.json; with --replay: a new folder, or that of the replay to continue",
    )
    command.add_argument("--replay", type=Path, metavar="SOURCE", help=SOURCE)
    _add_settings(command, "with --replay: ")
    command.add_argument(
        "--endpoints", help=argparse.SUPPRESS
    )  # JSON: the run's other processes got the same
    command.add_argument("--run-id", help=argparse.SUPPRESS)  # of a new run
    return command


def replay_parser(prog: str) -> argparse.ArgumentParser:
    """Build the command line of a replay."""
    command = argparse.ArgumentParser(
        prog=prog, description="Train on the groups that a run has recorded.", epilog=EPILOG
    )
    command.add_argument("replay", type=Path, metavar="SOURCE", help=SOURCE)
    command.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="a new folder, or that of the replay to continue"
    )
    _add_settings(command)
    return command


def _add_settings(command: argparse.ArgumentParser, condition: str = "") -> None:
    command.add_argument(
        "--config",
        metavar="FILE",
        help=f"{condition}settings, as for grpo train (default: those of the recorded run)",
    )
    add_overrides(command, condition)
    add_allow(command)


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Parse the command line and train."""
    command = parser(prog)
    args = command.parse_args(arguments)
    if args.replay is not None:
        return _replay(args)
    if args.config or args.overrides:
        command.error(
            "--config and --set need --replay; without it the settings come from RUN_DIR/config.json"
        )
    stop = enter_process()
    # These imports take seconds, so they come after the signal handlers are in place.
    from grpo_actors import consent  # noqa: PLC0415
    from grpo_actors.config import read_config  # noqa: PLC0415
    from grpo_actors.ranks.processes import launched_rank, ranks_here, started  # noqa: PLC0415
    from grpo_actors.rundir.folder import CONFIG_FILE  # noqa: PLC0415
    from grpo_actors.transport.sockets import Endpoints  # noqa: PLC0415

    if launched_rank():
        from grpo_actors.learner.following import follow  # noqa: PLC0415

        return follow(args.allow)
    endpoints = Endpoints(**json.loads(args.endpoints)) if args.endpoints else None
    config = read_config(args.run_dir / CONFIG_FILE)
    consent.check(consent.code_of(config), args.allow, args.run_dir / CONFIG_FILE)
    others = ["grpo_actors.learner", str(args.run_dir), *consent.as_options(args.allow)]
    with started(ranks_here(config.learner.ranks), others, "learner.ranks"):
        from grpo_actors.learner.opening import open_live  # noqa: PLC0415

        bound_memory()
        return _train(open_live(args.run_dir, config, stop, endpoints, args.run_id))


def replay(arguments: Sequence[str] | None, prog: str) -> int:
    """Parse the command line of a replay and train."""
    return _replay(replay_parser(prog).parse_args(arguments))


def _replay(args: argparse.Namespace) -> int:
    stop = enter_process()
    from grpo_actors.learner.replay import open_replay  # noqa: PLC0415 - as above

    bound_memory()
    return _train(
        open_replay(args.run_dir, args.replay, args.config, args.overrides, stop, allowed=args.allow)
    )


def _train(opened: "AbstractContextManager[Run | None]") -> int:
    """Train with the opened run; it is None if nothing is left to do."""
    from grpo_actors.learner.loop import train  # noqa: PLC0415 - as above

    with opened as run:
        return 0 if run is None else train(run)


if __name__ == "__main__":
    run_command(main, "learner")
