"""Make a model folder from another format: ``python -m grpo_actors.convert --gguf FILE --output DIR``.

The folder is whole or absent; each source of models is one function that
fills an empty folder and returns one line about itself. Exit code 2 and one line say what was refused.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from grpo_actors.command import run_command
from grpo_actors.drafts import new_folder

#: Fills the folder, returns the summary's line about the source.
Source = Callable[[argparse.Namespace, Path], str]

DTYPES = ("float32", "bfloat16", "float16")
PROMPT = "What is the capital of France?"


def parser() -> argparse.ArgumentParser:
    """The command line; imports nothing that takes time."""
    command = argparse.ArgumentParser(
        prog="python -m grpo_actors.convert",
        description="Make a folder that mlx-lm and transformers load, and let the model say a few words.",
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--gguf", type=Path, metavar="FILE", help="a GGUF file (llama or qwen2)")
    source.add_argument(
        "--nanochat",
        type=Path,
        metavar="DIR",
        help="a folder with nanochat's model_*.pt, meta_*.json, tokenizer.pkl",
    )
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to make")
    command.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)"
    )
    command.add_argument("--overwrite", action="store_true", help="replace DIR if it is a model folder")
    command.add_argument("--prompt", default=PROMPT, metavar="TEXT", help=f"what to ask (default: {PROMPT})")
    command.add_argument(
        "--sample-tokens",
        type=int,
        default=32,
        metavar="N",
        help="length of the answer; 0 leaves it out (default: 32)",
    )
    return command


def from_gguf(options: argparse.Namespace, folder: Path) -> str:
    """Source ``--gguf``."""
    from grpo_actors.policy.gguf import write_folder  # noqa: PLC0415  MLX takes a second to import

    made = write_folder(options.gguf, folder, options.dtype)
    formats = ", ".join(f"{count} {name}" for name, count in made.formats.items())
    return f"{options.gguf.name}: {made.architecture}, {_megabytes(made.source_bytes)}, tensors: {formats}"


def from_nanochat(options: argparse.Namespace, folder: Path) -> str:
    """Source ``--nanochat``."""
    from grpo_actors.policy.nanochat import write_folder  # noqa: PLC0415  MLX takes a second to import

    made = write_folder(options.nanochat, folder, options.dtype or "float32")
    sizes = f"{made.layers} layers, {made.vocab:,} tokens"
    return f"{options.nanochat}: nanochat, step {made.step}, {_megabytes(made.source_bytes)}, {sizes}"


#: By the option that chooses it.
SOURCES: dict[str, Source] = {"gguf": from_gguf, "nanochat": from_nanochat}


def convert(options: argparse.Namespace) -> str:
    """Make the folder that `options` ask for; returns the summary.

    Raises:
        ModelError: the source or the target is unusable; the target is then as it was.
    """
    source = next(make for name, make in SOURCES.items() if getattr(options, name) is not None)
    with new_folder(options.output, overwrite=options.overwrite) as folder:
        lines = [f"from    {source(options, folder)}"]
        if options.sample_tokens > 0:
            lines += _sample(options, folder)
    return "\n".join([*lines, f"wrote   {options.output}"])


def _sample(options: argparse.Namespace, folder: Path) -> list[str]:
    from grpo_actors.policy.trial import speak  # noqa: PLC0415  MLX takes a second to import

    trial = speak(folder, options.prompt, options.sample_tokens)
    return [
        f"model   {trial.parameters:,} parameters, {_megabytes(trial.weight_bytes)} of {trial.dtype}",
        f"asked   {trial.prompt}",
        f"answer  {trial.answer}",
        f"speed   {trial.tokens} tokens, {trial.tokens_per_s:.1f} tokens/s",
    ]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code, or raises ModelError for `run_command` to print."""
    options = parser().parse_args(arguments)
    # transformers otherwise remarks that PyTorch is absent, which is how it is meant to be.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Decoding one token is bound by memory: on a busy CPU, waiting for a second thread costs a factor of five.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    print(convert(options))
    return 0


if __name__ == "__main__":
    run_command(main)
