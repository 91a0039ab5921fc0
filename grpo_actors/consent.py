"""Consent: what a process may run that its own user has not written into its command line or settings.

A worker gets its settings from whoever answers at the address, and a tool those of a run folder that may come from somebody
else. Such settings can name code: a reward or environment function, `code_tests`, which runs what the model writes, and
the Python files of a model's folder. None of it runs unless the command line has ``--allow`` with exactly its name. The
supervisor gives its own children the consent for what its user's settings name.
"""

import shlex
from collections.abc import Collection, Iterable, Sequence

from grpo_actors.config import Config, ModelConfig
from grpo_actors.errors import ConfigError
from grpo_actors.tasks.code_tests import CODE_TESTS
from grpo_actors.tasks.own.caller import is_of_caller
from grpo_actors.tasks.own.kinds import is_own

#: Stands for the Python files of the model's folder.
REMOTE_CODE = "trust_remote_code"


def code_of_model(model: ModelConfig) -> list[str]:
    """Return the names of the code that loading the model runs."""
    return [REMOTE_CODE] if model.trust_remote_code else []


def code_of(config: Config) -> list[str]:
    """Return the names of all code that sampling, scoring and evaluating with these settings run.

    Functions of the caller are not among them: nothing of them is here, and only their own program can serve them.
    """
    code = [name for name in _named_in(config) if not is_of_caller(name)]
    return [*code, *code_of_model(config.model)]


def functions_of_caller(config: Config) -> list[str]:
    """Return the names of the functions that live in the program that started the run, as ``caller:brevity``."""
    return [name for name in _named_in(config) if is_of_caller(name)]


def _named_in(config: Config) -> list[str]:
    rewards = [name for name in config.reward.functions if name == CODE_TESTS or is_own(name)]
    parts = [config.data, *(config.data.of(source) for source in config.all_sources)]
    named = dict.fromkeys(name for data in parts for name in (data.path, data.eval_path, data.environment))
    return [*rewards, *filter(is_own, named)]


def options_for(config: Config) -> list[str]:
    """Return the options that let a process run all code of these settings."""
    return as_options(code_of(config))


def as_options(code: Iterable[str]) -> list[str]:
    """Return the options that let a process run this code."""
    return [word for name in code for word in ("--allow", name)]


def check(code: Iterable[str], allowed: Collection[str], where: object) -> None:
    """Check that the command line allows all of this code.

    Args:
        code: Names of code.
        allowed: The names given with ``--allow``.
        where: Where the settings come from.

    Raises:
        ConfigError: It does not; one line with the options that are missing.
    """
    missing = [name for name in code if name not in allowed]
    if missing:
        cure = shlex.join(as_options(missing))
        raise ConfigError(
            f"{where}: its settings would run {', '.join(missing)} here; if you trust them, add {cure}"
        )


def named_by_user(code: Iterable[str], overrides: Sequence[str]) -> list[str]:
    """Return the names that the user wrote into ``--set``: that is consent, too."""
    return [name for name in code if any(name in override for override in overrides)]
