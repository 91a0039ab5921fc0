"""Bring a run to a tracker: ``python -m grpo_actors.trackers RUN_DIR tensorboard|wandb|trackio``.

The supervisor starts one such process for each of ``metrics.trackers``; by hand it serves a run that has ended.
A process of its own, because a tracker's package may hang on a network, leak, or end its process: the learner and
the supervisor have nothing to do with it, and the trackers nothing with each other.

Reads ``metrics.jsonl`` only, which is complete, so that nothing is lost however late this process comes, however
slow the tracker is, or how often it dies. Where it stands is kept in ``trackers/NAME.json``. Knows no socket.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_actors.errors import GrpoActorsError, RunError
from grpo_actors.process import StopRequest, enter_process, is_supervised, run_command
from grpo_actors.rundir.folder import METRICS_FILE

if TYPE_CHECKING:
    from grpo_actors.observe.trackers.feed import Feed

#: Between two looks at the file. Pages are reloaded every half minute.
POLL_S = 0.5


def parser() -> argparse.ArgumentParser:
    """The command line; imports nothing that takes time."""
    command = argparse.ArgumentParser(
        prog="python -m grpo_actors.trackers", description="Bring a run, live or ended, to a tracker."
    )
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run's output folder")
    command.add_argument("tracker", metavar="TRACKER", help="its name, as in metrics.trackers")
    return command


def main(arguments: list[str] | None = None) -> int:
    """The process; returns its exit code."""
    stop = enter_process()
    options = parser().parse_args(arguments)
    from grpo_actors.observe.trackers import check_installed  # noqa: PLC0415
    from grpo_actors.observe.trackers.feed import Feed  # noqa: PLC0415

    if not is_supervised() and not (options.run_dir / METRICS_FILE).is_file():
        raise RunError(f"{options.run_dir} has no {METRICS_FILE}: give the output folder of a run")
    check_installed((options.tracker,))
    feed = Feed(options.run_dir, options.tracker)
    try:
        follow(feed, stop)
    finally:
        feed.close()
    return 0


def follow(feed: "Feed", stop: StopRequest) -> None:
    """Give the tracker what there is and what comes, until the run has ended or this process is asked to.

    Asked, it still gives what is in the file: the learner has ended by then, and has written its last record.
    """
    while True:
        asked = bool(stop)
        feed.catch_up()
        if feed.ended or asked:
            return
        time.sleep(POLL_S)


def _guarded() -> int:
    """`main`, where any failure of the tracker's package is one line; the supervisor starts the process again."""
    try:
        return main()
    except GrpoActorsError:
        raise
    except Exception as error:  # noqa: BLE001 - the outermost frame of a process that runs other people's packages
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    run_command(_guarded)
