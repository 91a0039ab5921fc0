"""The converter's command line: ``grpo convert --hf-path NAME --output-dir DIR``.

The target folder is whole or absent. Each source format is one function: it fills an empty folder and returns its
lines of the summary. An error ends the command with one line and exit code 2.
"""

import argparse
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo_actors.atomic import new_folder
from grpo_actors.errors import ModelError, RunError
from grpo_actors.policy.plan import BITS, DEFAULT_BITS, DTYPES, GROUP_SIZE, GROUP_SIZES, Plan
from grpo_actors.process import run_command
from grpo_actors.rundir.folder import RUN_PATTERNS

PROGRAM = "python -m grpo_actors.convert"
#: Fills the folder and returns its part of the summary: one line on the source, then labelled lines.
Source = Callable[[argparse.Namespace, Path], str]

PROMPT = "What is the capital of France?"
UPLOAD = "--upload-repo"


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """Return the command line's parser; imports nothing slow."""
    command = argparse.ArgumentParser(
        prog=prog,
        description="Make a folder that mlx-lm and transformers load, compare it with its source, and sample an answer.",
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--hf-path", metavar="NAME", help="a Hugging Face folder or hub id; the model may take images"
    )
    source.add_argument(
        "--gguf", type=Path, metavar="FILE", help="a GGUF file (llama, smollm3, qwen2, qwen3 or gemma3)"
    )
    source.add_argument(
        "--nanochat",
        type=Path,
        metavar="DIR",
        help="a folder with nanochat's model_*.pt, meta_*.json, tokenizer.pkl",
    )
    command.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="the folder to make")
    command.add_argument("--overwrite", action="store_true", help="replace DIR if it is a model folder")
    command.add_argument(
        UPLOAD,
        metavar="OWNER/NAME",
        help="upload the finished folder to this hub repository, which is private",
    )
    command.add_argument(
        "--public", action="store_true", help=f"with {UPLOAD}: let everybody see the repository"
    )
    _add_weight_options(command)
    command.add_argument(
        "--eos-token", metavar="TOKEN", help="the token that ends answers, instead of the model's own"
    )
    command.add_argument(
        "--text-only", action="store_true", help="keep only the language part of a model that takes images"
    )
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model"
    )
    command.add_argument(
        "--prompt", default=PROMPT, metavar="TEXT", help=f"prompt of the sampled answer (default: {PROMPT})"
    )
    command.add_argument(
        "--sample-tokens",
        type=int,
        default=32,
        metavar="N",
        help="tokens of the sampled answer; 0 samples none (default: 32)",
    )
    return command


def _add_weight_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        help="type of the weights (default: unchanged; float32 for GGUF and nanochat)",
    )
    command.add_argument("-q", "--quantize", action="store_true", help="quantise the weights")
    command.add_argument(
        "--bits", type=int, choices=BITS, help=f"bits of a quantised weight (default: {DEFAULT_BITS})"
    )
    command.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        help=f"number of weights that share a scale (default: {GROUP_SIZE})",
    )


def from_gguf(options: argparse.Namespace, folder: Path) -> str:
    """Convert the file of ``--gguf`` into `folder`."""
    from grpo_actors.convert import gguf  # noqa: PLC0415  MLX takes a second to import

    plan = _plan(options)
    with _whole_weights(folder, plan) as whole:
        made = gguf.write_folder(options.gguf, whole, plan.dtype or "float32")
    formats = ", ".join(f"{count} {name}" for name, count in made.formats.items())
    line = f"{options.gguf.name}: {made.architecture}, {_megabytes(made.source_bytes)}, tensors: {formats}"
    return f"{line}\n{_compare(plan, lambda: gguf.source_model(options.gguf), folder)}"


def from_nanochat(options: argparse.Namespace, folder: Path) -> str:
    """Convert the checkpoint of ``--nanochat`` into `folder`."""
    from grpo_actors.convert import nanochat  # noqa: PLC0415  MLX takes a second to import

    plan = _plan(options)
    with _whole_weights(folder, plan) as whole:
        made = nanochat.write_folder(options.nanochat, whole, plan.dtype or "float32")
    sizes = f"{made.layers} layers, {made.vocab:,} tokens"
    line = f"{options.nanochat}: nanochat, step {made.step}, {_megabytes(made.source_bytes)}, {sizes}"
    return f"{line}\n{_compare(plan, lambda: nanochat.source_model(options.nanochat), folder)}"


@contextmanager
def _whole_weights(folder: Path, plan: Plan) -> Iterator[Path]:
    """Yield the folder to write unquantised weights to.

    This is `folder` itself, or with quantisation a subfolder whose model is then quantised into `folder`.
    """
    if plan.bits is None:
        yield folder
        return
    from grpo_actors.convert import huggingface  # noqa: PLC0415  MLX takes a second to import

    whole = folder / "whole"
    whole.mkdir()
    yield whole
    huggingface.write_folder(whole, folder, plan)
    shutil.rmtree(whole)


