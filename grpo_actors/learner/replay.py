"""Replay: training on recorded groups, without workers and sockets, with the same loop, records and checkpoints.

    python -m grpo_actors.learner RUN_DIR --replay SOURCE [--config FILE] [--set KEY=VALUE]

SOURCE is the groups.jsonl of a run with metrics.record_groups, or the folder of that run. Groups are read in the
order of the file, groups_per_update at a time. With the settings of the recorded run, and if the learner computes
the same bits, losses and weights are those of that run. With another objective the data stay as the recorded
policy sampled them: ratios are taken against that policy, and grow as the two policies diverge.
"""

import contextlib
import json
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_actors import consent
from grpo_actors.config import Config, load_config
from grpo_actors.errors import ConfigError, DataError, RunError
from grpo_actors.learner.archive import Archive
from grpo_actors.learner.groups import SampledGroup
from grpo_actors.learner.grpo import Grpo
from grpo_actors.learner.history import History
from grpo_actors.learner.loading import load_model
from grpo_actors.learner.loop import Run
from grpo_actors.learner.recording import RecordedGroup, Recording
from grpo_actors.observe.sinks import Journal
from grpo_actors.observe.status import StatusLine
from grpo_actors.policy.weights import freeze, pack
from grpo_actors.process import StopRequest
from grpo_actors.rundir.checkpoints import Snapshot
from grpo_actors.rundir.claim import check_resume, claimed, with_rewards
from grpo_actors.rundir.folder import CONFIG_FILE
from grpo_actors.schedule.lease import Cursor
from grpo_actors.tasks.registry import open_task


@contextlib.contextmanager
def open_replay(
    run_dir: Path,
    source: Path,
    config_file: str | None,
    overrides: Sequence[str],
    stop: StopRequest,
    *,
    allowed: Sequence[str] = (),
) -> Iterator[Run | None]:
    """Open a replay of the groups of `source` in the folder `run_dir`; yield None if nothing is left to do.

    Args:
        run_dir: A new folder, or the folder of this replay, which then continues.
        source: A groups.jsonl, or a run folder that contains one.
        config_file: The file given with ``--config``; None: the config.json next to the groups.
        overrides: Settings as ``key=value``.
        stop: Set by the first signal; checked after each update.
        allowed: Names of the code that the recorded run's settings may run (`consent`).

    Raises:
        GrpoActorsError: the replay cannot start; one line says why.
    """
    with ExitStack() as stack:
        recording = stack.enter_context(Recording(source))
        config = _settings(run_dir, recording.path, config_file, overrides, allowed)
        check_resume(config, run_dir, recording=str(recording.path))
        archive = Archive(run_dir, config, uuid.uuid4().hex[:12])
        stack.enter_context(claimed(config))
        total = _total_updates(config, recording)
        if note := archive.note_if_complete(total):
            print(note, file=sys.stderr)
            archive.put_settings_back()
            yield None
            return
        recording.skip(archive.cursor.position)
        grpo = Grpo(config, load_model(config), total)
        archive.restore(grpo)
        metrics = config.metrics
        replayed = ReplaySource(
            config,
            recording,
            stack.enter_context(Journal(run_dir, seq=archive.records, log_jsonl=metrics.log_jsonl)),
            stack.enter_context(StatusLine(total, every_updates=metrics.logging_steps)),
            stop,
            readable=grpo.policy.readable,
            vocabulary=grpo.policy.vocabulary,
            taken=archive.cursor.position,
        )
        history = stack.enter_context(
            contextlib.closing(History(run_dir, config, grpo, archive, records=replayed))
        )
        history.begin()
        replayed.publish(grpo, [])
        yield Run(grpo, replayed, history, stop)


