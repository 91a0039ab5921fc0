"""Write TensorBoard event files to ``RUN_DIR/trackers/tensorboard``, by its own package, without TensorFlow or torch.

A resumed run has two event files: the second begins with a marker that makes the reader drop the first one's steps
from there on.
"""

from collections.abc import Iterable, Mapping

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from grpo_actors.observe.records import Record
from grpo_actors.trackers import TrackedRun
from grpo_actors.trackers.values import markdown


class TensorBoard:
    """The `Tracker` for TensorBoard."""

    def __init__(self, tracked: TrackedRun) -> None:
        """Open a new event file; a new run replaces a former one in the folder."""
        if tracked.sent_update is None:
            for former in tracked.folder.glob("events.out.tfevents.*"):
                former.unlink()
        self._writer = EventFileWriter(str(tracked.folder))
        if tracked.sent_update is None:
            settings = hparams_pb(
                dict(tracked.hyperparameters), trial_id=tracked.run_id, start_time_secs=tracked.started
            )
            self._add(0, tracked.started, settings.value)
        else:
            self.discard_after(tracked.sent_update)

    def discard_after(self, update: int) -> bool:
        """Mark a restart at the step after `update`; a reader drops what it has from there on."""
        self._writer.add_event(Event(step=update + 1, session_log=SessionLog(status=SessionLog.START)))
        return True

    def log(self, update: int, time: float, values: Mapping[str, float]) -> None:
        """Add one point to each curve."""
        self._add(
            update, time, (Summary.Value(tag=name, simple_value=value) for name, value in values.items())
        )

    def log_sample(self, update: int, time: float, sample: Record) -> None:
        """Add a text."""
        self._add(update, time, text_pb("samples", markdown(sample)).value)

    def flush(self) -> None:
        """Write the file."""
        self._writer.flush()

    def close(self) -> None:
        """Write and close the file."""
        self._writer.close()

    def _add(self, step: int, time: float, values: Iterable[Summary.Value]) -> None:
        self._writer.add_event(Event(step=step, wall_time=time, summary=Summary(value=values)))
