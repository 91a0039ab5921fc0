"""The reference of all commands, from the parsers that read their arguments."""

import argparse

from grpo_actors.__main__ import COMMANDS
from grpo_actors.invocation import SCRIPT


def markdown() -> str:
    """Return one section per command: what it does, how it is called, and each argument."""
    parts = []
    for name, command in COMMANDS.items():
        parser = command.get(command.parser)(f"{SCRIPT} {name}")
        assert isinstance(parser, argparse.ArgumentParser)
        parts.append(f"## {SCRIPT} {name}\n\n{_sentence(command.help)}\n")
        parts.append(_command(parser))
    return "\n".join(parts)


def _command(parser: argparse.ArgumentParser) -> str:
    usage = parser.format_usage().replace("\n" + " " * len("usage: "), "\n").removeprefix("usage: ").rstrip()
    parts = [f"```text\n{usage}\n```\n", f"```{{program}} {parser.prog}\n```\n"]
    for action in parser._actions:  # noqa: SLF001 - argparse has no public list of a parser's arguments
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            parts += [f"### {each.prog}\n\n{_command(each)}" for each in action.choices.values()]
        elif action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):  # noqa: SLF001
            parts.append(_argument(parser, action))
    return "\n".join(parts)


def _argument(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()  # noqa: SLF001
    values = formatter._format_args(action, action.dest.upper()) if action.nargs != 0 else ""  # noqa: SLF001
    # A choice is written {a,b}, but a comma divides the names of an option.
    values = values.replace(",", "|")
    names = [f"{name} {values}".strip() for name in action.option_strings] or [values]
    meaning = formatter._expand_help(action) if action.help else ""  # noqa: SLF001
    return f"```{{option}} {', '.join(names)}\n{_plain(_sentence(meaning))}\n```\n"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", ")")) else ".")


def _plain(text: str) -> str:
    """Escape what Markdown would read as markup."""
    return "".join(f"\\{sign}" if sign in "\\`*_<>[]" else sign for sign in text)
