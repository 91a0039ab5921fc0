"""Train a model with GRPO: read the settings, start the actors, wait for them.

    python launch.py --config quickstart.toml --set num_generations=16 --dry-run

All slow imports come after the arguments are parsed, so that ``--help`` answers at once.
"""

import grpo_actors  # noqa: F401 - before all others: it moves this folder behind the standard library

# isort: split
import argparse
import sys

from grpo_actors.process import run_command


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; argparse itself handles ``--help`` and usage errors."""
    parser = argparse.ArgumentParser(
        prog="launch.py",
        description="Train a language model with GRPO on MLX.",
        epilog="First try: python launch.py --config quickstart.toml",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="TOML settings: a path, or the name of a file in configs/; or a run folder's config.json",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a setting, as rollout.num_generations=16 or num_generations=16; repeatable",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run, or fail if there is none to continue"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print and check the resolved settings, then exit"
    )
    parser.add_argument(
        "--trial",
        action="store_true",
        help="try the run first: sample and train one update within two minutes, write nothing, say what to change",
    )
    parser.add_argument("--json", action="store_true", help="with --dry-run: print JSON")
    arguments = parser.parse_args()
    if arguments.json and not arguments.dry_run:
        parser.error("--json needs --dry-run")
    return arguments


def main() -> int:
    """Resolve the settings, then print them or train.

    Returns:
        The process's exit code: 0 if the run finished or was asked to stop.
    """
    arguments = parse_arguments()
    from grpo_actors.config import load_config  # noqa: PLC0415 - pydantic is too slow for --help
    from grpo_actors.errors import os_errors_in_one_line  # noqa: PLC0415
    from grpo_actors.supervisor.pipes import without_pipes  # noqa: PLC0415

    overrides = [*arguments.overrides, *(["run.resume=must"] if arguments.resume else [])]
    with os_errors_in_one_line():
        loaded = load_config(arguments.config, overrides)
    if arguments.dry_run:
        from grpo_actors.config.show import as_json, as_text  # noqa: PLC0415
        from grpo_actors.supervisor.fit import plan_text  # noqa: PLC0415
        from grpo_actors.supervisor.machine import Machine  # noqa: PLC0415
        from grpo_actors.supervisor.preflight import check  # noqa: PLC0415
        from grpo_actors.tasks.registry import rewards_of  # noqa: PLC0415

        show, machine = as_json if arguments.json else as_text, Machine.here(asks_gpu=True)
        plan, rewards = plan_text(loaded.config, machine), rewards_of(loaded.config)
        print(show(loaded, memory_plan=plan, rewards=rewards), end="", flush=True)
        with without_pipes(loaded.config) as config:
            for note in check(config, machine):
                print(f"note: {note}", file=sys.stderr)
        return 0
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    if arguments.trial:
        from grpo_actors.supervisor.machine import Machine  # noqa: PLC0415
        from grpo_actors.supervisor.preflight import check_inputs  # noqa: PLC0415

        for note in check_inputs(loaded.config, Machine.here(asks_gpu=True)):
            print(f"note: {note}", file=sys.stderr)
        from grpo_actors.trial.trial import run_trial  # noqa: PLC0415

        return run_trial(loaded.config)
    from grpo_actors.supervisor.supervisor import run  # noqa: PLC0415

    with without_pipes(loaded.config) as config:
        return run(config)


if __name__ == "__main__":
    run_command(main)
