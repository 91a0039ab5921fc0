"""Training on recorded groups: no worker, no socket, the same update, records and checkpoints as a live run.

    python -m grpo_actors.learner RUN_DIR --replay SOURCE [--config FILE] [--set KEY=VALUE]

SOURCE is the groups.jsonl of a run with metrics.record_groups, or its folder. Groups are taken in the file's
order, groups_per_update at a time: under the settings that they were recorded with, and where the learner
computes the same bits, losses and weights are those of the recorded run. Under another objective the data
stay what the recorded policy sampled: ratios are against that one, and grow as the two part.
"""

import contextlib
import json
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_actors.archive import Archive
from grpo_actors.checkpoints import Snapshot
from grpo_actors.config import Config, load_config
from grpo_actors.errors import ConfigError, DataError, RunError
from grpo_actors.grpo import Grpo
from grpo_actors.history import History, load_grpo
from grpo_actors.observe.sinks import Journal
from grpo_actors.observe.status import StatusLine
from grpo_actors.policy.model import Policy
from grpo_actors.policy.weights import freeze, pack
from grpo_actors.process import StopRequest
from grpo_actors.recording import RecordedGroup, Recording
from grpo_actors.rundir.claim import check_resume, claimed, with_rewards
from grpo_actors.rundir.folder import CONFIG_FILE
from grpo_actors.schedule.lease import Cursor
from grpo_actors.tasks.registry import load_task


def replay(
    run_dir: Path, source: Path, config_file: str | None, overrides: Sequence[str], stop: StopRequest
) -> int:
    """Train in the folder `run_dir` on the groups of `source`; returns the exit code.

    Args:
        run_dir: New, or the folder of this same replay, which then goes on.
        source: A groups.jsonl, or a run folder that has one.
        config_file: What ``--config`` names; None: the settings that lie beside the groups.
        overrides: ``key=value`` each.
        stop: Looked at after each update.

    Raises:
        GrpoActorsError: one line that says what cannot be.
    """
    with Recording(source) as recording:
        config = _settings(run_dir, recording.path, config_file, overrides)
        check_resume(config, run_dir, recording=str(recording.path))
        archive = Archive(run_dir, config, uuid.uuid4().hex[:12])
        with claimed(config):
            return Replay(run_dir, config, recording, archive, stop).run()


def _settings(run_dir: Path, recording: Path, config_file: str | None, overrides: Sequence[str]) -> Config:
    if run_dir.resolve() == recording.parent:
        raise RunError(f"{run_dir}: holds the recorded run itself; choose another folder for the replay")
    file = config_file or str(recording.with_name(CONFIG_FILE))
    if config_file is None and not Path(file).is_file():
        raise ConfigError(f"{file}: no such file; name the settings of the recorded run with --config FILE")
    first = ["run.resume=auto", "metrics.record_groups=false"]
    # There is no evaluator that would follow: a checkpoint is scored by hand.
    last = [f"run.output_dir={json.dumps(str(run_dir))}", "evaluator.eval_every_updates=0"]
    config = load_config(file, [*first, *overrides, *last]).config
    if config.reward.functions:
        return config
    return with_rewards(config, load_task(config.data, seed=config.run.seed))


@dataclass
class Replay:
    """One replay, from its claimed folder to its exit code."""

    run_dir: Path
    #: With `reward.functions` resolved.
    config: Config
    recording: Recording
    archive: Archive
    stop: StopRequest

    def run(self) -> int:
        """Train until updates or groups run out, or until asked to stop; 1 where an alarm ended it, else 0."""
        groups = self.config.groups_per_update
        first = self.recording.take(groups)
        if len(first) < groups:
            raise DataError(
                f"{self.recording.path}: must have the {groups} groups of one update, got {len(first)}"
            )
        total = self.config.learner.max_updates or first[0].planned_groups // groups
        if note := self.archive.completion(total):
            print(note, file=sys.stderr)
            return 0
        self.recording.rewind()
        self.recording.skip(self.archive.cursor.position)
        grpo = load_grpo(self.config, total)
        self.archive.restore(grpo)
        with contextlib.ExitStack() as stack:
            metrics = self.config.metrics
            journal = Journal(self.run_dir, seq=self.archive.records, log_jsonl=metrics.log_jsonl)
            records = ReplayRecords(
                stack.enter_context(journal),
                stack.enter_context(StatusLine(total, every_updates=metrics.logging_steps)),
                recording=str(self.recording.path),
                taken=self.archive.cursor.position,
            )
            history = History(self.run_dir, self.config, grpo, self.archive, records)
            stack.enter_context(contextlib.closing(history))
            return self._train(grpo, history, records)

    def _train(self, grpo: Grpo, history: History, records: "ReplayRecords") -> int:
        history.begin()
        records.tell_version(grpo)
        reason = "all updates done"
        while grpo.version < grpo.total_updates and history.ended_by is None:
            started_s = time.monotonic()
            groups = self._next_batch(grpo.policy)
            if self.stop or groups is None:
                why = "asked to stop" if self.stop else "the recording ends"
                reason = f"{why} after update {grpo.version}"
                break
            read_s = time.monotonic() - started_s
            told = grpo.update(groups)
            records.taken += len(groups)
            records.tell_version(grpo)
            update_s = time.monotonic() - started_s
            history.tell(groups, told, update_s=update_s, wait_s=read_s, rollout_tokens_per_s=None)
            history.save_if_due()
        history.save()
        return history.end(reason)

    def _next_batch(self, policy: Policy) -> list[RecordedGroup] | None:
        """The groups of the next update; None: the rest of the file is not enough for one."""
        groups = self.recording.take(self.config.groups_per_update)
        if len(groups) < self.config.groups_per_update:
            return None
        for group in groups:
            self._check(group, policy)
        return groups

    def _check(self, group: RecordedGroup, policy: Policy) -> None:
        """Refuse what would train nonsense in silence."""
        where = f"{self.recording.path}: lease {group.lease} ({group.problem.id})"
        vocabulary = policy.architecture.get("vocab_size", 2**31)
        tokens = [*group.prompt, *(token for c in group.completions for token in c.tokens)]
        if min(tokens) < 0 or max(tokens) >= vocabulary:
            raise DataError(
                f"{where}: token ids of {self.config.model.model_name} lie in 0 … {vocabulary - 1}, "
                f"got {min(tokens)} … {max(tokens)}; set the model that it was recorded with"
            )
        recorded = group.completions[0].rewards.keys()
        for name in self.config.reward.functions:
            if name not in recorded:
                raise DataError(
                    f"{where}: has no reward {name}, only {', '.join(recorded)}; set reward.functions to some of these"
                )


@dataclass
class ReplayRecords:
    """Where a replay's records go: to its journal and to the terminal."""

    journal: Journal
    status: StatusLine
    recording: str
    #: Groups that have trained.
    taken: int

    def record(self, topic: str, **fields: Any) -> None:
        """Number, keep and show one record."""
        self.status.show(self.journal.append(topic, fields))

    def snapshot(self) -> Snapshot:
        """What a checkpoint stores; all records so far are on the disk."""
        self.journal.sync()
        return Snapshot(Cursor(self.taken), self.journal.seq, self.recording)

    def tell_version(self, grpo: Grpo) -> None:
        """The weights' digest, to be compared with that of another run."""
        # Served to nobody: its pieces do not matter.
        manifest, _ = pack(freeze(grpo.version, grpo.policy.trainable()), chunk_bytes=1)
        self.record("policy", version=manifest.version, bytes=manifest.size, digest=manifest.digest)
