"""Send a run to a tracker: ``python -m grpo_actors.trackers RUN_DIR tensorboard|wandb|trackio``.

The supervisor starts one such process for each of ``metrics.trackers``; a user can start it for a run that has ended.
It is a separate process because a tracker's package may hang on a network, leak, or end its process. So a tracker
affects neither the learner, nor the supervisor, nor another tracker.

The process reads only ``metrics.jsonl``, which is complete. So nothing is lost, however late the process starts,
however slow the tracker is, and however often it dies. Its position is stored in ``trackers/NAME.json``. No socket.
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
    from grpo_actors.trackers.feed import Feed

#: Seconds between two reads of the file. Trackers' pages reload every half minute.
POLL_S = 0.5


def parser() -> argparse.ArgumentParser:
    """Build the command line; import nothing slow."""
    command = argparse.ArgumentParser(
        prog="python -m grpo_actors.trackers", description="Send a run, live or ended, to a tracker."
    )
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run's output folder")
    command.add_argument("tracker", metavar="TRACKER", help="the tracker's name, as in metrics.trackers")
    return command


def main(arguments: list[str] | None = None) -> int:
    """Run the process and return its exit code."""
    stop = enter_process()
    options = parser().parse_args(arguments)
    from grpo_actors.trackers import check_installed  # noqa: PLC0415
    from grpo_actors.trackers.feed import Feed  # noqa: PLC0415

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
    """Feed existing and new records to the tracker until the run has ended or `stop` is set.

    After `stop` is set, feed once more: by then the learner has ended and has written its last record.
    """
    while True:
        stopping = bool(stop)
        feed.catch_up()
        if feed.ended or stopping:
            return
        time.sleep(POLL_S)


def guarded() -> int:
    """Run `main`, and turn any failure of the tracker's package into one line; the supervisor restarts the process."""
    try:
        return main()
    except GrpoActorsError:
        raise
    except Exception as error:  # noqa: BLE001 - the outermost frame of a process that runs other people's packages
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    run_command(guarded)
