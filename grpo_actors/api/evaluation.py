"""Score a model on held-out problems: what ``grpo eval`` does."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from grpo_actors import consent
from grpo_actors.api.arguments import Data, Rewards, Served, as_rows, is_place, refuse_twice, write_rows
from grpo_actors.api.models import Model, ModelName, name_of
from grpo_actors.api.run import Run
from grpo_actors.config.load import ARGUMENT
from grpo_actors.config.names import leaves
from grpo_actors.config.wording import toml_value
from grpo_actors.tasks.own.caller import ADDRESS, CALLER
from grpo_actors.tasks.own.serving import Serving

if TYPE_CHECKING:
    from grpo_actors.evaluator.comparison.result import Result

#: Argument of a call -> the setting that it stands for.
_ALIASES = {
    "samples": "eval_subset_size",
    "temperature": "eval_temperature",
    "data": "eval_sources",
    "rewards": "functions",
}


def evaluate(
    model: Model | ModelName,
    *,
    samples: int | None = None,
    k: int | None = None,
    temperature: float | None = None,
    data: Data | None = None,
    rewards: Rewards | None = None,
    config: str | os.PathLike[str] | None = None,
    system: bool = True,
    allow: Sequence[str] = (),
    **settings: Any,
) -> "Result":
    """Score a model on held-out problems, in this process, with greedy answers and, if asked for, samples.

    Problems, rewards and prompt are those of the model's run, if it has one.

    Args:
        model: As for `load`; of a run, its best checkpoint. What `load` has returned is loaded again.
        samples: Number of problems; None: the setting ``eval_subset_size``, 0: all.
        k: Also draw this many samples of each problem, for ``sampled``: avg@k, maj@k and pass@k.
        temperature: Of these samples; None: the setting ``eval_temperature``.
        data: Other problems to score on, in the forms that `train` takes.
        rewards: Other rewards, in the forms that `train` takes. A run whose reward is a function of a program that has ended
            needs them.
        config: Settings to begin with, if the model has no run: as for `train`.
        system: Whether the system prompt of the training applies.
        allow: Code that may run because the settings of another user's run name it: names of rewards, ``trust_remote_code``.
        **settings: Settings by their names, such as ``task="arithmetic"`` or ``max_new_tokens=256``. ``environment`` may be a
            function, too.

    Returns:
        The figures: ``accuracy`` with ``value``, ``low`` and ``high`` (95 %), ``completions`` with the mean of each reward,
        lengths and truncation, ``sampled``, ``problems``.

    Raises:
        ConfigError: A setting is unknown or unusable, or given twice.
        GrpoActorsError: The model or the data is unusable, or a function cannot be called; one line says what.

    Example:
        >>> result = evaluate("tiny", task="arithmetic", samples=4, max_new_tokens=24)
        >>> result.problems
        4
    """
    from grpo_actors.evaluator.comparison.compare import Options, results_of  # noqa: PLC0415  it loads MLX
    from grpo_actors.rundir.naming import resolve  # noqa: PLC0415

    values = {name: value for name, value in leaves(settings, ARGUMENT)[0].items() if value is not None}
    arguments = {"samples": samples, "temperature": temperature, "data": data, "rewards": rewards}
    refuse_twice([name for name, value in arguments.items() if value is not None], values, _ALIASES)
    served = Served(_functions_of(model, with_rewards=rewards is None))
    if callable(environment := values.get("environment")):
        values["environment"] = served.add(environment, "environment", "environment")
    if rewards is not None:
        values["functions"] = served.weights_of(rewards)
    allowed = [*allow, *(consent.code_of(model.config) if isinstance(model, Run) else ())]
    with ExitStack() as stack:
        if data is not None:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="grpo-actors-data-")))
            place = (
                os.fspath(data) if is_place(data) else str(write_rows(as_rows(data, "data"), folder, "data"))
            )
            values["eval_sources"] = [{"name": "data", "task": "dataset", "path": place}]
        if served.functions:
            serving = stack.enter_context(Serving(served.functions))
            stack.enter_context(_environment({ADDRESS: serving.address}))
        [result] = results_of(
            Options(
                [resolve(model.name if isinstance(model, Model) else name_of(model))],
                config=None if config is None else os.fspath(config),
                overrides=[f"{name}={toml_value(value)}" for name, value in values.items()],
                samples=samples,
                k=k,
                temperature=temperature,
                no_system=not system,
                allow=allowed,
            )
        )
    return result


def _functions_of(model: Model | ModelName, *, with_rewards: bool) -> dict[str, Callable[..., Any]]:
    """Return the functions that a run calls; without its rewards, their names are free for others."""
    if not isinstance(model, Run):
        return {}
    rewards = () if with_rewards else model.config.reward.functions
    return {name: function for name, function in model.functions.items() if f"{CALLER}:{name}" not in rewards}


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment within the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
