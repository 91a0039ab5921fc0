"""Check a run before anything starts, and report the first problem in one line.

The checks cover files, memory, ports and the user's rewards, and load no MLX. The learner makes the checks that need a loaded
model, and reports a problem in one line too.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from grpo_actors.config import Config
from grpo_actors.rundir.claim import check_resume, claimed, total_updates
from grpo_actors.rundir.folder import LOCK_FILE, locked
from grpo_actors.supervisor.fit import check_memory
from grpo_actors.supervisor.machine import Machine
from grpo_actors.tasks.own.replying import Replier
from grpo_actors.tasks.registry import load_task
from grpo_actors.tasks.scoring import open_scorer
from grpo_actors.trackers import check_installed
from grpo_actors.transport.access import check_curve
from grpo_actors.transport.keys import KeyFolder
from grpo_actors.transport.sockets import check_ports


def check(config: Config, machine: Machine) -> None:
    """Check that the run can start. Changes nothing, so ``--dry-run`` makes the same checks.

    Raises:
        GrpoActorsError: It cannot; one line that names the problem and the cure.
    """
    run_dir = Path(config.run.output_dir)
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
    check_inputs(config, machine)


def check_inputs(config: Config, machine: Machine) -> None:
    """Check what the run reads and where it computes: memory, data, rewards and environment.

    Raises:
        GrpoActorsError: as `check`.
    """
    check_memory(config, machine)
    if config.data.path or config.data.task != "gsm8k":  # gsm8k: only the learner asks the hub
        total_updates(config, len(load_task(config.data, seed=config.run.seed).problems("train")))
    open_scorer(config.reward.functions, config.reward).close()
    if config.data.environment:
        Replier(config.data.environment, timeout_s=config.reward.reward_timeout_s).close()


@contextlib.contextmanager
def prepared(config: Config, machine: Machine) -> Iterator[tuple[Path, int]]:
    """Check the run, lock its folder and write config.json; yield the folder and the lock's descriptor."""
    check(config, machine)
    with claimed(config) as claim:
        yield claim
