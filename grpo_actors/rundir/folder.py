"""The names of a run folder's files, and its lock. Imports nothing heavy, so every process may use it."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo_actors.atomic import PRIVATE_FOLDER
from grpo_actors.errors import RunError

#: The resolved settings.
CONFIG_FILE = "config.json"
#: All records, one per line.
METRICS_FILE = "metrics.jsonl"
#: The texts of the sampled completions, with the numbers of their records.
COMPLETIONS_FILE = "completions.jsonl"
#: Every group that trained; only with ``metrics.record_groups``.
GROUPS_FILE = "groups.jsonl"
#: The base model's score; a resumed run keeps it.
BASE_EVALUATION_FILE = "evaluation-base.json"
#: Which checkpoint scored best, or that the base model did.
BEST = "best.json"
#: The number of training problems, and a digest of them.
DATA_FILE = "data.json"
#: Only with ``rollout.workers = "auto"``: the number of workers and the decisions that led to it.
WORKERS_FILE = "workers.json"
#: Addresses of the sockets; exists while the run lives.
ENDPOINTS_FILE = "endpoints.json"
#: Key of the run's own processes, for TCP sockets that ask for one; exists while the run lives.
RUN_KEY_FILE = "run.key"
#: The position of each tracker in the records, and the output of trackers that write files.
TRACKERS_FOLDER = "trackers"
#: The page of the run as one file: written at its end, or by ``grpo report``.
REPORT_FILE = "report.html"
LOCK_FILE = "lock"

#: Starts the name of a checkpoint folder; the number of updates follows.
CHECKPOINT = "checkpoint-"
#: Stands for a checkpoint of update 0, which is never written: the base model as the run has loaded it.
BASE = "base"
#: In a checkpoint: size and digest of every other file.
MANIFEST = "manifest.json"
#: In a checkpoint: where the run was.
STATE = "state.json"
#: In a checkpoint of a whole model: the first word of the names of its weights' files.
MODEL = "model"
#: In a checkpoint: the first words of the names of the files that only a resumed run reads.
OPTIMIZER = "optimizer"
REFERENCE = "reference"
#: In a checkpoint: its score, which the evaluator adds later. The manifest does not list it.
EVALUATION_FILE = "evaluation.json"

#: File name patterns: a folder with one of these is a run folder or a checkpoint, and no tool may replace it.
RUN_PATTERNS = (METRICS_FILE, BEST, MANIFEST, f"{CHECKPOINT}*")

#: Environment variable with the descriptor of the run folder's lock, which a supervised learner inherits from the
#: supervisor. The lock is held until both processes have ended.
LOCK = "GRPO_ACTORS_LOCK"
#: How often, and after how many seconds each time, the lock is tried: `is_locked` holds it for an instant.
LOCK_TRIES = 3
LOCK_PAUSE_S = 0.1


def checkpoint_name(update: int) -> str:
    """Return the name of a checkpoint, which is that of its folder; of the base model for update 0."""
    return f"{CHECKPOINT}{update}" if update else BASE


def checkpoint_folder(run_dir: Path, update: int) -> Path:
    """Return the path of a checkpoint's folder."""
    return run_dir / checkpoint_name(update)


def update_of(folder: Path) -> int | None:
    """Return the number of updates in a checkpoint's name; None for a draft and for any other name."""
    number = folder.name.removeprefix(CHECKPOINT)
    # Of "²", too, isdigit is true.
    return int(number) if number != folder.name and number.isascii() and number.isdigit() else None


def is_locked(run_dir: Path) -> bool:
    """Return whether a live run holds the folder's lock. To ask takes the lock for an instant, see `locked`."""
    try:
        with (run_dir / LOCK_FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def locked(run_dir: Path) -> Iterator[int]:
    """Lock the run folder and yield the lock's descriptor.

    Without the lock, a second run's ipc bind on the same path would silently steal the socket.
    A process that inherits the descriptor holds the lock too. A supervised learner inherits it from the supervisor, so
    nothing is left to do there.

    Raises:
        RunError: A live run holds the lock.
    """
    if LOCK in os.environ:
        yield int(os.environ[LOCK])
        return
    run_dir.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
    with (run_dir / LOCK_FILE).open("w") as file:
        for patience in reversed(range(LOCK_TRIES)):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not patience:
                    raise RunError(
                        f"run.output_dir: {run_dir} is in use by a live run; stop it, or choose another folder"
                    ) from None
                time.sleep(LOCK_PAUSE_S)
        yield file.fileno()
