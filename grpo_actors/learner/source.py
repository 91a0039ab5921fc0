"""Where the groups of a run come from and its versions go: the protocol, and the source of a live run.

`LiveSource` takes groups from the exchange; `replay` has the other source.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from grpo_actors.learner.archive import Archive
from grpo_actors.learner.exchange.exchange import Exchange
from grpo_actors.learner.groups import SampledGroup
from grpo_actors.learner.grpo import Grpo
from grpo_actors.learner.publishing import Publisher
from grpo_actors.process import StopRequest, is_supervised
from grpo_actors.rollout.worker import RolloutWorker

#: How long the end of a run waits for an evaluator that is not there (it may be restarting).
EVALUATOR_ABSENT_S = 20.0
#: Longest wait for a batch or an evaluation before the stop flag is looked at.
POLL_S = 0.1


class Source(Protocol):
    """All in which a live run and a replay differ while they train."""

    def next_batch(self) -> Sequence[SampledGroup] | None:
        """Wait for the groups of the next update; None: asked to stop, or no groups are left."""

    def publish(self, grpo: Grpo, groups: Sequence[SampledGroup]) -> None:
        """Take note that `groups` are consumed, and publish the version that they made."""

    def sampled_per_s(self, update_s: float) -> float | None:
        """Tokens that arrived since the last call, divided by the seconds of the update; None: nobody samples."""

    def alarm(self) -> str | None:
        """Text of an alarm that the source recorded for the last update, if there is one."""

    def take_evaluations(self) -> None:
        """Record the evaluations that have arrived."""

    def finish(self, ended_by: str | None) -> None:
        """Let all peers leave after the last checkpoint; `ended_by`: the alarm that ended the run, if one did."""


@dataclass(frozen=True, slots=True)
class LiveSource:
    """The source of a run whose workers sample: takes batches from the exchange, publishes versions."""

    exchange: Exchange
    publisher: Publisher
    archive: Archive
    stop: StopRequest
    #: The worker of ``rollout.workers = 0``, which runs in this thread and samples with the learner's own policy.
    local: RolloutWorker | None

    def next_batch(self) -> Sequence[SampledGroup] | None:
        """Wait for a batch, and let the local worker work meanwhile."""
        while not self.stop:
            groups = self.exchange.next_batch(POLL_S if self.local is None else 0)
            if groups is not None:
                return groups
            if self.local is not None:
                self.local.turn(wait_s=0.01)
                while self.local.busy:  # no batch is taken, so weights never change, under open completions
                    self.local.turn(wait_s=0)
            self.take_evaluations()
        return None

    def publish(self, grpo: Grpo, groups: Sequence[SampledGroup]) -> None:
        """Settle the leases; workers may fetch the version a moment later."""
        self.exchange.consume([group.lease for group in groups])
        self.publisher.publish(grpo.version, grpo.policy.trainable())
        if self.local is not None:
            self.local.version = grpo.version

    def sampled_per_s(self, update_s: float) -> float | None:
        """Of all workers together."""
        return self.exchange.take_tokens() / update_s

    def alarm(self) -> str | None:
        """Whether the groups that were passed over were replaced in vain."""
        alarm = self.exchange.selection_alarm()
        return None if alarm is None else f"no signal: {alarm}"

    def take_evaluations(self) -> None:
        """Record the evaluator's scores."""
        self.archive.take_evaluations(self.exchange, self.exchange.take_evaluations())

    def finish(self, ended_by: str | None) -> None:
        """Dismiss the workers, then the evaluator once the last checkpoint has its score."""
        self.publisher.wait()
        self.exchange.dismiss("rollout", "the run is over")
        self._wait_for_evaluations()
        self.exchange.dismiss("evaluator", "the run is over")
        self.exchange.wait_for_goodbyes()
        if ended_by is not None and not is_supervised():  # the supervisor shows the record
            print(f"ended by an alarm: {ended_by}", file=sys.stderr)

    def _wait_for_evaluations(self) -> None:
        """Wait for the last checkpoint's score, unless someone presses Ctrl-C or no evaluator is there."""
        last_seen_s = time.monotonic()
        while (
            self.archive.unevaluated()
            and not self.stop
            and time.monotonic() - last_seen_s < EVALUATOR_ABSENT_S
        ):
            if self.exchange.evaluator_present():
                last_seen_s = time.monotonic()
            self.take_evaluations()
            time.sleep(POLL_S)
