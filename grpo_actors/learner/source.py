"""Where a run's groups come from and where its versions go: the `Source` protocol and the live source.

`LiveSource` takes groups from the exchange; `replay.ReplaySource` reads recorded groups.
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
from grpo_actors.process import StopRequest, is_supervised, keeps_evaluator
from grpo_actors.progress import LOADING_S, report_progress
from grpo_actors.rollout.worker import RolloutWorker

#: Longest wait for a batch or an evaluation, in seconds, between two checks of the stop flag.
POLL_S = 0.1


class Source(Protocol):
    """Everything in which a live run and a replay differ during training."""

    def next_batch(self) -> Sequence[SampledGroup] | None:
        """Wait for the groups of the next update and return them; None: asked to stop, or no groups are left."""

    def publish(self, grpo: Grpo, groups: Sequence[SampledGroup]) -> None:
        """Mark `groups` as consumed, and publish the version that they produced."""

    def sampled_per_s(self, update_s: float) -> float | None:
        """Return the tokens that arrived since the last call, divided by `update_s`; None if nothing samples."""

    def alarm(self) -> str | None:
        """Return the text of the alarm that the source recorded for the last update; None if there is none."""

    def take_evaluations(self) -> None:
        """Record the evaluations that have arrived."""

    def finish(self, ended_by: str | None) -> None:
        """Stop all peers after the last checkpoint. `ended_by`: the alarm that ended the run; None if none did."""


@dataclass(frozen=True, slots=True)
class LiveSource:
    """The source of a live run: takes batches from the exchange and publishes versions to the workers."""

    exchange: Exchange
    publisher: Publisher
    archive: Archive
    stop: StopRequest
    #: The worker of ``rollout.workers = 0``: runs in this thread and samples with the learner's own policy. Else None.
    local: RolloutWorker | None

    def next_batch(self) -> Sequence[SampledGroup] | None:
        """Wait for a batch; meanwhile, let the local worker sample."""
        while not self.stop:
            groups = self.exchange.next_batch(POLL_S if self.local is None else 0)
            if groups is not None:
                return groups
            if self.local is not None:
                self.local.turn(wait_s=0.01)
                # No batch is taken before the worker is idle: weights must never change under open completions.
                while self.local.busy:
                    self.local.turn(wait_s=0)
            self.take_evaluations()
            report_progress()  # the exchange thread has answered: neither of the two hangs
        return None

    def publish(self, grpo: Grpo, groups: Sequence[SampledGroup]) -> None:
        """Consume the leases of the groups, then publish the version; workers can fetch it a moment later."""
        self.exchange.consume([group.lease for group in groups], grpo.gaps)
        self.publisher.publish(grpo.version, grpo.policy.trainable())
        if self.local is not None:
            self.local.version = grpo.version

    def sampled_per_s(self, update_s: float) -> float | None:
        """Return the token rate of all workers together."""
        return self.exchange.take_tokens() / update_s

    def alarm(self) -> str | None:
        """Return the alarm that the exchange raised for the update: at the refill limit, or a worker in quarantine."""
        return self.exchange.alarm()

    def take_evaluations(self) -> None:
        """Record the scores that the evaluator has sent."""
        self.archive.take_evaluations(self.exchange, self.exchange.take_evaluations())

    def finish(self, ended_by: str | None) -> None:
        """Dismiss the workers; dismiss the evaluator once the last checkpoint has its score."""
        self.publisher.wait()
        self.exchange.dismiss("rollout", "the run is over")
        self._wait_for_evaluations()
        self.exchange.dismiss("evaluator", "the run is over")
        self.exchange.wait_for_goodbyes()
        if ended_by is not None and not is_supervised():  # the supervisor shows the record
            print(f"ended by an alarm: {ended_by}", file=sys.stderr)

    def _wait_for_evaluations(self) -> None:
        """Wait for the last checkpoint's score as long as an evaluator is here, or on its way for up to `LOADING_S`."""
        last_seen_s = time.monotonic()
        while self.archive.unevaluated() and not self.stop:
            if self.exchange.evaluator_present():
                last_seen_s = time.monotonic()
            elif not keeps_evaluator() or time.monotonic() - last_seen_s > LOADING_S:
                return
            self.take_evaluations()
            report_progress()
            time.sleep(POLL_S)
