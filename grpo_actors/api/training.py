"""Start a training from Python."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_actors.api.arguments import Data, Rewards, Served, as_rows, is_place, refuse_twice, write_rows
from grpo_actors.api.run import Run
from grpo_actors.config import Config, load_config
from grpo_actors.errors import RunError

#: Argument of a call -> the setting that it stands for.
_ALIASES = {"model": "model_name", "data": "path", "eval_data": "eval_path", "rewards": "functions"}


def train(
    *,
    model: str | os.PathLike[str] | None = None,
    data: Data | None = None,
    rewards: Rewards | None = None,
    eval_data: Data | None = None,
    config: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Run:
    """Start a training and return it, once its settings, data and memory are checked; it then goes on by itself.

    It is the run of ``grpo train``: a supervisor, a learner, workers and an evaluator, each in a process of its own. If the
    run folder has an unfinished run, that continues.

    Args:
        model: A model folder, a hub id, or ``"tiny"``, which ships with the package (the default).
        data: The problems: a path or hub id, as the setting ``path``, or a list of dicts or a `datasets.Dataset`, which is
            kept in the run folder. The columns are ``question`` and ``answer`` unless ``prompt_column`` and ``answer_column``
            say otherwise. Without it, the setting ``task`` says what the problems are.
        rewards: Names as in the settings, functions, or each with its weight, as ``{f: 2.0, "soft_format": 0.5}``. A
            function is called as TRL calls it, with ``prompts``, ``completions`` and the columns of the data. It may be a
            closure, a lambda or a method: it runs in this process, in a thread of its own, one call at a time. Without it,
            the rewards of the task count.
        eval_data: Held-out problems, in the forms of `data`; without it a tenth of `data` is held out.
        config: Settings to begin with: a TOML file, the name of a shipped one such as ``"quickstart"``, or a run folder's
            config.json.
        **settings: Any setting by its name, such as ``max_updates=100`` or ``output_dir="outputs/mine"``. They win over
            `config`. ``environment`` may be a function, too.

    Raises:
        ConfigError: A setting is unknown or unusable.
        DataError: A row of `data` is unusable.
        RewardError: A function cannot be called as a reward.
        RunError: The run was refused. The text has its folder and the reason.

    Example:
        >>> def brevity(completions, **columns):
        ...     return [-len(text) / 100 for text in completions]
        >>> rows = [{"question": f"What is {n} + {n}?", "answer": 2 * n} for n in range(20)]
        >>> run = train(data=rows, rewards=[brevity], max_updates=2)    # doctest: +SKIP
        >>> run.wait().metrics()["reward_mean"]                         # doctest: +SKIP
    """
    _refuse_processes_of_runs()
    served = Served()
    resolved = _resolve(
        config, settings, served, model=model, data=data, rewards=rewards, eval_data=eval_data
    )
    run = Run(resolved, served.functions)
    try:
        run.begin()
    except KeyboardInterrupt:  # nobody else could stop it
        run.stop()
        raise
    return run


def _resolve(
    config: str | os.PathLike[str] | None,
    settings: Mapping[str, Any],
    served: Served,
    **arguments: Any,
) -> Config:
    """Return the settings; write data that is no place into the run folder, and print the notes on the settings."""
    given = {name: value for name, value in arguments.items() if value is not None}
    refuse_twice(given, settings, _ALIASES)
    rows = {
        name: as_rows(given[name], name)
        for name in ("data", "eval_data")
        if name in given and not is_place(given[name])
    }
    values = dict(settings)
    if callable(environment := values.get("environment")):
        values["environment"] = served.add(environment, "environment", "environment")
    if "rewards" in given:
        values["functions"] = served.weights_of(given["rewards"])
    if "data" in given:
        values.setdefault("task", "dataset")
    for name in ("model", "data", "eval_data"):
        if name in given:
            # The place of rows follows from other settings.
            values[_ALIASES[name]] = f"{name}.jsonl" if name in rows else given[name]
    texts = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in values.items()
    }
    loaded = load_config(None if config is None else Path(config), arguments=texts)
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    folder = Path(loaded.config.run.output_dir).absolute()  # a program may change its working folder
    places = {_ALIASES[name]: str(write_rows(data, folder, name)) for name, data in rows.items()}
    return loaded.config.model_copy(update={"data": loaded.config.data.model_copy(update=places)})


def _refuse_processes_of_runs() -> None:
    """Refuse to start a run in a process of a run, which imports the file of a reward: each would start the next one.

    Raises:
        RunError: This is one.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name.startswith("grpo_actors."):
        raise RunError(
            "train() was called while a run imports this file, for a reward or data that it names; put the call under "
            'if __name__ == "__main__", or give train() the function itself'
        )
