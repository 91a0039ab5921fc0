"""Train a model with GRPO: read the settings, start the actors, wait for them.

    grpo train quickstart --set num_generations=16 --dry-run
    grpo trial quickstart

launch.py is the same program. All slow imports come after the arguments are parsed, so that ``--help`` answers at once.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_actors.options import add_config, add_overrides
from grpo_actors.process import enter_process, run_command

if TYPE_CHECKING:
    from grpo_actors.config import LoadedConfig

PROGRAM = "python -m grpo_actors.train"
#: What trains if the command line names no settings: the file that ``grpo init`` writes.
DEFAULT_CONFIG = "grpo.toml"


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """Build the command line of a training."""
    command = _common(prog, "Train a language model with GRPO on MLX.", "First try: grpo train quickstart")
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--resume", action="store_true", help="continue the run, or fail if there is none to continue"
    )
    which.add_argument(
        "--again",
        action="store_true",
        help="if the run is done, train once more in a new folder beside it; an unfinished one continues, as always",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="print and check the resolved settings, then exit"
    )
    command.add_argument(
        "--trial",
        action="store_true",
        help="try the run first: sample and train one update within two minutes, write nothing, say what to change",
    )
    command.add_argument(
        "--json", action="store_true", help="print one JSON object per event; with --dry-run: the settings"
    )
    command.add_argument("--caller", action="store_true", help=argparse.SUPPRESS)
    return command


def trial_parser(prog: str) -> argparse.ArgumentParser:
    """Build the command line of a trial, which is that of a training without what does not go with it."""
    command = _common(
        prog,
        "Try a run before it starts: sample and train one update within two minutes, write nothing, say what to change.",
        "First try: grpo trial quickstart",
    )
    command.set_defaults(trial=True, resume=False, again=False, dry_run=False, json=False, caller=False)
    return command


def _common(prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(prog=prog, description=description, epilog=epilog)
    add_config(command.add_mutually_exclusive_group(), DEFAULT_CONFIG)
    add_overrides(command)
    return command


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Resolve the settings, then print them, try the run, or train.

    Returns:
        The process's exit code: 0 if the run finished or was asked to stop.
    """
    return _run(parser(prog), arguments)


def trial(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Try the run; return 0 if it is ready, else 2."""
    return _run(trial_parser(prog), arguments)


def _run(command: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    given = command.parse_args(arguments)
    if given.caller:
        return _run_for_caller()
    file = given.config or given.config_option or DEFAULT_CONFIG
    if file == DEFAULT_CONFIG and not Path(file).is_file():
        command.error(
            f"there is no {DEFAULT_CONFIG} here; name the settings, as in: grpo train quickstart; or let "
            "grpo init write some"
        )
    from grpo_actors.config import load_config  # noqa: PLC0415 - pydantic is too slow for --help
    from grpo_actors.errors import os_errors_in_one_line  # noqa: PLC0415
    from grpo_actors.supervisor.pipes import without_pipes  # noqa: PLC0415

    overrides = [*given.overrides, *(["run.resume=must"] if given.resume else [])]
    with os_errors_in_one_line():
        loaded = load_config(file, overrides)
        if given.again:
            from grpo_actors.runs.again import unfinished_folder  # noqa: PLC0415

            folder, note = unfinished_folder(Path(loaded.config.run.output_dir))
            print(note, file=sys.stderr)
            loaded = load_config(file, [*overrides, f"run.output_dir={folder}"])
    if given.dry_run:
        _show(loaded, as_json=given.json)
        return 0
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    if given.trial:
        return _try(loaded)
    from grpo_actors.ranks.processes import launched_rank  # noqa: PLC0415

    if launched_rank():  # `mlx.launch` runs this command on each host; the run itself is next to rank 0
        return _follow(loaded)
    from grpo_actors.supervisor.run import run  # noqa: PLC0415

    with without_pipes(loaded.config) as config:
        return run(config, as_json=given.json)


def _run_for_caller() -> int:
    from grpo_actors.supervisor.pipes import without_pipes  # noqa: PLC0415
    from grpo_actors.supervisor.run import run  # noqa: PLC0415
    from grpo_actors.train.caller import settings_of_caller  # noqa: PLC0415

    with without_pipes(settings_of_caller()) as config:
        return run(config, as_json=True)


def _follow(loaded: "LoadedConfig") -> int:
    from grpo_actors.consent import code_of_model  # noqa: PLC0415

    enter_process()
    from grpo_actors.learner.following import follow  # noqa: PLC0415 - MLX takes a second to import

    return follow([*code_of_model(loaded.config.model)])


def _show(loaded: "LoadedConfig", *, as_json: bool) -> None:
    """Print the settings, their origins and the memory plan, and check them."""
    from grpo_actors.config.show import as_json as json_of  # noqa: PLC0415
    from grpo_actors.config.show import as_text  # noqa: PLC0415
    from grpo_actors.supervisor.allocation import allocate  # noqa: PLC0415
    from grpo_actors.supervisor.fit import plan_text  # noqa: PLC0415
    from grpo_actors.supervisor.machine import Machine  # noqa: PLC0415
    from grpo_actors.supervisor.pipes import without_pipes  # noqa: PLC0415
    from grpo_actors.supervisor.preflight import check  # noqa: PLC0415
    from grpo_actors.tasks.registry import rewards_of  # noqa: PLC0415

    show, allocation = json_of if as_json else as_text, allocate(loaded.config, Machine.here(asks_gpu=True))
    plan, rewards = plan_text(loaded.config, allocation), rewards_of(loaded.config)
    print(show(loaded, memory_plan=plan, rewards=rewards), end="", flush=True)
    with without_pipes(loaded.config) as config:
        for note in check(config, allocation):
            print(f"note: {note}", file=sys.stderr)


def _try(loaded: "LoadedConfig") -> int:
    from grpo_actors.supervisor.allocation import allocate  # noqa: PLC0415
    from grpo_actors.supervisor.machine import Machine  # noqa: PLC0415
    from grpo_actors.supervisor.preflight import check_inputs  # noqa: PLC0415

    for note in check_inputs(loaded.config, allocate(loaded.config, Machine.here(asks_gpu=True))):
        print(f"note: {note}", file=sys.stderr)
    from grpo_actors.trial.trial import run_trial  # noqa: PLC0415 - MLX takes a second to import

    return run_trial(loaded.config)


if __name__ == "__main__":
    run_command(main)
