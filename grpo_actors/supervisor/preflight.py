"""Check a run before anything starts, and report the first problem in one line.

The checks cover files, memory, ports and the user's rewards, and load no MLX. The learner makes the checks that need a loaded
model, and reports a problem in one line too.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from grpo_actors.config import Config
from grpo_actors.errors import RunError, os_errors_in_one_line
from grpo_actors.rundir.claim import check_resume, claimed, total_updates, with_rewards
from grpo_actors.rundir.data import check_data
from grpo_actors.rundir.folder import LOCK_FILE, locked
from grpo_actors.supervisor.allocation import Allocation
from grpo_actors.supervisor.fit import check_memory
from grpo_actors.tasks.own.replying import Replier
from grpo_actors.tasks.registry import open_task
from grpo_actors.tasks.scoring import open_scorer
from grpo_actors.trackers import check_installed
from grpo_actors.transport.access import check_curve
from grpo_actors.transport.keys import KeyFolder
from grpo_actors.transport.sockets import check_ports


@os_errors_in_one_line()
def check(config: Config, allocation: Allocation) -> list[str]:
    """Check that the run can start; return what the user should know of the data, a line each.

    Changes nothing, so ``--dry-run`` makes the same checks.

    Raises:
        GrpoActorsError: It cannot; one line that names the problem and the cure.
    """
    run_dir = Path(config.run.output_dir)
    _check_folder(run_dir)
    if (run_dir / LOCK_FILE).exists():
        with locked(run_dir):
            pass
    check_resume(config, run_dir)
    if config.transport.scheme == "tcp" and config.transport.port:
        check_ports(config.transport.host, config.transport.port)
    if config.transport.uses_keys:
        check_curve()
        KeyFolder(Path(config.transport.keys_dir)).check()
    check_installed(config.metrics.trackers)
    return check_inputs(config, allocation, run_dir)


@os_errors_in_one_line()
def check_inputs(config: Config, allocation: Allocation, run_dir: Path | None = None) -> list[str]:
    """Check the memory of the run and what it reads: data, rewards and environment. Returns as `check`.

    Args:
        config: The settings.
        allocation: What its processes get of the machine.
        run_dir: The run folder, whose data must be the same; None: none is looked at.

    Raises:
        GrpoActorsError: as `check`.
    """
    check_memory(allocation)
    notes: list[str] = []
    with ExitStack() as stack:
        scorer = stack.enter_context(open_scorer(config))
        environments = {
            name: stack.enter_context(Replier(name, timeout_s=config.reward.reward_timeout_s))
            for name in dict.fromkeys(config.environments.values())
        }
        # gsm8k comes from the hub: only the learner asks it, unless a function needs to know its columns.
        needs_columns = scorer.needs() or any(each.needs() for each in environments.values())
        if not asks_hub(config) or needs_columns:
            task = open_task(config)
            total_updates(with_rewards(config, task), len(task.problems("train")))
            if run_dir is not None:
                check_data(run_dir, task)
            scorer.check_columns(task)
            for name, environment in environments.items():
                environment.check_columns(
                    task, {source for source, own in config.environments.items() if own == name}
                )
            notes += [task.describe_splits(), *task.notes]
    return notes


def _check_folder(run_dir: Path) -> None:
    """Check that the run folder is one, or can be made."""
    found = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    if not found.is_dir() or not os.access(found, os.W_OK | os.X_OK):
        reason = os.strerror(errno.EACCES if found.is_dir() else errno.ENOTDIR)
        raise RunError(f"run.output_dir: {run_dir} cannot be written ({reason}); choose another folder")


def asks_hub(config: Config) -> bool:
    """Return whether GSM8K is read from the hub."""
    parts = [config.data.of(source) for source in config.all_sources]
    return any(data.task == "gsm8k" and not data.path for data in parts or [config.data])


@contextlib.contextmanager
def prepared(config: Config, allocation: Allocation) -> Iterator[tuple[Path, int]]:
    """Check the run, lock its folder and write config.json; yield the folder and the lock's descriptor."""
    check(config, allocation)
    with claimed(config) as claim:
        yield claim
