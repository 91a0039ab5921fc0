"""Generate text with a model: ``grpo generate [PROMPT] --model MODEL``.

With a prompt, as an argument or on standard input, the answer is printed while it is sampled. In a terminal without a
prompt it starts a chat. With ``--batch IN --output OUT`` it answers a file of prompts, many at a time.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence

from grpo_actors.errors import ConfigError, DataError
from grpo_actors.generate.command_line import PROGRAM, chat_parser, check, parser
from grpo_actors.generate.opening import open_generator, resolve_model
from grpo_actors.generate.prompts import is_encodable
from grpo_actors.process import bound_memory, run_command
from grpo_actors.tasks.lines import excerpt

__all__ = ["chat_main", "chat_parser", "main", "parser"]

#: Options that a batch's text depends on, next to its input and the model; the batch size is not one of them.
KEPT_WITH_A_BATCH = (
    "system",
    "no_system",
    "raw",
    "chat_template_kwargs",
    "think_tokens",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "samples",
)


def batch(options: argparse.Namespace) -> None:
    """Run ``--batch``; check everything before anything is written."""
    from grpo_actors.generate.output import Output, check_resumable  # noqa: PLC0415
    from grpo_actors.generate.prompts import digest, read_requests  # noqa: PLC0415

    read_requests(options.batch, "", raw=options.raw)  # before MLX is imported
    from grpo_actors.rundir.naming import weights_digest  # noqa: PLC0415  MLX takes a second to import

    resolve_model(options)
    settings = {
        "input": digest(options.batch),
        "model": options.model,
        "adapter": options.adapter,
        **{name: getattr(options, name) for name in KEPT_WITH_A_BATCH},
    }
    check_resumable(options.output, settings)
    requests = read_requests(options.batch, options.system, raw=options.raw)
    generator = open_generator(options)
    from grpo_actors.generate.batch import encode_all, run_batch  # noqa: PLC0415

    prompts = encode_all(generator, requests)
    with Output(options.output, {**settings, "weights": weights_digest(generator.policy)}) as output:
        run_batch(generator, requests, prompts, output, samples=options.samples, rows=options.batch_size)


def answer(options: argparse.Namespace, text: str) -> None:
    """Answer one prompt: print the text while it is sampled, or print JSON."""
    from grpo_actors.generate.prompts import as_prompt  # noqa: PLC0415

    generator = open_generator(options)
    ids = generator.encode_fitting(as_prompt(text, options.system, raw=options.raw), "PROMPT")
    if options.json:
        from grpo_actors.policy.decoding.sampling import sample_groups  # noqa: PLC0415

        [group] = sample_groups(
            generator.policy, [ids], [generator.seeds(0, options.samples)], generator.params
        )
        for number, sample in enumerate(group):
            print(json.dumps(generator.record(0, number, len(ids), sample), ensure_ascii=False))
        return
    from grpo_actors.generate.streaming import for_terminal  # noqa: PLC0415

    shown: Callable[[str], str] = for_terminal if sys.stdout.isatty() else str
    sample = generator.answer(ids, 0, lambda text: print(shown(text), end="", flush=True))
    print()
    if not sample.finished:
        print(f"cut after --max-tokens {options.max_tokens}", file=sys.stderr)


def chat(options: argparse.Namespace) -> None:
    """Run a chat in a terminal."""
    if options.raw or options.json or not sys.stdout.isatty():
        raise ConfigError(
            "a chat needs a terminal and works without --raw and --json; give a PROMPT with --raw, --json or "
            "redirected output"
        )
    generator = open_generator(options)
    generator.require_chat_template()
    from grpo_actors.generate.chat import Chat  # noqa: PLC0415

    Chat(generator, options.system).run()


def read_prompt(given: str | None) -> str:
    """Return the command line's prompt, or else all of standard input.

    Raises:
        DataError: it is empty or not UTF-8.
    """
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
            f"PROMPT must be a text in UTF-8, got {excerpt(text)}; give one, or run it in a terminal to chat"
        )
    return text


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run the tool and return the exit code, or raise GrpoActorsError for `run_command` to print."""
    return _run(parser(prog).parse_args(arguments))


def chat_main(arguments: Sequence[str] | None, prog: str) -> int:
    """Run a chat and return the exit code."""
    options = chat_parser(prog).parse_args(arguments)
    if not sys.stdin.isatty():
        raise ConfigError("a chat needs a terminal; grpo generate takes a prompt from standard input")
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    check(options)
    # transformers would otherwise warn that PyTorch is absent, which is intended.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from grpo_actors.backend import submit_long_graphs  # noqa: PLC0415

    submit_long_graphs()
    bound_memory()
    if options.batch:
        batch(options)
    elif options.prompt is None and sys.stdin.isatty():
        chat(options)
    else:
        answer(options, read_prompt(options.prompt))
    return 0


if __name__ == "__main__":
    run_command(main)
