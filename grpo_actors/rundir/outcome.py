"""What a run has gained so far, the scores of its base model and of its best checkpoint, and how to continue it."""

from pathlib import Path

from grpo_actors.config import Config
from grpo_actors.consent import functions_of_caller
from grpo_actors.invocation import pasted
from grpo_actors.rundir.checkpoints import best, find_checkpoints
from grpo_actors.rundir.folder import BASE_EVALUATION_FILE, CONFIG_FILE, EVALUATION_FILE
from grpo_actors.rundir.scores import read_score
from grpo_actors.score import verdict
from grpo_actors.tasks.own.caller import bare_name


def gained(run_dir: Path) -> str:
    """Return a line on what the training gained: ``accuracy, …: 0.387 [0.33, 0.45] (base model) → 0.890 […] (best, …)``.

    Raises:
        RunError: a file of scores is unusable.
    """
    marked, kept = best(run_dir), find_checkpoints(run_dir)
    if marked is None:
        return "not evaluated"
    if not marked.update and not any((checkpoint.path / EVALUATION_FILE).is_file() for checkpoint in kept):
        return f"not evaluated but for the base model: {marked.score.measure} {marked.score}"
    if not marked.update:
        return f"{marked.score.measure}: no checkpoint beat the base model, {marked.score}"
    of_base, of_best = (
        read_score(file)
        for file in (run_dir / BASE_EVALUATION_FILE, run_dir / marked.checkpoint / EVALUATION_FILE)
    )
    alike = of_base is not None and of_base.report.score.measure == marked.score.measure
    known = str(of_base.report.score) if of_base is not None and alike else "?"
    return (
        f"{marked.score.measure}: {known} (base model) → {marked.score} (best, update {marked.update})"
        f"{'' if of_best is None else verdict(of_best.report.gain)}"
    )


def kept_checkpoint(run_dir: Path) -> str:
    """Return a line on the folder of the best checkpoint, else of the last one: ``best checkpoint: …``.

    Raises:
        RunError: best.json is unusable.
    """
    marked, kept = best(run_dir), find_checkpoints(run_dir)
    if marked is not None and marked.update:
        return f"best checkpoint: {run_dir / marked.checkpoint}"
    return f"last checkpoint: {kept[-1].path if kept else 'none'}"


def continuing(run_dir: Path, config: Config, *overrides: str) -> str:
    """Return the command that continues a run; the call in Python if functions of a program belong to it.

    Args:
        run_dir: The run folder.
        config: Its settings.
        overrides: Settings to change, as ``key=value``.
    """
    file = run_dir / CONFIG_FILE
    functions = functions_of_caller(config)
    if not functions:
        return pasted("train", file, *(word for override in overrides for word in ("--set", override)))
    rewards = ", ".join(
        f"{bare_name(name) if name in functions else repr(name)}: {weight:g}"
        for name, weight in config.reward.functions.items()
    )
    given = [f"config={str(file)!r}", f"rewards={{{rewards}}}" if rewards else ""]
    environment = config.data.environment
    given += [f"environment={bare_name(environment)}" if environment in functions else ""]
    given += [f"{key}={value!r}" for key, _, value in (override.partition("=") for override in overrides)]
    return f"in Python, train({', '.join(filter(None, given))})"
