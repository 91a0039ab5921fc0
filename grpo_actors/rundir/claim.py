"""Claim a run folder: check that these settings may continue its run, lock it, write its config.json."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from grpo_actors.atomic import draft_of, write_whole
from grpo_actors.config import Config, read_config, resume_conflicts
from grpo_actors.errors import ConfigError, RunError
from grpo_actors.rundir.checkpoints import Checkpoint, best, find_checkpoints, read_state
from grpo_actors.rundir.folder import (
    BASE_EVALUATION_FILE,
    BEST,
    CONFIG_FILE,
    DATA_FILE,
    ENDPOINTS_FILE,
    WORKERS_FILE,
    locked,
)
from grpo_actors.score import ACCURACY, REWARD
from grpo_actors.tasks.registry import chosen_rewards
from grpo_actors.tasks.scoring import default_metric
from grpo_actors.tasks.task import Task

#: Rewards that do not apply to a problem without a true answer.
_COMPARES = ("correctness", "math_verify")


@contextlib.contextmanager
def claimed(config: Config) -> Iterator[tuple[Path, int]]:
    """Lock the run folder and write its config.json; yield the folder and the lock's descriptor."""
    run_dir = Path(config.run.output_dir)
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(locked(run_dir))
            _clear(run_dir)
            write_whole(run_dir / CONFIG_FILE, config.model_dump_json(indent=2) + "\n")
        except OSError as error:
            raise RunError(
                f"run.output_dir: {run_dir} cannot be written ({error.strerror}); choose another folder"
            ) from error
        yield run_dir, lock


def _clear(run_dir: Path) -> None:
    """Remove the endpoints and drafts that a killed run left. Without a checkpoint to continue from, remove old results too.

    Such results (base evaluation, best mark, data, worker decisions) belong to an earlier run, perhaps of another model.
    """
    (run_dir / ENDPOINTS_FILE).unlink(missing_ok=True)
    for name in (CONFIG_FILE, ENDPOINTS_FILE, BASE_EVALUATION_FILE, BEST, DATA_FILE, WORKERS_FILE):
        draft_of(run_dir / name).unlink(missing_ok=True)
    if not find_checkpoints(run_dir):
        for name in (BASE_EVALUATION_FILE, BEST, DATA_FILE, WORKERS_FILE):
            (run_dir / name).unlink(missing_ok=True)


def with_rewards(config: Config, task: Task) -> Config:
    """Return the settings, with the task's default rewards and the default metric where they name none.

    Raises:
        ConfigError: The metric is no reward of the task, or a reward needs true answers, and the data has none.
    """
    rewards = chosen_rewards(config.reward.functions, task)
    metric = config.evaluator.metric or default_metric(rewards, task)
    if metric not in (known := (ACCURACY, REWARD, *rewards)):
        raise ConfigError(f"evaluator.metric: must be one of {', '.join(known)}, got {metric}")
    for source, problems in task.train_sources().items():
        scored_by = config.rewards_of_sources.get(source, rewards)
        for name in _COMPARES:
            if rewards.get(name) and name in scored_by and not any(problem.answer for problem in problems):
                raise ConfigError(
                    f"reward.functions: {name} compares with true answers, and {source or 'the data'} has none; set "
                    "answer_column to their column, or choose other rewards"
                )
    return config.model_copy(
        update={
            "reward": config.reward.model_copy(update={"functions": rewards}),
            "evaluator": config.evaluator.model_copy(update={"metric": metric}),
        }
    )


def total_updates(config: Config, problems: int) -> int:
    """Return the number of updates of the whole run: max_updates, or what the epochs give."""
    if config.learner.max_updates:
        return config.learner.max_updates
    updates = config.learner.num_epochs * problems // config.groups_per_update
    if updates == 0:
        raise ConfigError(
            f"learner.num_epochs: {config.learner.num_epochs} × {problems} problems are fewer than the "
            f"{config.groups_per_update} of one update; set learner.max_updates or a smaller learner.batch_size"
        )
    return updates


def check_resume(config: Config, run_dir: Path, *, recording: str = "") -> None:
    """Check that the settings may continue the run in this folder, and that run.resume permits it.

    Args:
        config: The settings.
        run_dir: The folder.
        recording: Path of the recording that is replayed; empty if workers sample.

    Raises:
        RunError: They may not, or a file of the folder is unusable; the text says why.
    """
    checkpoints = find_checkpoints(run_dir)
    if not checkpoints:
        if config.run.resume == "must":
            raise RunError(
                f"run.resume: {run_dir} holds no checkpoint to continue from; start without --resume"
            )
        return
    if config.run.resume == "never":
        raise RunError(
            f"run.resume is never, but {run_dir} holds {checkpoints[-1].path.name}; "
            "choose another run.output_dir, or remove that folder"
        )
    best(run_dir)  # raises: the learner would stop there
    replayed = _recording_of(checkpoints)
    if replayed not in (None, recording):
        was, wanted = (f"a replay of {path}" if path else "a live run" for path in (replayed, recording))
        raise RunError(f"run.output_dir: {run_dir} holds {was}, got {wanted}; choose another folder")
    if not (run_dir / CONFIG_FILE).is_file():
        return
    saved = read_config(run_dir / CONFIG_FILE)
    conflicts = [_difference(key, saved, config) for key in resume_conflicts(saved, config)]
    if conflicts:
        raise RunError(
            f"run.output_dir: {run_dir} holds a run with other settings: {', '.join(conflicts)}; "
            "set them as they were, or choose another run.output_dir"
        )


def _recording_of(checkpoints: Sequence[Checkpoint]) -> str | None:
    """Return the recording that the run of these checkpoints replays, "" for a live run; None if none is readable."""
    for checkpoint in reversed(checkpoints):
        with contextlib.suppress(RunError):  # damaged: the learner skips it too
            return read_state(checkpoint).recording
    return None


def _difference(key: str, saved: Config, wanted: Config) -> str:
    """Describe a changed setting: ``run.seed was 0, is 1``."""
    section, leaf = key.split(".")
    was, now = (json.dumps(config.model_dump(mode="json")[section][leaf]) for config in (saved, wanted))
    return f"{key} was {was}, is {now}"
