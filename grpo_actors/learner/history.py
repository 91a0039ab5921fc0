"""The history of a run: its records, samples, alarms, recorded groups and checkpoints, written while it trains.

Live runs and replays share all of this; they differ in where their groups come from (`source`) and where their
records go (`Records`). Has no socket.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from grpo_actors import __version__
from grpo_actors.config import Config
from grpo_actors.devices import own_device
from grpo_actors.learner.archive import Archive, Records
from grpo_actors.learner.failing_rewards import ALWAYS_FAILS, FailingRewards
from grpo_actors.learner.groups import SampledGroup
from grpo_actors.learner.grpo import Grpo
from grpo_actors.learner.judged import judged_text
from grpo_actors.learner.recording import GroupsFile
from grpo_actors.learner.report import ledger, samples
from grpo_actors.observe.alarms import Health
from grpo_actors.rundir.decisions import as_record, decisions
from grpo_actors.rundir.folder import GROUPS_FILE
from grpo_actors.rundir.provenance import commit, versions


@dataclass
class History:
    """The history of one run: call `begin` first, `record_update` after every update, `end` and `close` last."""

    run_dir: Path
    #: With `reward.functions` resolved.
    config: Config
    grpo: Grpo
    archive: Archive
    records: Records
    #: The alarm that must end the run: a reward that always fails, or any with health.on_alarm = "stop"; None: go on.
    ended_by: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._health = Health(self.config, ends_turns=self.grpo.policy.chat.ends_turns)
        self._failing = FailingRewards(self.config.reward.functions)
        self._decisions = [as_record(record) for record in self.archive.recorded("headcount")]
        self._groups = (
            GroupsFile(self.run_dir, after_update=self.archive.update)
            if self.config.metrics.record_groups
            else None
        )

    def begin(self) -> None:
        """Record what runs, and the update that it starts or continues from."""
        self.records.record(
            "start",
            run_name=self.config.run.run_name,
            run_id=self.archive.run_id,
            model_name=self.config.model.model_name,
            total_updates=self.grpo.total_updates,
            update=self.grpo.version,
            config=self.config.model_dump(mode="json"),
            version=__version__,
            commit=commit(),
            versions=versions(),
            device=own_device(),
        )
        if self._groups is not None and self._groups.last_update < self.grpo.version:
            text = f"{GROUPS_FILE} lacks updates {self._groups.last_update + 1} to {self.grpo.version}"
            self.records.record("log", level="warning", text=text)
        self.archive.announce(self.records)

    def record_update(
        self,
        groups: Sequence[SampledGroup],
        measured: Mapping[str, Any],
        *,
        update_s: float,
        wait_s: float,
        rollout_tokens_per_s: float | None,
    ) -> None:
        """Record one update: its metrics, samples, groups and alarms.

        Args:
            groups: The groups that trained.
            measured: The metrics that `Grpo.update` returned.
            update_s: Seconds of the whole update, the wait for its groups included.
            wait_s: Seconds of that wait.
            rollout_tokens_per_s: Tokens that the workers sampled per second; None if nothing samples.
        """
        update, total = self.grpo.version, self.grpo.total_updates
        metrics = {
            "update": update,
            "total_updates": total,
            "epoch": groups[-1].epoch,
            **measured,
            "rollout_tokens_per_s": rollout_tokens_per_s,
            "update_s": update_s,
            "wait_s": wait_s,
            "learner_wait_share": wait_s / update_s if update_s else None,
        }
        self.records.record("metrics", **metrics, ledger=ledger(groups))
        self._record_decisions()
        shown, weights = self.config.metrics.log_completions, self.config.reward.functions
        judged = partial(judged_text, self.grpo.policy, self.config.reward.grade)
        for sample in samples(groups, shown, weights, self.grpo.policy.decode, judged):
            self.records.record("sample", update=update, **sample)
        if self._groups is not None:
            self._groups.write(update, total * self.config.groups_per_update, groups, self.grpo.log_ratios)
        for alarm in self._health.check(metrics):
            self.records.record("alarm", name=alarm.name, text=alarm.text, update=update)
            self.note_alarm(f"{alarm.name}: {alarm.text}")
        if (failure := self._failing.check(groups)) is not None and self.ended_by is None:
            self.records.record("alarm", name=ALWAYS_FAILS, text=failure, update=update)
            self.ended_by = f"{ALWAYS_FAILS}: {failure}"

    def _record_decisions(self) -> None:
        """Record the decisions on the number of workers that the records lack: new ones, and ones that a resume cut."""
        for decision in decisions(self.run_dir):
            if decision not in self._decisions:
                self.records.record("headcount", **decision)
                self._decisions.append(decision)

    def note_alarm(self, alarm: str) -> None:
        """Take note of an alarm that was recorded: with health.on_alarm = "stop", the first one ends the run."""
        if self.config.health.on_alarm == "stop" and self.ended_by is None:
            self.ended_by = alarm

    def save_if_due(self) -> None:
        """Start to write a checkpoint if one is due after this update; record the one before once it is durable."""
        if self.archive.is_due(self.grpo.version):
            self._save()
        self.archive.collect(self.records)

    def save_last(self) -> None:
        """Write a checkpoint of the newest version, unless it has one, and wait until every checkpoint is durable."""
        self._save()
        self.archive.collect(self.records, wait=True)

    def _save(self) -> None:
        """Start to write a checkpoint; the recorded groups reach the disk first."""
        if self._groups is not None:
            self._groups.sync()
        self.archive.save(self.records, self.grpo)

    def end(self, reason: str) -> int:
        """Write the last record, with `reason` or the alarm that ended the run; return the process's exit code."""
        self._record_decisions()
        if self.ended_by is None:
            self.records.record("stop", reason=reason, exit_code=0)
            return 0
        self.records.record("stop", reason=f"alarm: {self.ended_by}", exit_code=1)
        return 1

    def close(self) -> None:
        """Finish the checkpoint under way and close the file of recorded groups; may be called twice."""
        self.archive.close()
        if self._groups is not None:
            self._groups.close()
