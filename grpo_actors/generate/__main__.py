"""Generate text with a model: ``grpo generate [PROMPT] --model MODEL``.

With a prompt, as an argument or on standard input, the answer is printed while it is sampled. In a terminal without a
prompt it starts a chat. With ``--batch IN --output OUT`` it answers a file of prompts, many at a time.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_actors.errors import ConfigError, DataError
from grpo_actors.process import bound_memory, run_command

if TYPE_CHECKING:
    from grpo_actors.generate.generator import Generator
    from grpo_actors.policy.decoding.sampling import SamplingParams
    from grpo_actors.policy.model import Policy

PROGRAM = "python -m grpo_actors.generate"
MODEL = 'a model folder, a checkpoint, an adapter, a run folder (its best checkpoint), a hub id, or "tiny"'
#: Options with bounds: name, rule, and a function that checks the value (every comparison with NaN is false).
BOUNDS: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("max_tokens", "≥ 1", lambda value: value >= 1),
    ("think_tokens", "≥ 0 (0: no bound)", lambda value: value >= 0),
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
#: Options that a batch's text depends on, besides its input and the model; the batch size is not one of them.
KEPT_WITH_A_BATCH = (
    *(
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
    ),
    "samples",
)


def parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """Build the command line; import nothing slow."""
    command = argparse.ArgumentParser(
        prog=prog,
        description="Answer one prompt, chat, or answer a file of prompts. Without PROMPT: a chat in a terminal; "
        "otherwise the prompt is read from standard input.",
    )
    command.add_argument("prompt", nargs="?", metavar="PROMPT", help="the prompt to answer")
    model = command.add_argument_group("the model")
    model.add_argument("--model", help=f"{MODEL}; default: the adapter's base, or tiny")
    _add_model(command, model)
    prompts = command.add_argument_group("a file of prompts")
    prompts.add_argument(
        "--batch", type=Path, metavar="IN", help="JSON Lines, or a text file with a prompt per line"
    )
    prompts.add_argument(
        "--output", type=Path, metavar="OUT", help="JSON Lines; an unfinished file is continued"
    )
    prompts.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="completions sampled at the same time (default: %(default)s)",
    )
    prompts.add_argument(
        "--samples",
        type=int,
        default=1,
        metavar="N",
        help="completions of each prompt (default: %(default)s)",
    )
    command.add_argument("--raw", action="store_true", help="no chat template: continue the text as it is")
    command.add_argument(
        "--json", action="store_true", help="for one prompt: print a JSON object per completion"
    )
    return command


def chat_parser(prog: str) -> argparse.ArgumentParser:
    """Build the command line of a chat, which has no options for prompts from elsewhere."""
    command = argparse.ArgumentParser(
        prog=prog, description="Chat with a model, or with the best checkpoint of a run."
    )
    command.add_argument(
        "model", nargs="?", metavar="MODEL", help=f"{MODEL} (default: the adapter's base, or tiny)"
    )
    _add_model(command, command)
    command.set_defaults(prompt=None, batch=None, output=None, batch_size=1, samples=1, raw=False, json=False)
    return command


def _add_model(command: argparse.ArgumentParser, model: Any) -> None:
    """Add what a chat, a prompt and a file of prompts have in common."""
    model.add_argument(
        "--adapter", metavar="DIR", help="an adapter to apply to the model, in mlx-lm's format"
    )
    prompts = command.add_argument_group("prompt and answer")
    system = prompts.add_mutually_exclusive_group()
    system.add_argument(
        "--system",
        metavar="TEXT",
        help="the system prompt (default: the one that the model was trained with)",
    )
    system.add_argument("--no-system", action="store_true", help="no system prompt")
    prompts.add_argument(
        "--chat-template-kwargs",
        type=_template_settings,
        metavar="JSON",
        help='variables of the chat template, such as {"enable_thinking": false} '
        "(default: those that the model was trained with, else the template's own)",
    )
    prompts.add_argument(
        "--think-tokens",
        type=int,
        default=0,
        metavar="N",
        help="tokens of thinking after which its closing tag is inserted; 0: no bound (default: %(default)s)",
    )
    prompts.add_argument(
        "--max-tokens",
        type=int,
        default=512,
        metavar="N",
        help="most tokens of an answer (default: %(default)s)",
    )
    prompts.add_argument(
        "--max-context",
        type=int,
        default=0,
        metavar="N",
        help="most tokens of prompt and answer together (default: the model's own limit)",
    )
    _add_sampling(command.add_argument_group("sampling"))


def _template_settings(text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return settings


def _add_sampling(group: Any) -> None:
    group.add_argument(
        "--temperature", type=float, default=0.7, metavar="T", help="0: greedy (default: %(default)s)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="only the likeliest tokens, up to this share of the probability together",
    )
    group.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens; 0: all"
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="only tokens with at least this share of the likeliest token's probability",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1: tokens already in prompt or answer become less likely",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="the same seed gives the same text (default: %(default)s)",
    )


def check(options: argparse.Namespace) -> None:
    """Check bounds and contradictions of the options.

    Raises:
        ConfigError: a value is out of bounds, or options contradict each other.
    """
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
        (not is_encodable(options.system or ""), f"--system must be UTF-8, got {options.system!r}"),
        (
            options.samples > 1 and not (options.batch or options.json),
            "--samples of one prompt needs --json, or nobody could tell them apart",
        ),
    )
    for broken, rule in contradictions:
        if broken:
            raise ConfigError(rule)


def resolve_model(options: argparse.Namespace) -> None:
    """Resolve the user's names of model and adapter to a folder or hub id, and what is not given to the run's own.

    That is the system prompt and the template's settings. In place; may be called twice.
    """
    from grpo_actors.rundir.naming import resolve  # noqa: PLC0415  MLX takes a second to import
    from grpo_actors.rundir.prompting import notice, prompting_of  # noqa: PLC0415

    if options.adapter is not None:
        options.adapter = resolve(options.adapter)
    elif options.model is None:
        options.model = "tiny"
    if options.model is not None:
        options.model = resolve(options.model)
    trained = prompting_of(str(options.adapter or options.model))
    if options.chat_template_kwargs is None:
        options.chat_template_kwargs = dict(trained.template_settings)
        if trained.template_settings:
            settings = json.dumps(options.chat_template_kwargs, ensure_ascii=False)
            print(f"note: with the chat template's settings of the training, {settings}", file=sys.stderr)
    if options.system is None:
        options.system = "" if options.raw or options.no_system else trained.system
        if options.system:
            print(notice(options.system), file=sys.stderr)


def params_of(options: argparse.Namespace) -> "SamplingParams":
    """Return the sampling parameters that the options name."""
    from grpo_actors.policy.decoding.sampling import SamplingParams  # noqa: PLC0415  MLX takes a second to import

    return SamplingParams(
        max_new_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        think_tokens=options.think_tokens,
    )


def open_model(options: argparse.Namespace) -> "Policy":
    """Load the model, which takes seconds, with the prompt that it was trained with.

    Raises:
        ModelError: the model cannot be loaded.
        ConfigError: the adapter does not fit the model.
    """
    from grpo_actors.policy.carried import NO_SYSTEM, carried_system, template_text  # noqa: PLC0415
    from grpo_actors.rundir.naming import open_policy  # noqa: PLC0415  MLX takes a second to import
    from grpo_actors.rundir.prompting import notice  # noqa: PLC0415

    resolve_model(options)
    policy = open_policy(options.model, options.adapter)
    policy.chat.settings = options.chat_template_kwargs
    if carried := carried_system(template_text(policy.tokenizer)):
        if options.no_system:
            policy.chat.settings = {**policy.chat.settings, NO_SYSTEM: True}
        elif not options.system and not options.raw:
            print(notice(carried), file=sys.stderr)
    return policy


def open_generator(options: argparse.Namespace) -> "Generator":
    """Load the model, as `open_model`, to sample as the options say."""
    return generator_of(open_model(options), options)


def generator_of(policy: "Policy", options: argparse.Namespace) -> "Generator":
    """Return what samples from a loaded model as the options say.

    Raises:
        ConfigError: the model has no tags between which thinking could be bounded.
    """
    from grpo_actors.generate.generator import Generator  # noqa: PLC0415
    from grpo_actors.policy.decoding.rows import require_bound  # noqa: PLC0415

    require_bound(policy, options.think_tokens, options.max_tokens, "--think-tokens")
    return Generator(policy, params_of(options), options.seed, options.max_context)


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
