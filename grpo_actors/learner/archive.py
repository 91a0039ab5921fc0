"""The checkpoints of a run and their scores, as the learner keeps them: written, announced, pruned.

A score arrives whenever the evaluator has it; a checkpoint is kept at least until then. Knows no socket:
what there is to tell goes to `Records`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from grpo_actors.config import Config
from grpo_actors.errors import RunError
from grpo_actors.learner.grpo import Grpo
from grpo_actors.rundir.checkpoint_weights import restore, write_checkpoint
from grpo_actors.rundir.checkpoints import (
    Checkpoint,
    Snapshot,
    best,
    mark_best,
    newest_sound,
    prune,
    read_state,
)
from grpo_actors.rundir.folder import BEST, CHECKPOINT, METRICS_FILE, checkpoint_folder, update_of
from grpo_actors.schedule.lease import START, Cursor
from grpo_actors.wire.messages import Evaluation

#: Ends the name of a checkpoint that did not verify and was put aside.
DAMAGED = ".damaged"


class Records(Protocol):
    """Where what happens is told: the exchange of a live run, or a replay's journal."""

    def record(self, topic: str, **fields: Any) -> None:
        """Number, keep and show one record."""

    def snapshot(self) -> Snapshot:
        """What a checkpoint stores; all records so far are on the disk."""


