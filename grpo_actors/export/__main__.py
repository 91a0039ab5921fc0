"""Export a trained policy: ``grpo export RUN_DIR --fuse DIR|--adapter DIR|--peft DIR|--gguf FILE|--upload OWNER/NAME``.

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
from grpo_actors.options import add_allow
from grpo_actors.process import run_command
from grpo_actors.rundir.folder import RUN_PATTERNS

if TYPE_CHECKING:
    from grpo_actors.export.forms import Export

PROGRAM = "python -m grpo_actors.export"
DTYPES = ("float32", "bfloat16", "float16")
#: Default type of a GGUF file's matrices: every reader of such files supports it.
GGUF_DTYPE = "float16"


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """Build the command line; import nothing slow."""
    command = argparse.ArgumentParser(prog=prog, description="Export a trained policy from its run.")
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
        "--adapter", type=Path, metavar="DIR", help="write only what was trained, as mlx-lm loads it"
    )
    form.add_argument("--peft", type=Path, metavar="DIR", help="write only the adapter, as peft loads it")
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
    add_allow(command)
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
        made, remarks = _make(exported, options, Path(temporary))
        lines += remarks
        if made != Path(temporary):
            lines.append(f"wrote   {made}")
        if options.upload:
            from grpo_actors.hub import send  # noqa: PLC0415  half a second, and not always needed

            lines.append(f"sent    {send(made, options.upload, '--upload', public=options.public)}")
    return "\n".join(lines)


def _make(exported: "Export", options: argparse.Namespace, temporary: Path) -> tuple[Path, list[str]]:
    """Write the requested form; return its path (the folder `temporary` for an upload alone) and remarks on it."""
    if options.gguf:
        with new_file(options.gguf, overwrite=options.overwrite, option="--gguf") as draft:
            exported.write_gguf(draft, options.dtype or GGUF_DTYPE, dequantize=options.dequantize)
        return Path(options.gguf), []
    if options.adapter:
        with new_folder(
            options.adapter, overwrite=options.overwrite, option="--adapter", precious=RUN_PATTERNS
        ) as folder:
            exported.write_adapter(folder, _title(options), for_others=bool(options.upload))
        return Path(options.adapter), []
    if options.peft:
        with new_folder(
            options.peft, overwrite=options.overwrite, option="--peft", precious=RUN_PATTERNS
        ) as folder:
            exported.write_peft(folder, _title(options), for_others=bool(options.upload))
        return Path(options.peft), []
    if options.fuse:
        with new_folder(
            options.fuse, overwrite=options.overwrite, option="--fuse", precious=RUN_PATTERNS
        ) as folder:
            return Path(options.fuse), _write_model(exported, folder, options)
    return temporary, _write_model(exported, temporary, options)


def _check(options: argparse.Namespace) -> None:
    """Check the options, the gguf package and the hub's token before anything is loaded."""
    if not (options.fuse or options.adapter or options.peft or options.gguf or options.upload):
        raise ConfigError(
            "nothing to do; add --fuse DIR, --adapter DIR, --peft DIR, --gguf FILE or --upload OWNER/NAME"
        )
    if options.gguf and options.upload:
        raise ConfigError("--upload sends folders: it goes with --fuse, --adapter or --peft, or alone")
    alone = "--adapter" if options.adapter else "--peft" if options.peft else ""
    if alone and (options.dtype or options.dequantize):
        raise ConfigError(f"{alone} takes the adapter as it is; --dtype and --dequantize go with the others")
    if options.public and not options.upload:
        raise ConfigError("--public: goes with --upload OWNER/NAME")
    if options.gguf and find_spec("gguf") is None:
        raise ConfigError("--gguf: the gguf package is not installed; pip install 'grpo-actors[gguf]'")
    if options.upload:
        from grpo_actors.hub import check_token  # noqa: PLC0415  half a second, and not always needed

        check_token(options.upload, "--upload")


def _write_model(exported: "Export", folder: Path, options: argparse.Namespace) -> list[str]:
    """Write a model folder; return the lines on what an adapter has lost in its base."""
    found = exported.write_model(folder, _title(options), options.dtype, dequantize=options.dequantize)
    if found is None:
        return []
    learned = f"which is {found.learned:.2g} from its base"
    lines = [f"check   mean |Δ log-prob| {found.lost:.2g} nats a token from the trained policy, {learned}"]
    if found.is_poor:
        cure = "take --dequantize" if found.is_packed else "take --dtype float32"
        lines.append(f"warning rounding the sum of base and adapter loses much of what was learned; {cure}")
    return lines


def _title(options: argparse.Namespace) -> str:
    """Return the name of the result: its repository on the hub, or its local folder's name."""
    return str(options.upload or (options.fuse or options.adapter or options.peft).name)


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run the tool and return the exit code, or raise GrpoActorsError for `run_command` to print."""
    options = parser(prog).parse_args(arguments)
    # transformers would otherwise warn that PyTorch is absent, which is intended.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    print(export(options))
    return 0


if __name__ == "__main__":
    run_command(main)
