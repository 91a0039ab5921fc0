"""Compile the kernels of a run ahead, for a container image or a shared machine.

    python -m grpo_actors.kernels --config FILE [--set KEY=VALUE] [--verbose]

launch.py does the same before its first run with the same settings. The kernels go to the folder that runs use:
``MLX_PTX_CACHE_DIR``, by default in the user's cache folder.
"""

import argparse
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from grpo_actors.options import add_overrides
from grpo_actors.process import run_command

if TYPE_CHECKING:
    from grpo_actors.kernels.stage import Outcome


PROGRAM = "python -m grpo_actors.kernels"


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Compile, and print one line for each part; the exit code is 1 if a part failed."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Compile the CUDA kernels of a run ahead, in several processes.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="settings, as for grpo train")
    add_overrides(parser)
    parser.add_argument("--verbose", action="store_true", help="also print the names of the kernels")
    args = parser.parse_args(arguments)
    from grpo_actors.backend import cuda_build  # noqa: PLC0415 - pydantic is too slow for --help
    from grpo_actors.config import load_config  # noqa: PLC0415
    from grpo_actors.errors import ConfigError, RunError  # noqa: PLC0415
    from grpo_actors.kernels.stage import Stage  # noqa: PLC0415

    stage = Stage.find(load_config(args.config, args.overrides).config, cuda_build())
    if stage is None:
        raise ConfigError(
            "there are no kernels to compile: they are for one model of NVIDIA GPU and MLX for CUDA, and kept in "
            "MLX_PTX_CACHE_DIR"
        )
    if stage.is_complete:
        print(f"{stage.cache}: done before for these settings")
        return 0
    try:
        with closing(stage.run()) as outcomes:
            return max([_report(outcome, verbose=args.verbose) for outcome in outcomes])
    except OSError as error:
        raise RunError(f"{stage.cache}: cannot be written ({error})") from error


def _report(outcome: "Outcome", *, verbose: bool) -> int:
    """Print the end of a part; return 1 if it failed."""
    end = f", failed: {outcome.failure}" if outcome.failure else ""
    print(f"{outcome.part:<10} {outcome.seconds:5.1f} s  {len(outcome.kernels):3} kernels{end}", flush=True)
    if verbose:
        print("".join(f"    {name}\n" for name in outcome.kernels), end="", flush=True)
    return int(bool(outcome.failure))


if __name__ == "__main__":
    run_command(main)