class Archive:
    """One run's checkpoints. Open it, `restore`, and then tell it of every update."""

    def __init__(self, run_dir: Path, config: Config, run_id: str) -> None:
        """Find the checkpoint to go on from.

        Args:
            run_dir: The run folder, locked by this process or its parent.
            config: The run's settings.
            run_id: Of a new run; a resumed one keeps its own.

        Raises:
            RunError: there are checkpoints, and not one is sound.
        """
        self._run_dir = run_dir
        self._config = config
        self.resumed, self._complaints = newest_sound(run_dir)
        if self.resumed is None and self._complaints:
            raise RunError(
                f"{self._complaints[0]}, and no other checkpoint is sound; put one back, "
                "or choose another run.output_dir to start anew"
            )
        self._state: dict[str, Any] = {} if self.resumed is None else read_state(self.resumed)
        self.run_id: str = self._state.get("run_id", run_id)
        #: Records that the resumed run has told; all after them are told again.
        self.records: int = self._state.get("records", 0)
        self._last_saved = -1 if self.resumed is None else self.resumed.update
        self._evaluated = {record["update"] for record in self.recorded("eval")}

    @property
    def update(self) -> int:
        """Updates that the resumed run has done; 0 for a new one."""
        return 0 if self.resumed is None else self.resumed.update

    def completion(self, total_updates: int) -> str | None:
        """The line that says that nothing is left to do: all updates done, all checkpoints that are kept scored."""
        everything = {record["update"] for record in self._records("eval")}
        if self.resumed is None or self.update < total_updates or self.unevaluated() - everything:
            return None
        return (
            f"{self._run_dir}: complete, all {total_updates} updates are done ({self.resumed.path.name}); "
            "raise learner.max_updates to train on, or choose another run.output_dir"
        )

    @property
    def cursor(self) -> Cursor:
        """Where in the order of problems to go on."""
        if not self._state:
            return START
        return Cursor(self._state["cursor"]["position"], tuple(self._state["cursor"]["set_aside"]))

    @property
    def success_rates(self) -> dict[str, float]:
        """What the curriculum knew."""
        return dict(self._state.get("success_rates", {}))

    def restore(self, grpo: Grpo) -> None:
        """Put the state of the checkpoint in place, if there is one."""
        if self.resumed is None:
            return
        reference = restore(self.resumed, grpo.policy, grpo.training)
        if reference is not None:
            grpo.restore_reference(reference)
        grpo.version = self.resumed.update
        grpo.skipped = self._state["skipped_steps"]

    def announce(self, records: Records) -> None:
        """Tell what was found: once, after the ``start`` record. Damaged checkpoints are put aside."""
        for complaint in self._complaints:
            records.record("alarm", name="checkpoint damaged", text=complaint)
        for path in self._run_dir.glob(f"{CHECKPOINT}*"):
            update = update_of(path)
            if update is not None and update > self.update:
                # Its score, too, belongs to weights that this run no longer comes from.
                path.rename(path.with_name(f"{path.name}{DAMAGED}"))
        marked = best(self._run_dir)
        if marked is not None and not (self._run_dir / marked["checkpoint"]).is_dir():
            self._mark_best_of_kept()
        if self.resumed is not None:  # its record came after the state that it holds, and was cut
            self._announce(records, self.resumed)

    # --- during -----------------------------------------------------------------------------------

    def is_due(self, update: int) -> bool:
        """Whether to save: at every multiple of save_steps, and where an evaluation is due, which scores checkpoints."""
        periods = (self._config.run.save_steps, self._config.evaluator.eval_every_updates)
        return any(period and update % period == 0 for period in periods)

    def save(self, records: Records, grpo: Grpo) -> None:
        """Write a checkpoint of the newest version, unless there is one; update 0 is the base model."""
        if grpo.version in (0, self._last_saved):
            return
        state = {"run_id": self.run_id, **asdict(records.snapshot()), "skipped_steps": grpo.skipped}
        checkpoint = write_checkpoint(
            self._run_dir,
            grpo.version,
            grpo.policy,
            grpo.training,
            state,
            reference=grpo.reference if grpo.reference_moved else None,
        )
        self._last_saved = checkpoint.update
        self._announce(records, checkpoint)
        self._prune()

    def unevaluated(self) -> set[int]:
        """Updates whose checkpoint the evaluator has not scored yet."""
        if not self._config.evaluator.eval_every_updates:
            return set()
        updates = map(update_of, self._run_dir.glob(f"{CHECKPOINT}*"))
        return {update for update in updates if update is not None} - self._evaluated

    def take_evaluations(self, records: Records, arrived: Sequence[Evaluation]) -> None:
        """Record the scores that have come in."""
        fresh = [e for e in arrived if e.update not in self._evaluated]
        for evaluation in fresh:
            self._evaluated.add(evaluation.update)
            self._record(records, evaluation)
        if fresh:
            self._prune()  # what waited for its score only

    def _prune(self) -> None:
        prune(self._run_dir, self._config.run.keep_checkpoints, frozenset(self.unevaluated()))

    def _record(self, records: Records, evaluation: Evaluation) -> None:
        score = evaluation.accuracy if evaluation.sampled_accuracy is None else evaluation.sampled_accuracy
        marked = best(self._run_dir)
        # Again the best: a resumed run is told once more what came after its checkpoint.
        is_best = marked is None or score > marked["accuracy"] or evaluation.update == marked["update"]
        if is_best and evaluation.update:
            mark_best(self._run_dir, evaluation.update, score)
        records.record("eval", **evaluation.model_dump(exclude={"kind"}), best=is_best)

    def _announce(self, records: Records, checkpoint: Checkpoint) -> None:
        records.record(
            "checkpoint", update=checkpoint.update, path=str(checkpoint.path), bytes=checkpoint.bytes
        )

    # --- what was before --------------------------------------------------------------------------

    def recorded(self, topic: str) -> list[dict[str, Any]]:
        """The records of a topic up to the checkpoint; later ones are cut with all that came after it, and told again."""
        return [record for record in self._records(topic) if record["seq"] <= self.records]

    def _records(self, topic: str) -> list[dict[str, Any]]:
        """All of a topic that the run has told so far."""
        metrics = self._run_dir / METRICS_FILE
        if not metrics.is_file():
            return []
        # The last line of a killed run may be torn.
        lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [record for record in map(json.loads, lines) if record["topic"] == topic]

    def _mark_best_of_kept(self) -> None:
        """The best checkpoint was put aside: mark the best of those evaluated before that are still there."""
        (self._run_dir / BEST).unlink()
        for record in self.recorded("eval"):
            score = record["accuracy"] if record["sampled_accuracy"] is None else record["sampled_accuracy"]
            marked = best(self._run_dir)
            there = checkpoint_folder(self._run_dir, record["update"]).is_dir()
            if record["update"] and there and (marked is None or score > marked["accuracy"]):
                mark_best(self._run_dir, record["update"], score)
