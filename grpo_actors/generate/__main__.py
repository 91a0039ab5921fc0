"""Text from a model: ``python -m grpo_actors.generate [PROMPT] --model MODEL``.

With a prompt, or one on standard input, the answer is printed as it comes. In a terminal and without a prompt it is a
chat. With ``--batch IN --output OUT`` a file of prompts is answered side by side.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_actors.errors import ConfigError, DataError
from grpo_actors.process import run_command

if TYPE_CHECKING:
    from grpo_actors.generate.prompts import Prompt
    from grpo_actors.generate.speaker import Speaker

#: Options that have bounds: name, rule, and whether a value keeps it (no comparison with NaN does).
BOUNDS: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("max_tokens", "≥ 1", lambda value: value >= 1),
    ("max_context", "≥ 0 (0: the model's own)", lambda value: value >= 0),
    ("temperature", "≥ 0 and finite (0: greedy)", lambda value: 0 <= value < float("inf")),
    ("top_p", "> 0 and ≤ 1", lambda value: 0 < value <= 1),
    ("top_k", "≥ 0 (0: off)", lambda value: value >= 0),
    ("min_p", "≥ 0 and < 1", lambda value: 0 <= value < 1),
    ("repetition_penalty", "> 0 and finite", lambda value: 0 < value < float("inf")),
    ("seed", "≥ 0", lambda value: value >= 0),
    ("samples", "≥ 1", lambda value: value >= 1),
    ("batch_size", "≥ 1", lambda value: value >= 1),
)
#: What a batch's text depends on, beside its input and the model; how many share a batch is not among it.
KEPT_WITH_A_BATCH = (
    *("system", "raw", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"),
    "samples",
)


def parser() -> argparse.ArgumentParser:
    """The command line; imports nothing that takes time."""
    command = argparse.ArgumentParser(
        prog="python -m grpo_actors.generate",
        description="One answer, a chat, or a file of prompts answered. Without PROMPT: a chat in a terminal, "
        "else the prompt is read from standard input.",
    )
    command.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to answer")
    model = command.add_argument_group("the model")
    model.add_argument(
        "--model",
        help='a model folder, a checkpoint, an adapter, a run folder (its best checkpoint), a hub id, or "tiny"; '
        "not given: the adapter's base, or tiny",
    )
    model.add_argument("--adapter", metavar="DIR", help="an adapter to put on it, in mlx-lm's format")
    asking = command.add_argument_group("what is asked")
    asking.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    asking.add_argument(
        "--raw", action="store_true", help="no chat template: go on with the text as it stands"
    )
    asking.add_argument(
        "--max-tokens",
        type=int,
        default=512,
        metavar="N",
        help="of an answer, at most (default: %(default)s)",
    )
    asking.add_argument(
        "--max-context",
        type=int,
        default=0,
        metavar="N",
        help="tokens of prompt and answer (default: as the model was made for)",
    )
    _add_sampling(command.add_argument_group("sampling"))
    batch = command.add_argument_group("a file of prompts")
    batch.add_argument("--batch", type=Path, metavar="IN", help="JSON Lines, or a text with a prompt a line")
    batch.add_argument(
        "--output", type=Path, metavar="OUT", help="JSON Lines; if begun before, it is gone on with"
    )
    batch.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="completions side by side (default: %(default)s)",
    )
    batch.add_argument(
        "--samples",
        type=int,
        default=1,
        metavar="N",
        help="completions of each prompt (default: %(default)s)",
    )
    command.add_argument("--json", action="store_true", help="one prompt: print a JSON object a completion")
    return command


def _add_sampling(group: Any) -> None:
    group.add_argument(
        "--temperature", type=float, default=0.7, metavar="T", help="0: greedy (default: %(default)s)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="only the likeliest tokens, of this share together",
    )
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="only so many likeliest tokens")
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="only tokens of this share of the likeliest one's",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1: less of the tokens seen in prompt or answer",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed, the same text (default: %(default)s)"
    )


def check(options: argparse.Namespace) -> None:
    """Refuse values out of bounds and options that do not go together. `ConfigError`: one of them."""
    from grpo_actors.generate.prompts import is_encodable  # noqa: PLC0415  not for --help

    for name, rule, keeps in BOUNDS:
        value = getattr(options, name)
        if not keeps(value):
            raise ConfigError(f"--{name.replace('_', '-')} must be {rule}, got {value}")
    contradictions = (
        (options.batch and not options.output, "--batch needs --output, the file to write"),
        (options.output and not options.batch, "--output needs --batch, the file to read"),
        (options.batch and options.prompt is not None, "--batch has its own prompts; leave out PROMPT"),
        (options.batch and options.json, "--json is for one prompt; what --batch writes is JSON already"),
        (options.raw and options.system, "--raw knows no turns; leave out --system"),
        (not is_encodable(options.system), f"--system must be UTF-8, got {options.system!r}"),
        (
            options.samples > 1 and not (options.batch or options.json),
            "--samples of one prompt needs --json, or nobody could tell them apart",
        ),
    )
    for broken, complaint in contradictions:
        if broken:
            raise ConfigError(complaint)


def name_model(options: argparse.Namespace) -> None:
    """Put the folder or hub id in place of what the user calls the model and the adapter; may be called twice."""
    from grpo_actors.rundir.naming import resolve  # noqa: PLC0415  MLX takes a second to import

    if options.adapter is not None:
        options.adapter = resolve(options.adapter)
    elif options.model is None:
        options.model = "tiny"
    if options.model is not None:
        options.model = resolve(options.model)


def open_speaker(options: argparse.Namespace) -> "Speaker":
    """Load the model, which takes seconds.

    Raises:
        ModelError: it cannot be loaded.
        ConfigError: the adapter does not fit it.
    """
    from grpo_actors.generate.speaker import Speaker  # noqa: PLC0415
    from grpo_actors.policy.decoding.sampling import SamplingParams  # noqa: PLC0415
    from grpo_actors.rundir.naming import open_policy  # noqa: PLC0415  MLX takes a second to import

    params = SamplingParams(
        max_new_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
    )
    name_model(options)
    policy = open_policy(options.model, options.adapter)
    return Speaker(policy, params, options.seed, options.max_context)


def batch(options: argparse.Namespace) -> None:
    """``--batch``: everything that can be refused is refused before anything is written."""
    from grpo_actors.generate.output import Output, refuse_other  # noqa: PLC0415
    from grpo_actors.generate.prompts import digest, read_requests  # noqa: PLC0415

    requests = read_requests(options.batch, options.system, raw=options.raw)
    from grpo_actors.rundir.naming import weights_digest  # noqa: PLC0415  MLX takes a second to import

    name_model(options)
    settings = {
        "input": digest(options.batch),
        "model": options.model,
        "adapter": options.adapter,
        **{name: getattr(options, name) for name in KEPT_WITH_A_BATCH},
    }
    refuse_other(options.output, settings)
    speaker = open_speaker(options)
    from grpo_actors.generate.batch import encode_all, run_batch  # noqa: PLC0415

    prompts = encode_all(speaker, requests)
    with Output(options.output, {**settings, "weights": weights_digest(speaker.policy)}) as output:
        run_batch(speaker, requests, prompts, output, samples=options.samples, places=options.batch_size)


def answer(options: argparse.Namespace, prompt: "Prompt") -> None:
    """One prompt: its answer as it comes, or as JSON."""
    speaker = open_speaker(options)
    ids = speaker.encode_fitting(prompt, "PROMPT")
    if options.json:
        from grpo_actors.policy.decoding.sampling import sample_groups  # noqa: PLC0415

        [group] = sample_groups(speaker.policy, [ids], [speaker.seeds(0, options.samples)], speaker.params)
        for number, sample in enumerate(group):
            print(json.dumps(speaker.record(0, number, len(ids), sample), ensure_ascii=False))
        return
    from grpo_actors.generate.streaming import for_terminal  # noqa: PLC0415

    shown: Callable[[str], str] = for_terminal if sys.stdout.isatty() else str
    sample = speaker.answer(ids, 0, lambda text: print(shown(text), end="", flush=True))
    print()
    if not sample.finished:
        print(f"cut after --max-tokens {options.max_tokens}", file=sys.stderr)


def chat(options: argparse.Namespace) -> None:
    """No prompt, in a terminal."""
    if options.raw or options.json or not sys.stdout.isatty():
        raise ConfigError(
            "a chat needs a terminal, turns and text; give a PROMPT with --raw, --json or a redirected output"
        )
    speaker = open_speaker(options)
    speaker.require_turns()
    from grpo_actors.generate.chat import Chat  # noqa: PLC0415

    Chat(speaker, options.system).run()


def read_prompt(given: str | None) -> str:
    """The prompt of the command line, or else all of standard input. `DataError`: no text."""
    from grpo_actors.generate.prompts import is_encodable  # noqa: PLC0415

    text = given
    if text is None:
        try:
            text = sys.stdin.buffer.read().decode().rstrip("\n")
        except UnicodeDecodeError as error:
            raise DataError(
                f"standard input must be UTF-8, got byte 0x{error.object[error.start]:02x}"
            ) from None
    if not text.strip() or not is_encodable(text):
        raise DataError(
            f"PROMPT must be a text in UTF-8, got {text!r}; give one, or run it in a terminal to chat"
        )
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code, or raises for `run_command` to print."""
    options = parser().parse_args(arguments)
    check(options)
    # transformers otherwise remarks that PyTorch is absent, which is how it is meant to be.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from grpo_actors.backend import submit_long_graphs  # noqa: PLC0415

    submit_long_graphs()
    if options.batch:
        batch(options)
    elif options.prompt is None and sys.stdin.isatty():
        chat(options)
    else:
        from grpo_actors.generate.prompts import as_prompt  # noqa: PLC0415

        answer(options, as_prompt(read_prompt(options.prompt), options.system, raw=options.raw))
    return 0


if __name__ == "__main__":
    run_command(main)
