"""The archive of a run: writes its checkpoints, records them and their scores, and removes old ones.

A checkpoint is written in the background, one at a time. Its record, the removal of older ones and its score come when
it is durable. It stores the state of the moment when it was started, so a resumed run writes all of these again.
The score of a checkpoint arrives some updates after it was written; the checkpoint is kept at least until then.
Has no socket: its records go to `Records`.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from grpo_actors.atomic import write_whole
from grpo_actors.config import Config, read_config
from grpo_actors.errors import RunError
from grpo_actors.learner.checkpointing import CheckpointWriter, Written
from grpo_actors.learner.grpo import Grpo
from grpo_actors.observe.records import Record
from grpo_actors.observe.sinks import read_records
from grpo_actors.observe.view import number
from grpo_actors.rundir.checkpoint_weights import FrozenCheckpoint, companions, freeze_checkpoint, restore
from grpo_actors.rundir.checkpoints import (
    Checkpoint,
    Snapshot,
    State,
    best,
    mark_best,
    newest_sound,
    put_aside,
    read_state,
    remove_unfinished,
)
from grpo_actors.rundir.folder import (
    BEST,
    CHECKPOINT,
    CONFIG_FILE,
    METRICS_FILE,
    checkpoint_folder,
    update_of,
)
from grpo_actors.schedule.lease import START, Cursor
from grpo_actors.score import Score, best_of
from grpo_actors.wire.messages import Evaluation, Unscored

#: Settings that say where a run is and how it is started.
_NOT_OF_TRAINING = frozenset({"run.output_dir", "run.resume"})


class Records(Protocol):
    """Where a run's records go: the exchange of a live run, or the journal of a replay."""

    def record(self, topic: str, **fields: Any) -> None:
        """Number one record, keep it and show it."""

    def snapshot(self) -> Snapshot:
        """Return the state that a checkpoint stores; by then all records so far are on the disk."""


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A checkpoint that is being written."""

    update: int
    written: Future[Written]
    #: Seconds that training stood still for it.
    wait_s: float


class Archive:
    """The checkpoints of one run.

    Call `restore`, `announce` and `prepare` once at the start, `save` when a checkpoint is due, `collect` often, `close` last.
    """

    def __init__(self, run_dir: Path, config: Config, run_id: str) -> None:
        """Find the newest sound checkpoint, to continue from it.

        Args:
            run_dir: The run folder, locked by this process or its parent.
            config: The run's settings.
            run_id: The id for a new run; a resumed run keeps its own.

        Raises:
            RunError: there are checkpoints, but none is sound.
        """
        self._run_dir = run_dir
        self._config = config
        self._writer = CheckpointWriter(run_dir)
        self._under_way: _UnderWay | None = None
        self.resumed, self._damage = newest_sound(run_dir)
        if self.resumed is None and self._damage:
            raise RunError(
                f"{self._damage[0]}, and no other checkpoint is sound; put one back, "
                "or choose another run.output_dir to start a new run"
            )
        self._state: State | None = None if self.resumed is None else read_state(self.resumed)
        self.run_id = run_id if self._state is None else self._state.run_id
        #: Records up to the checkpoint that the run resumes from; later ones are cut and written again.
        self.records = 0 if self._state is None else self._state.records
        self._last_saved = -1 if self.resumed is None else self.resumed.update
        #: Updates with a score, or of which the evaluator sends none.
        self._evaluated: set[int] = set()
        #: The scores by update. All were measured like the newest, so that they may be compared.
        self._scores: dict[int, Score] = {}
        for update, score in self._read_scores(self.recorded("eval")):
            self._add(update, score)

    @property
    def update(self) -> int:
        """Updates of the checkpoint that the run resumes from; 0 for a new run."""
        return 0 if self.resumed is None else self.resumed.update

    def note_if_complete(self, total_updates: int) -> str | None:
        """Return a line for the user if nothing is left to do: all updates done, all kept checkpoints scored."""
        everything = {update for update, _ in self._read_scores(self._records("eval"))}
        if self.resumed is None or self.update < total_updates or self.unevaluated() - everything:
            return None
        changed = self._changed_settings()
        without_effect = f"; {', '.join(changed)}: changed, without effect" if changed else ""
        return (
            f"{self._run_dir}: complete, all {total_updates} updates are done ({self.resumed.path.name})"
            f"{without_effect}; raise learner.max_updates to train on, or choose another run.output_dir"
        )

    def put_settings_back(self) -> None:
        """Write to config.json what the run was trained with, where this start changed it: a model card reads it there."""
        if changed := self._changed_settings():
            file = self._run_dir / CONFIG_FILE
            settings = read_config(file).model_dump(mode="json")
            for key, before in changed.items():
                section, leaf = key.split(".")
                settings[section][leaf] = before
            write_whole(file, json.dumps(settings, indent=2) + "\n")

    def _changed_settings(self) -> dict[str, Any]:
        """Return the settings that differ from the run's last start, by dotted key, with the values of then."""
        starts = self.recorded("start")
        before = starts[-1].get("config") if starts else None
        if not isinstance(before, dict):
            return {}
        return {
            key: before[section][leaf]
            for section, settings in self._config.model_dump(mode="json").items()
            for leaf, value in settings.items()
            if leaf in before.get(section, {}) and before[section][leaf] != value
            if (key := f"{section}.{leaf}") not in _NOT_OF_TRAINING
        }

    @property
    def cursor(self) -> Cursor:
        """The position in the order of problems to continue from."""
        return START if self._state is None else self._state.cursor

    @property
    def success_rates(self) -> dict[str, float]:
        """Success rates by problem id, from which the curriculum continues."""
        return {} if self._state is None else dict(self._state.success_rates)

    def restore(self, grpo: Grpo) -> None:
        """Load the state of the checkpoint into `grpo`, if there is one."""
        if self.resumed is None or self._state is None:
            return
        reference = restore(self.resumed, grpo.policy, grpo.training)
        if reference is not None:
            grpo.restore_reference(reference)
        grpo.version = self.resumed.update
        grpo.skipped = self._state.skipped_steps

    def announce(self, records: Records) -> None:
        """Record what was found, once, after the ``start`` record; put aside damaged checkpoints."""
        remove_unfinished(self._run_dir)
        for text in self._damage:
            records.record("alarm", name="checkpoint damaged", text=text)
        for path in sorted(self._run_dir.glob(f"{CHECKPOINT}*")):
            update = update_of(path)
            if update is not None and update > self.update:
                # The run does not continue from these weights, so their score no longer counts either.
                text = f"{path} is not used and was renamed to {put_aside(path).name}"
                records.record("log", level="warning", text=text)
        marked = best(self._run_dir)
        if marked is not None and not self._stands(marked.update):
            (self._run_dir / BEST).unlink()
            self._mark_best()
        if (
            self.resumed is not None
        ):  # its record was written after the snapshot that it stores, so it was cut
            self._announce(records, self.resumed)

    # --- during -----------------------------------------------------------------------------------

    def prepare(self, grpo: Grpo) -> None:
        """Do before the first update what the first checkpoint must not fail at or wait for.

        That is to read the files that it takes over from the model's folder, and to reserve memory, where it needs some.

        Raises:
            ModelError: A file of the model's folder cannot be read.
        """
        if not grpo.policy.has_adapter:
            companions(grpo.policy)
        if not self._writer.reserves_memory:
            return
        refreshes = bool(self._config.objective.reference_refresh_updates)
        self._writer.prepare(_freeze(grpo, {}, with_reference=refreshes or grpo.reference_refreshed))

    def is_due(self, update: int) -> bool:
        """Return whether to save after `update`."""
        return self._config.saves_after(update)

    def save(self, records: Records, grpo: Grpo) -> None:
        """Start to write a checkpoint of the newest version, unless it has one; version 0, the base model, gets none.

        Raises:
            RunError: The checkpoint before could not be written.
        """
        if grpo.version in (0, self._last_saved):
            return
        started_s = time.monotonic()
        self.collect(records, wait=True)
        state = {"run_id": self.run_id, **asdict(records.snapshot()), "skipped_steps": grpo.skipped}
        # Nothing here keeps what was frozen: on CUDA its arrays may be freed as soon as the writer has copied them.
        written = self._writer.start(_freeze(grpo, state, with_reference=grpo.reference_refreshed))
        self._last_saved = grpo.version
        self._under_way = _UnderWay(grpo.version, written, time.monotonic() - started_s)

    def collect(self, records: Records, *, wait: bool = False) -> None:
        """Record the checkpoint under way once it is durable, then remove old ones.

        Args:
            records: Where its record goes.
            wait: Whether to wait until it is durable.

        Raises:
            RunError: It could not be written.
        """
        under_way = self._under_way
        if under_way is None or not (wait or under_way.written.done()):
            return
        self._under_way = None
        written = under_way.written.result()
        self._announce(records, written.checkpoint, wait_s=under_way.wait_s, write_s=written.seconds)
        self._prune()

    def close(self) -> None:
        """Finish the checkpoint under way; may be called twice. Errors are printed: another one ends the run."""
        under_way, self._under_way = self._under_way, None
        errors = [self._writer.close(), None if under_way is None else under_way.written.exception()]
        for error in filter(None, errors):
            print(f"error: {error}", file=sys.stderr)

    def unevaluated(self) -> set[int]:
        """Return the updates whose checkpoint the evaluator has not scored yet."""
        if not self._config.evaluator.eval_every_updates:
            return set()
        updates = map(update_of, self._run_dir.glob(f"{CHECKPOINT}*"))
        return {update for update in updates if update is not None} - self._evaluated

    def take_evaluations(self, records: Records, arrived: Sequence[Evaluation | Unscored]) -> None:
        """Record the scores that have arrived; a score that is recorded already is dropped."""
        # A checkpoint that has a score is durable, or is about to be: its record comes first.
        scored = self._under_way is not None and self._under_way.update in {e.update for e in arrived}
        self.collect(records, wait=scored)
        fresh = [evaluation for evaluation in arrived if self._is_fresh(evaluation)]
        for evaluation in fresh:
            if isinstance(evaluation, Unscored):
                self._evaluated.add(evaluation.update)
                text = f"{evaluation.checkpoint} has no score: {evaluation.reason}"
                records.record("log", level="warning", text=text)
            else:
                self._record(records, evaluation)
        if fresh and self._under_way is None:  # else the next `collect` does
            self._prune()  # checkpoints that were kept only until their score came

    def _is_fresh(self, evaluation: Evaluation | Unscored) -> bool:
        """Return whether it is not recorded yet: an update has one score of each measure."""
        if evaluation.update not in self._evaluated:
            return True
        known = self._scores.get(evaluation.update)
        if known is None or isinstance(evaluation, Unscored):
            return False
        return known.measure != evaluation.report.score.measure

    def _prune(self) -> None:
        self._writer.prune(self._config.run.keep_checkpoints, frozenset(self.unevaluated()))

    def _record(self, records: Records, evaluation: Evaluation) -> None:
        score = evaluation.report.score
        # A resume may have cut the records of all earlier scores. The mark of the best is left.
        marked = None if self._scores else best(self._run_dir)
        changes = self._add(evaluation.update, score)
        if marked is not None:
            changes = marked.score.measure.changes(score.measure)
        if changes:
            text = (
                f"scores are measured differently from now on ({changes}): they cannot be compared with the earlier ones, "
                "so the base model and the checkpoints that are kept are scored again"
            )
            records.record("log", level="warning", text=text)
        is_best = self._mark_best() == evaluation.update
        where = {"update": evaluation.update, "checkpoint": evaluation.checkpoint}
        records.record("eval", **where, **evaluation.report.model_dump(), best=is_best)

    def _add(self, update: int, score: Score) -> str:
        """Add a score. If it was measured differently from those before, drop these; return what differs, else ""."""
        before = next(iter(self._scores.values()), score)
        changes = before.measure.changes(score.measure)
        if changes:
            self._scores.clear()
            self._evaluated.clear()  # what is kept is kept until it is scored again
        self._scores[update] = score
        self._evaluated.add(update)
        return changes

    def _mark_best(self) -> int | None:
        """Mark the best of the base model and the scored checkpoints that exist; return its update, None without scores."""
        marked, measure = (
            best(self._run_dir),
            next(iter(self._scores.values())).measure if self._scores else None,
        )
        scores = {update: score for update, score in self._scores.items() if self._stands(update)}
        # Its record may have been cut on a resume. Until its score comes again, the mark says what it was.
        if marked is not None and marked.score.measure == measure and self._stands(marked.update):
            scores.setdefault(marked.update, marked.score)
        update = best_of(scores)
        if update is not None and (
            marked is None or (marked.update, marked.score) != (update, scores[update])
        ):
            mark_best(self._run_dir, update, scores[update])
        return update

    def _stands(self, update: int) -> bool:
        """Return whether there is a checkpoint of this update, or it is the base model, which always is there."""
        return not update or checkpoint_folder(self._run_dir, update).is_dir()

    def _announce(self, records: Records, checkpoint: Checkpoint, **seconds: float) -> None:
        found = {"update": checkpoint.update, "path": str(checkpoint.path), "bytes": checkpoint.bytes}
        records.record("checkpoint", **found, **seconds)

    # --- earlier records --------------------------------------------------------------------------

    def recorded(self, topic: str) -> list[dict[str, Any]]:
        """Return the records of a topic up to the checkpoint; later ones are cut on a resume and written again."""
        return [record for record in self._records(topic) if record["seq"] <= self.records]

    def _records(self, topic: str) -> list[dict[str, Any]]:
        """Return all records of a topic that the file has."""
        return [record for record in read_records(self._run_dir / METRICS_FILE) if record["topic"] == topic]

    def _read_scores(self, evaluations: Iterable[Record]) -> Iterator[tuple[int, Score]]:
        """Yield the update and the score of ``eval`` records. Raises RunError for one that was changed by hand."""
        for record in evaluations:
            update = number(record, "update")
            try:
                score = Score.model_validate(record.get("score"))
            except ValidationError:
                score = None
            if update is None or score is None:
                raise RunError(
                    f"{self._run_dir / METRICS_FILE}: record {record['seq']} must have update and score; "
                    "move the file away to resume without it"
                )
            yield int(update), score


def _freeze(grpo: Grpo, state: Mapping[str, Any], *, with_reference: bool) -> FrozenCheckpoint:
    reference = grpo.reference if with_reference else None
    remote = grpo.ranks.remote_state()
    return freeze_checkpoint(
        grpo.version, grpo.policy, grpo.training, state, reference=reference, remote_state=remote
    )
