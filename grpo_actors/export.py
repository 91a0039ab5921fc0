"""Take a trained policy out of its run: ``python -m grpo_actors.export RUN_DIR --fuse DIR|--adapter DIR|--gguf FILE|--upload OWNER/NAME``.

Knows which checkpoint is meant and where the result is put, whole or not at all, with its model card. Exit code 2
and one line say what was refused.
"""

import argparse
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from grpo_actors.atomic import new_file, new_folder
from grpo_actors.errors import ConfigError
from grpo_actors.process import run_command
from grpo_actors.rundir.folder import OF_A_RUN

if TYPE_CHECKING:
    from grpo_actors.exported import Exported

DTYPES = ("float32", "bfloat16", "float16")
#: Of a GGUF file's matrices, where nothing is asked for: what every reader of such files knows.
GGUF_DTYPE = "float16"


def parser() -> argparse.ArgumentParser:
    """The command line; imports nothing that takes time."""
    command = argparse.ArgumentParser(
        prog="python -m grpo_actors.export", description="Take a trained policy out of its run."
    )
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run's output folder")
    command.add_argument(
        "--checkpoint",
        metavar="N|best|last",
        default="",
        help="which one (default: the best, or the last where none was evaluated)",
    )
    form = command.add_mutually_exclusive_group()
    form.add_argument(
        "--fuse", type=Path, metavar="DIR", help="a model folder, an adapter being added to its base"
    )
    form.add_argument("--adapter", type=Path, metavar="DIR", help="the adapter alone, as mlx-lm loads it")
    form.add_argument("--gguf", type=Path, metavar="FILE", help="one file for llama.cpp and its kin")
    command.add_argument(
        "--upload",
        metavar="OWNER/NAME",
        help="send it to the hub; alone: the model folder, kept nowhere else",
    )
    command.add_argument(
        "--dequantize",
        action="store_true",
        help="unpack a quantised base, so that the sum is not rounded again",
    )
    command.add_argument(
        "--dtype", choices=DTYPES, help=f"of the weights (default: as they are; of --gguf: {GGUF_DTYPE})"
    )
    command.add_argument("--overwrite", action="store_true", help="replace what is there")
    return command


def export(options: argparse.Namespace) -> str:
    """Do what `options` ask for; returns the summary.

    Raises:
        GrpoActorsError: what was there before is as it was; where only the upload failed, the folder is whole.
    """
    _check(options)
    from grpo_actors.exported import Exported  # noqa: PLC0415  MLX takes a second to import

    exported = Exported.choose(options.run_dir, options.checkpoint)
    lines = [f"from    {exported.checkpoint.path}"]
    with TemporaryDirectory() as passing:
        made = _make(exported, options, Path(passing))
        if made != Path(passing):
            lines.append(f"wrote   {made}")
        if options.upload:
            from grpo_actors.hub import send  # noqa: PLC0415  half a second, and not always needed

            lines.append(f"sent    {send(made, options.upload, '--upload')}")
    return "\n".join(lines)


def _make(exported: "Exported", options: argparse.Namespace, passing: Path) -> Path:
    """Write what is asked for; returns where: in the empty folder `passing` where nothing is to be kept."""
    if options.gguf:
        with new_file(options.gguf, overwrite=options.overwrite, option="--gguf") as draft:
            exported.write_gguf(draft, options.dtype or GGUF_DTYPE, dequantize=options.dequantize)
        return Path(options.gguf)
    if options.adapter:
        with new_folder(
            options.adapter, overwrite=options.overwrite, option="--adapter", precious=OF_A_RUN
        ) as folder:
            exported.write_adapter(folder, _title(options), for_others=bool(options.upload))
        return Path(options.adapter)
    if options.fuse:
        with new_folder(
            options.fuse, overwrite=options.overwrite, option="--fuse", precious=OF_A_RUN
        ) as folder:
            _write_model(exported, folder, options)
        return Path(options.fuse)
    _write_model(exported, passing, options)
    return passing


def _check(options: argparse.Namespace) -> None:
    """Refuse what the options alone show to be wrong, and a token that is not there, before anything is loaded."""
    if not (options.fuse or options.adapter or options.gguf or options.upload):
        raise ConfigError("nothing to do; add --fuse DIR, --adapter DIR, --gguf FILE or --upload OWNER/NAME")
    if options.gguf and options.upload:
        raise ConfigError("--upload sends folders: it goes with --fuse, with --adapter, or alone")
    if options.adapter and (options.dtype or options.dequantize):
        raise ConfigError("--adapter takes the adapter as it is; --dtype and --dequantize go with the others")
    if options.gguf and find_spec("gguf") is None:
        raise ConfigError("--gguf: the gguf package is not installed; pip install 'grpo-actors[gguf]'")
    if options.upload:
        from grpo_actors.hub import check_token  # noqa: PLC0415  half a second, and not always needed

        check_token(options.upload, "--upload")


def _write_model(exported: "Exported", folder: Path, options: argparse.Namespace) -> None:
    exported.write_model(folder, _title(options), options.dtype, dequantize=options.dequantize)


def _title(options: argparse.Namespace) -> str:
    """What it is called where it goes: on the hub, or on this machine."""
    return str(options.upload or (options.fuse or options.adapter).name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code, or raises GrpoActorsError for `run_command` to print."""
    options = parser().parse_args(arguments)
    # transformers otherwise remarks that PyTorch is absent, which is how it is meant to be.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    print(export(options))
    return 0


if __name__ == "__main__":
    run_command(main)
