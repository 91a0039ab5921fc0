"""The command lines of ``grpo generate`` and ``grpo chat``: their arguments, and what these rule out. Imports nothing slow."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_actors.errors import ConfigError
from grpo_actors.generate.prompts import is_encodable

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
    except (ValueError, RecursionError):
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
    for name, rule, keeps in BOUNDS:
        value = getattr(options, name)
        if not keeps(value):
            raise ConfigError(f"--{name.replace('_', '-')} must be {rule}, got {value}")
    contradictions = (
        (options.batch and not options.output, "--batch needs --output, the file to write"),
        (options.output and not options.batch, "--output needs --batch, the file to read"),
        (options.batch and options.prompt is not None, "--batch has its own prompts; leave out PROMPT"),
        (options.batch and options.json, "--json is for one prompt; what --batch writes is JSON already"),
        (
            options.raw and options.system,
            "--raw continues the text as it is, without turns; leave out --system",
        ),
        (not is_encodable(options.system or ""), f"--system must be UTF-8, got {options.system!r}"),
        (
            options.samples > 1 and not (options.batch or options.json),
            "--samples of one prompt needs --json, or nobody could tell them apart",
        ),
    )
    for broken, rule in contradictions:
        if broken:
            raise ConfigError(rule)
