"""The training loop: take a batch, update, publish, record, save a checkpoint if one is due.

Live runs and replays share this loop; they differ in their `Source`. The update itself is in `grpo`.
"""

import time
from dataclasses import dataclass

from grpo_actors.failpoints import reach
from grpo_actors.learner.grpo import Grpo
from grpo_actors.learner.history import History
from grpo_actors.learner.source import Source
from grpo_actors.policy.device import return_unused_memory
from grpo_actors.process import StopRequest
from grpo_actors.progress import LOADING_S, Pace, begin_work


@dataclass(frozen=True, slots=True)
class Run:
    """Everything the loop needs, opened: the start is recorded and the first version is published."""

    grpo: Grpo
    source: Source
    history: History
    stop: StopRequest


def train(run: Run) -> int:
    """Train until all updates are done, the groups end, a stop is requested or an alarm ends the run.

    Return the exit code of the process: 1 after an alarm, else 0.
    """
    grpo, source, history = run.grpo, run.source, run.history
    reason, pace = "all updates done", Pace()
    history.archive.prepare(grpo)  # while the first batch is sampled
    while grpo.version < grpo.total_updates and history.ended_by is None:
        begin_work(f"update {grpo.version + 1}", pace.patience_s)
        started_s = time.monotonic()
        groups = source.next_batch()
        if groups is None:
            why = "asked to stop" if run.stop else "the recording ends"
            reason = f"{why} after update {grpo.version}"
            break
        wait_s = time.monotonic() - started_s
        reach("learner.batch")
        measured = grpo.update(groups)
        reach("learner.updated")
        source.publish(grpo, groups)
        reach("learner.published")
        return_unused_memory()
        update_s = time.monotonic() - started_s
        pace.add(update_s - wait_s)
        sampled_per_s = source.sampled_per_s(update_s)
        history.record_update(
            groups, measured, update_s=update_s, wait_s=wait_s, rollout_tokens_per_s=sampled_per_s
        )
        if alarm := source.alarm():
            history.note_alarm(alarm)
        begin_work(f"the checkpoint of update {grpo.version}", LOADING_S)
        history.save_if_due()
        source.take_evaluations()
    begin_work("the end of the run", LOADING_S)
    history.save_last()
    source.finish(history.ended_by)
    return history.end(reason)