def from_hugging_face(options: argparse.Namespace, folder: Path) -> str:
    """Convert the model of ``--hf-path`` into `folder`."""
    from grpo_actors.convert import huggingface, vision  # noqa: PLC0415

    plan = _plan(options)
    source = huggingface.find(options.hf_path)
    config = huggingface.read_config(source)
    with_vision = vision.takes_images(config) and not options.text_only
    if with_vision:
        stored = vision.write_folder(source, config, folder, plan)
    else:
        stored = huggingface.write_folder(source, folder, plan)
    kept = "with its eyes, " if with_vision else ""
    line = f"{options.hf_path}: {config['model_type']}, {kept}written as {stored}"
    missing = vision.no_language_part(folder, plan)
    if missing:
        return f"{line}\ncheck   none: {missing}"
    return f"{line}\n{_compare(plan, lambda: huggingface.load_lazily(source, plan)[0], folder)}"


#: Option that chooses a source -> its function.
SOURCES: dict[str, Source] = {"gguf": from_gguf, "nanochat": from_nanochat, "hf_path": from_hugging_face}


def convert(options: argparse.Namespace) -> str:
    """Make the folder that `options` describe; returns the summary.

    Raises:
        ModelError: the source, the target or an option is unusable; the target is then unchanged.
    """
    source = next(make for name, make in SOURCES.items() if getattr(options, name) is not None)
    plan = _plan(options)
    with new_folder(
        options.output_dir, overwrite=options.overwrite, option="--output-dir", precious=RUN_PATTERNS
    ) as folder:
        lines = [f"from    {source(options, folder)}"]
        if options.eos_token is not None:
            _set_end(folder, options.eos_token, plan)
        if options.sample_tokens > 0:
            lines += _sample(options, folder, plan)
    return "\n".join([*lines, f"wrote   {options.output_dir}"])


def _plan(options: argparse.Namespace) -> Plan:
    if not options.quantize and (options.bits or options.group_size):
        raise ModelError(f"--{'bits' if options.bits else 'group-size'} needs --quantize beside it")
    return Plan(
        dtype=options.dtype,
        bits=(options.bits or DEFAULT_BITS) if options.quantize else None,
        group_size=options.group_size or GROUP_SIZE,
        trust_remote_code=options.trust_remote_code,
    )


def _compare(plan: Plan, source: Callable[[], Any], folder: Path) -> str:
    """Return the summary's line that compares the log-probs of the source and of `folder`."""
    from grpo_actors.convert import fidelity  # noqa: PLC0415  MLX takes a second to import

    difference = fidelity.logprob_difference(source, folder, plan)
    if difference is None:
        return "check   none: the source in float32 does not fit into this machine's memory"
    return f"check   mean |Δ log-prob| {difference:.2g} nats a token from the source, in float32"


def _set_end(folder: Path, text: str, plan: Plan) -> None:
    from grpo_actors.convert import huggingface  # noqa: PLC0415  MLX takes a second to import

    huggingface.set_end(folder, text, plan)


def _sample(options: argparse.Namespace, folder: Path, plan: Plan) -> list[str]:
    from grpo_actors.convert import vision  # noqa: PLC0415  MLX takes a second to import
    from grpo_actors.convert.trial import try_model  # noqa: PLC0415

    missing = vision.no_language_part(folder, plan)
    if missing:
        return [f"answer  none, and no training with text alone: {missing}"]
    trial = try_model(folder, options.prompt, options.sample_tokens, trust_remote_code=plan.trust_remote_code)
    return [
        f"model   {trial.parameters:,} parameters, {_megabytes(trial.weight_bytes)}, {trial.stored}",
        f"asked   {trial.prompt}",
        f"answer  {trial.answer}",
        f"speed   {trial.tokens} tokens, {trial.tokens_per_s:.1f} tokens/s",
    ]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run the tool; returns the exit code, or raises ModelError for `run_command` to print."""
    options = parser(prog).parse_args(arguments)
    # transformers otherwise warns that PyTorch is absent, which is intended.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Decoding one token is bound by memory: on a busy CPU, waiting for a second thread makes it five times slower.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if options.upload_repo is None:
        print(convert(options))
        return 0
    from grpo_actors.hub import check_token  # noqa: PLC0415  takes half a second to import

    check_token(options.upload_repo, UPLOAD)
    print(convert(options), flush=True)
    from grpo_actors.policy.locate import locate  # noqa: PLC0415  only here

    source = locate(options.hf_path) if options.hf_path else None
    hub_id = source if isinstance(source, str) else None
    print(f"sent    {upload(options.output_dir, options.upload_repo, hub_id, public=options.public)}")
    return 0


def upload(folder: Path, repository: str, base_model: str | None, *, public: bool = False) -> str:
    """Upload `folder` to the hub, for everybody if `public`; returns the address.

    The model card names the base model if that has a hub id.

    Raises:
        RunError: the upload failed; `folder` is whole and stays.
    """
    from huggingface_hub import ModelCard, ModelCardData  # noqa: PLC0415  takes half a second to import

    from grpo_actors.hub import send  # noqa: PLC0415  takes half a second to import

    data = ModelCardData(
        library_name="mlx", pipeline_tag="text-generation", tags=["mlx"], base_model=base_model
    )
    origin = f"Converted to MLX from {base_model}." if base_model else "Converted to MLX."
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {repository}\n\n{origin}\n").save(folder / "README.md")
    try:
        return send(folder, repository, UPLOAD, public=public)
    except RunError as error:
        by_hand = f"hf upload {repository} {folder}" + ("" if public else " --private")
        raise RunError(f"{error}; {folder} is whole: send it with {by_hand}") from error


if __name__ == "__main__":
    run_command(main)
