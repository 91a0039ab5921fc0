"""Export a trained policy: ``python -m grpo_actors.export RUN_DIR --fuse DIR|--adapter DIR|--gguf FILE|--upload OWNER/NAME``.

Choose the checkpoint and write the result, completely or not at all, folders with a model card. Errors are one line and
exit code 2.
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
from grpo_actors.rundir.folder import RUN_PATTERNS

if TYPE_CHECKING:
    from grpo_actors.export.forms import Export

DTYPES = ("float32", "bfloat16", "float16")
#: Default type of a GGUF file's matrices: every reader of such files supports it.
GGUF_DTYPE = "float16"


def parser() -> argparse.ArgumentParser:
    """Build the command line; import nothing slow."""
    command = argparse.ArgumentParser(
        prog="python -m grpo_actors.export", description="Export a trained policy from its run."
    )
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run's output folder")
    command.add_argument(
        "--checkpoint",
        metavar="N|best|last",
        default="",
        help="which checkpoint (default: the best, or the last if none has beaten the base model)",
    )
    form = command.add_mutually_exclusive_group()
    form.add_argument(
        "--fuse", type=Path, metavar="DIR", help="write a model folder, with an adapter added to its base"
    )
    form.add_argument(
        "--adapter", type=Path, metavar="DIR", help="write only the adapter, as mlx-lm loads it"
    )
    form.add_argument("--gguf", type=Path, metavar="FILE", help="write one file for llama.cpp and similar")
    command.add_argument(
        "--upload",
        metavar="OWNER/NAME",
        help="upload it to the hub, to a private repository; alone: the model folder, without a local copy",
    )
    command.add_argument(
        "--public", action="store_true", help="with --upload: let everybody see the repository"
    )
    command.add_argument(
        "--dequantize",
        action="store_true",
        help="dequantise a quantised base, so that the sum is not rounded again",
    )
    command.add_argument(
        "--dtype", choices=DTYPES, help=f"type of the weights (default: unchanged; with --gguf: {GGUF_DTYPE})"
    )
    command.add_argument("--overwrite", action="store_true", help="replace an existing file or folder")
    command.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="NAME",
        help="trust_remote_code: run the Python files of the base model's folder, if the run's settings say so",
    )
    return command


def export(options: argparse.Namespace) -> str:
    """Export as `options` say and return the summary.

    Raises:
        GrpoActorsError: former files are unchanged; if only the upload failed, the written folder is complete.
    """
    _check(options)
    from grpo_actors.export.forms import Export  # noqa: PLC0415  MLX takes a second to import

    exported = Export.choose(options.run_dir, options.checkpoint, options.allow)
    lines = [f"from    {exported.checkpoint.path}"]
    with TemporaryDirectory() as temporary:
        made = _make(exported, options, Path(temporary))
        if made != Path(temporary):
            lines.append(f"wrote   {made}")
        if options.upload:
            from grpo_actors.hub import send  # noqa: PLC0415  half a second, and not always needed

            lines.append(f"sent    {send(made, options.upload, '--upload', public=options.public)}")
    return "\n".join(lines)


def _make(exported: "Export", options: argparse.Namespace, temporary: Path) -> Path:
    """Write the requested form and return its path: the empty folder `temporary` if only an upload is requested."""
    if options.gguf:
        with new_file(options.gguf, overwrite=options.overwrite, option="--gguf") as draft:
            exported.write_gguf(draft, options.dtype or GGUF_DTYPE, dequantize=options.dequantize)
        return Path(options.gguf)
    if options.adapter:
        with new_folder(
            options.adapter, overwrite=options.overwrite, option="--adapter", precious=RUN_PATTERNS
        ) as folder:
            exported.write_adapter(folder, _title(options), for_others=bool(options.upload))
        return Path(options.adapter)
    if options.fuse:
        with new_folder(
            options.fuse, overwrite=options.overwrite, option="--fuse", precious=RUN_PATTERNS
        ) as folder:
            _write_model(exported, folder, options)
        return Path(options.fuse)
    _write_model(exported, temporary, options)
    return temporary


def _check(options: argparse.Namespace) -> None:
    """Check the options, the gguf package and the hub's token before anything is loaded."""
    if not (options.fuse or options.adapter or options.gguf or options.upload):
        raise ConfigError("nothing to do; add --fuse DIR, --adapter DIR, --gguf FILE or --upload OWNER/NAME")
    if options.gguf and options.upload:
        raise ConfigError("--upload sends folders: it goes with --fuse, with --adapter, or alone")
    if options.adapter and (options.dtype or options.dequantize):
        raise ConfigError("--adapter takes the adapter as it is; --dtype and --dequantize go with the others")
    if options.public and not options.upload:
        raise ConfigError("--public: goes with --upload OWNER/NAME")
    if options.gguf and find_spec("gguf") is None:
        raise ConfigError("--gguf: the gguf package is not installed; pip install 'grpo-actors[gguf]'")
    if options.upload:
        from grpo_actors.hub import check_token  # noqa: PLC0415  half a second, and not always needed

        check_token(options.upload, "--upload")


def _write_model(exported: "Export", folder: Path, options: argparse.Namespace) -> None:
    exported.write_model(folder, _title(options), options.dtype, dequantize=options.dequantize)


def _title(options: argparse.Namespace) -> str:
    """Return the name of the result: its repository on the hub, or its local folder's name."""
    return str(options.upload or (options.fuse or options.adapter).name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool and return the exit code, or raise GrpoActorsError for `run_command` to print."""
    options = parser().parse_args(arguments)
    # transformers would otherwise warn that PyTorch is absent, which is intended.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    print(export(options))
    return 0


if __name__ == "__main__":
    run_command(main)
