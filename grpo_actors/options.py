"""Options that several commands have, each with one wording. Imports nothing heavy."""

import argparse
from typing import Any

#: Name of the namespace's list of ``--set``.
OVERRIDES = "overrides"


def add_config(exclusive: Any, default: str) -> None:
    """Add CONFIG, and ``--config`` as another way to write it, to an exclusive group of a command line."""
    help_text = (
        "TOML settings: a path, or the name of a shipped or local file in configs/, such as quickstart; "
        f"or a run folder's config.json (default: {default})"
    )
    exclusive.add_argument("config", nargs="?", metavar="CONFIG", help=help_text)
    exclusive.add_argument("--config", dest="config_option", metavar="CONFIG", help="the same, as an option")


def add_overrides(parser: Any, condition: str = "") -> None:
    """Add ``--set``; `condition` comes before its help text."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest=OVERRIDES,
        metavar="KEY=VALUE",
        help=f"{condition}override a setting, as rollout.num_generations=16 or num_generations=16; repeatable",
    )


def add_allow(parser: argparse.ArgumentParser) -> None:
    """Add ``--allow``, by which a user lets code run that settings name (`consent`)."""
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="NAME",
        help="run this code, which the run's settings name: a reward or environment (file.py:function, "
        "module:function), code_tests, or trust_remote_code; repeatable",
    )