def _settings(
    run_dir: Path,
    recording: Path,
    config_file: str | None,
    overrides: Sequence[str],
    allowed: Sequence[str],
) -> Config:
    if run_dir.resolve() == recording.parent:
        raise RunError(f"{run_dir}: holds the recorded run itself; choose another folder for the replay")
    file = config_file or str(recording.with_name(CONFIG_FILE))
    if config_file is None and not Path(file).is_file():
        raise ConfigError(f"{file}: no such file; name the settings of the recorded run with --config FILE")
    first = ["run.resume=auto", "metrics.record_groups=false"]
    # A replay has no evaluator; the user scores its checkpoints by hand.
    last = [f"run.output_dir={json.dumps(str(run_dir))}", "evaluator.eval_every_updates=0"]
    config = load_config(file, [*first, *overrides, *last]).config
    if config_file is None:  # a replay runs no rewards
        code = consent.code_of_model(config.model)
        consent.check(code, [*allowed, *consent.named_by_user(code, overrides)], file)
    if config.reward.functions:
        return config
    return with_rewards(config, open_task(config))


def _total_updates(config: Config, recording: Recording) -> int:
    """Return the updates of the replay: max_updates, or as many as the recorded run had planned groups for."""
    groups = config.groups_per_update
    first = recording.take(groups)
    if len(first) < groups:
        raise DataError(f"{recording.path}: must have the {groups} groups of one update, got {len(first)}")
    recording.rewind()
    return config.learner.max_updates or first[0].planned_groups // groups


@dataclass
class ReplaySource:
    """The source of a replay: reads groups from a recording; its records go to a journal and to the terminal."""

    #: With `reward.functions` resolved.
    config: Config
    recording: Recording
    journal: Journal
    status: StatusLine
    stop: StopRequest
    #: Number of token ids that the model can read, and of those that it can predict.
    readable: int
    vocabulary: int
    #: Groups that have trained so far.
    taken: int

    def next_batch(self) -> list[RecordedGroup] | None:
        """Read the groups of the next update; None: asked to stop, or too few groups are left."""
        groups = self.recording.take(self.config.groups_per_update)
        if self.stop or len(groups) < self.config.groups_per_update:
            return None
        for group in groups:
            self._check(group)
        return groups

    def publish(self, grpo: Grpo, groups: Sequence[SampledGroup]) -> None:
        """Record the digest of the weights, to compare with another run; nothing fetches the weights themselves."""
        self.taken += len(groups)
        # Nothing fetches the chunks, so their size does not matter.
        manifest, _ = pack(freeze(grpo.version, grpo.policy.trainable()), chunk_bytes=1)
        self.record("policy", version=manifest.version, bytes=manifest.size, digest=manifest.digest)

    def sampled_per_s(self, update_s: float) -> None:
        """Return None: nothing samples in a replay."""

    def alarm(self) -> None:
        """Return None: no group is passed over in a replay."""

    def take_evaluations(self) -> None:
        """Do nothing: a replay has no evaluator."""

    def finish(self, ended_by: str | None) -> None:
        """Do nothing: a replay has no peers, and the terminal has shown the alarm."""

    def record(self, topic: str, **fields: Any) -> None:
        """Number one record, keep it in the journal and show it on the terminal."""
        self.status.show(self.journal.append(topic, fields))

    def snapshot(self) -> Snapshot:
        """Return the state that a checkpoint stores; by then all records so far are on the disk."""
        self.journal.sync()
        return Snapshot(Cursor(self.taken), self.journal.seq, str(self.recording.path))

    def _check(self, group: RecordedGroup) -> None:
        """Refuse a group on which training would run without an error but make no sense."""
        where = f"{self.recording.path}: lease {group.lease} ({group.problem.id})"
        completions = [token for completion in group.completions for token in completion.tokens]
        for tokens, ids in ((group.prompt, self.readable), (completions, self.vocabulary)):
            if min(tokens) < 0 or max(tokens) >= ids:
                raise DataError(
                    f"{where}: token ids of {self.config.model.model_name} lie in 0 … {ids - 1}, "
                    f"got {min(tokens)} … {max(tokens)}; set the model of the recorded run"
                )
        recorded = group.completions[0].rewards.keys()
        for name in self.config.reward.functions:
            if name not in recorded:
                raise DataError(
                    f"{where}: has no reward {name}, only {', '.join(recorded)}; set reward.functions to some of these"
                )
