"""The names of a run folder's files, and its lock. Imports nothing heavy: every part may ask for a name."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo_actors.errors import RunError

#: The resolved settings.
CONFIG_FILE = "config.json"
#: All records, one a line.
METRICS_FILE = "metrics.jsonl"
#: The texts of the sampled completions, under the numbers of their records.
COMPLETIONS_FILE = "completions.jsonl"
#: Every group that trained, with ``metrics.record_groups``.
GROUPS_FILE = "groups.jsonl"
#: The base model's score, kept over a resume.
BASE_EVALUATION_FILE = "evaluation-base.json"
#: Which checkpoint scored best.
BEST = "best.json"
#: With ``rollout.workers = "auto"``: their number, and the decisions that led to it.
WORKERS_FILE = "workers.json"
#: Addresses of the sockets while the run lives.
ENDPOINTS_FILE = "endpoints.json"
#: The position of each tracker, and what those that write files write.
TRACKERS_FOLDER = "trackers"
LOCK_FILE = "lock"

#: Starts the name of a checkpoint's folder; the number of its updates follows.
CHECKPOINT = "checkpoint-"
#: In a checkpoint: size and digest of every other file.
MANIFEST = "manifest.json"
#: In a checkpoint: where the run was.
STATE = "state.json"
#: In a checkpoint: its score, added by the evaluator.
EVALUATION_FILE = "evaluation.json"

#: Patterns of names: a folder with one of these is a run's, or a checkpoint, and no tool may replace it.
OF_A_RUN = (METRICS_FILE, BEST, MANIFEST, f"{CHECKPOINT}*")

#: Environment variable: descriptor of the run folder's lock, lent by the supervisor and held until both are gone.
LOCK = "GRPO_ACTORS_LOCK"


def checkpoint_folder(run_dir: Path, update: int) -> Path:
    """Return the path of a checkpoint's folder."""
    return run_dir / f"{CHECKPOINT}{update}"


def update_of(folder: Path) -> int | None:
    """Return the number of updates in a checkpoint's name; None for a draft and for any other name."""
    number = folder.name.removeprefix(CHECKPOINT)
    return int(number) if number != folder.name and number.isdigit() else None


@contextmanager
def locked(run_dir: Path) -> Iterator[int]:
    """Hold the run folder: a second ipc bind on one path would steal it silently.

    Yields the lock's descriptor. A process that inherits it holds the folder too, so a supervised
    learner, whose supervisor lent it, has nothing left to do.

    Raises:
        RunError: a live run holds it.
    """
    if LOCK in os.environ:
        yield int(os.environ[LOCK])
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"run.output_dir: {run_dir} is in use by a live run; stop it, or choose another folder"
            ) from None
        yield file.fileno()
