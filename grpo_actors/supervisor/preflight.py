"""Before anything starts: whatever can be known to be wrong with a run is said now, in one line.

Knows files, ports and the user's rewards; loads no MLX. What only a loaded model can tell is left to the
learner, which says it in one line too.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from grpo_actors.config import Config
from grpo_actors.policy.locate import locate
from grpo_actors.rundir.claim import check_resume, claimed, total_updates
from grpo_actors.rundir.folder import LOCK_FILE, locked
from grpo_actors.tasks.own.replying import Replier
from grpo_actors.tasks.registry import load_task
from grpo_actors.tasks.scoring import open_scorer
from grpo_actors.trackers import check_installed
from grpo_actors.transport.sockets import check_ports


def check(config: Config) -> None:
    """Refuse what cannot run; changes nothing, so that ``--dry-run`` asks the same questions.

    Raises:
        GrpoActorsError: one line that says what and the way out.
    """
    run_dir = Path(config.run.output_dir)
    if (run_dir / LOCK_FILE).exists():
        with locked(run_dir):
            pass
    check_resume(config, run_dir)
    if config.transport.scheme == "tcp" and config.transport.port:
        check_ports(config.transport.host, config.transport.port)
    check_installed(config.metrics.trackers)
    locate(config.model.model_name)
    if config.data.path or config.data.task != "gsm8k":  # the hub is asked once, by the learner
        total_updates(config, len(load_task(config.data, seed=config.run.seed).problems("train")))
    open_scorer(config.reward.functions, config.reward).close()
    if config.data.environment:
        Replier(config.data.environment, timeout_s=config.reward.reward_timeout_s).close()


@contextlib.contextmanager
def prepared(config: Config) -> Iterator[tuple[Path, int]]:
    """The checked run folder, locked, with config.json in it, and the lock's descriptor."""
    check(config)
    with claimed(config) as claim:
        yield claim
