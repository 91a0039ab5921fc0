"""The learner's command line.

python -m grpo_actors.learner RUN_DIR                    train with workers, by RUN_DIR/config.json; launch.py runs this
python -m grpo_actors.learner RUN_DIR --replay SOURCE    train on recorded groups instead (`replay`)
"""

import argparse
import json
from pathlib import Path

from grpo_actors.process import bound_memory, enter_process, run_command


def main() -> int:
    """Parse the command line and train."""
    args = _parse_arguments()
    stop = enter_process()
    # These imports take seconds, so they come after the signal handlers are in place.
    from grpo_actors import consent  # noqa: PLC0415
    from grpo_actors.config import read_config  # noqa: PLC0415
    from grpo_actors.learner.loop import train  # noqa: PLC0415
    from grpo_actors.learner.opening import open_live  # noqa: PLC0415
    from grpo_actors.rundir.folder import CONFIG_FILE  # noqa: PLC0415
    from grpo_actors.transport.sockets import Endpoints  # noqa: PLC0415

    bound_memory()
    if args.replay is not None:
        from grpo_actors.learner.replay import open_replay  # noqa: PLC0415

        opened = open_replay(args.run_dir, args.replay, args.config, args.overrides, stop, allowed=args.allow)
    else:
        endpoints = Endpoints(**json.loads(args.endpoints)) if args.endpoints else None
        config = read_config(args.run_dir / CONFIG_FILE)
        consent.check(consent.code_of(config), args.allow, args.run_dir / CONFIG_FILE)
        opened = open_live(args.run_dir, config, stop, endpoints, args.run_id)
    with opened as run:
        return 0 if run is None else train(run)


def _parse_arguments() -> argparse.Namespace:
    from grpo_actors import consent  # noqa: PLC0415 - pydantic

    parser = argparse.ArgumentParser(
        prog="python -m grpo_actors.learner",
        description="Take batches of groups, update the policy, write checkpoints.",
        epilog="--replay trains without workers and evaluator; the same command continues from the last checkpoint.",
    )
    parser.add_argument(
        "run_dir",
        type=Path,
        help="run folder with config.json; with --replay: a new folder, or that of the replay to continue",
    )
    parser.add_argument(
        "--replay",
        type=Path,
        metavar="SOURCE",
        help="train on the groups that a run recorded with metrics.record_groups = true; its folder or a groups.jsonl",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="with --replay: settings file, as for launch.py; default: the settings of the recorded run",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="with --replay: override a setting, such as algorithm=gspo; repeatable",
    )
    consent.add_option(parser)
    parser.add_argument(
        "--endpoints", help=argparse.SUPPRESS
    )  # JSON, from launch.py: the other processes got the same
    parser.add_argument("--run-id", help=argparse.SUPPRESS)  # from launch.py, for a new run
    args = parser.parse_args()
    if args.replay is None and (args.config or args.overrides):
        parser.error(
            "--config and --set need --replay; without it the settings come from RUN_DIR/config.json"
        )
    return args


if __name__ == "__main__":
    run_command(main, "learner")
