"""What the learner's second thread does: grants leases, takes groups in, serves weights, keeps the records.

What may be granted and what may train is decided by `schedule`, who takes part by `peers`, what a group
must look like by `supply`, which ones count by `selection`; this file carries their decisions to the
sockets and into the journal. One thread owns a Dispatcher.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from grpo_actors.errors import ProtocolError
from grpo_actors.learner.exchange.evaluations import Evaluations
from grpo_actors.learner.exchange.peers import MAX_OFFENCES, Peer, Roster
from grpo_actors.learner.exchange.selection import Selection
from grpo_actors.learner.exchange.supply import Supply, oldest_version
from grpo_actors.learner.groups import SampledGroup
from grpo_actors.observe.sinks import Journal
from grpo_actors.rundir.checkpoints import Snapshot
from grpo_actors.schedule.lease import Verdict
from grpo_actors.schedule.leases import LeaseTable
from grpo_actors.transport.control import ControlServer
from grpo_actors.transport.weights import WeightsServer
from grpo_actors.wire import messages as wire

#: How often deadlines and processes are looked at: a killed local worker is seen within this time.
TICK_S = 0.25


class Dispatcher:
    """`turn` is one step of its life; the other public methods are what the learner asks for."""

    def __init__(
        self,
        *,
        control: ControlServer,
        weights: WeightsServer,
        journal: Journal,
        table: LeaseTable[SampledGroup],
        supply: Supply,
        selection: Selection,
        welcome: wire.Welcome,
        lost_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._control = control
        self._weights = weights
        self._journal = journal
        self._table = table
        self._table.leaves_out = self._leaves_out
        self._table.skips = selection.skips
        self._supply = supply
        self._selection = selection
        self._welcome = welcome
        self._clock = clock
        self._roster = Roster(welcome.run_id, lost_s)
        self._published = -1
        self._batch_out = False
        self._evaluations = Evaluations()
        self._tokens_in = 0
        self._next_tick_s = 0.0
        self._left_out = -1  # the last position that was said to be left out
        self._dismissed: dict[str, str] = {}  # role -> why its peers were sent home

    # --- what the learner asks for ----------------------------------------------------------------

    def consume(self, leases: Sequence[int]) -> None:
        """The groups of these leases have made the next version, which may take a while to be published."""
        if leases:
            alarm = self._selection.settle(self._table.consume(leases))
            if alarm is not None:
                self.record("alarm", {"name": "no signal", "text": alarm, "update": self._table.version})
            self._batch_out = False

    def publish(self, manifest: wire.Manifest, data: memoryview) -> None:
        """Workers may fetch this version."""
        self._weights.publish(manifest.version, wire.encode(manifest), data, manifest.chunk_bytes)
        self._published = manifest.version
        for peer in self._roster:
            if peer.works:
                self._send(peer.identity, wire.Announcement(version=self._published))
        told = {"version": manifest.version, "bytes": manifest.size, "digest": manifest.digest}
        self.record("policy", told)

    def next_batch(self) -> list[SampledGroup] | None:
        """The groups of the next update as soon as they are whole; one batch is out at a time."""
        batch = None if self._batch_out else self._table.next_batch()
        if batch is None:
            return None
        self._batch_out = True
        return [group for _, group in batch]

    def record(self, topic: str, fields: Mapping[str, Any]) -> None:
        """Number, keep and publish one record; the metrics bring the selection's and all workers' states along."""
        if topic == "metrics":
            share = self._roster.take_wait_share()
            fields = {**fields, "rollout_wait_share": share, **self._selection.metrics()}
            for peer in self._roster:
                if peer.role == "rollout":
                    self._journal.append("worker", peer.describe())
        self._journal.append(topic, fields)

    def snapshot(self) -> Snapshot:
        """What a checkpoint stores of this half; all records so far are on the disk."""
        self._journal.sync()
        rates = self._selection.success_rates()
        return Snapshot(self._table.cursor, self._journal.seq, success_rates=rates)

    def take_evaluations(self) -> list[wire.Evaluation]:
        """Evaluations that came in since the last call."""
        return self._evaluations.take()

    def take_tokens(self) -> int:
        """Tokens that workers sampled, of the groups that came in since the last call."""
        tokens, self._tokens_in = self._tokens_in, 0
        return tokens

    def evaluator_present(self) -> bool:
        """Whether an evaluator takes part."""
        return any(self._roster.present("evaluator"))

    def dismiss(self, role: str, reason: str) -> None:
        """Send all peers of a role home, and those that come later."""
        self._dismissed[role] = reason
        for peer in self._roster:
            if peer.role == role:
                self._send(peer.identity, wire.Bye(reason=reason))

    def awaits_goodbyes(self) -> bool:
        """Whether a dismissed peer is still there, one in this very process left aside."""
        return any(not peer.inside for role in self._dismissed for peer in self._roster.present(role))

    # --- one turn ---------------------------------------------------------------------------------

    def turn(self) -> None:
        """Do all that there is to do now; does not wait."""
        self._weights.serve()
        for identity, data in self._control.receive():
            self._hear(identity, data)
        now_s = self._clock()
        if now_s >= self._next_tick_s:
            self._next_tick_s = now_s + TICK_S
            probe = wire.encode(wire.Announcement(version=max(0, self._published)))
            for peer in self._roster.silent(now_s):
                if not self._control.reaches(peer.identity, probe):
                    self._lose(peer, "its connection is closed")
            for peer, why in self._roster.gone(now_s):
                self._lose(peer, why)
            self._report_set_aside(self._table.expire(now_s))
        self._grant(now_s)

    def _hear(self, identity: bytes, data: bytes) -> None:
        if self._roster.banned(identity):
            return
        try:
            self._obey(identity, wire.decode(wire.from_peer, data))
        except ProtocolError as error:
            self.record("log", {"level": "warning", "text": f"{identity.decode(errors='replace')}: {error}"})
            if self._roster.offend(identity):
                self._drop(identity)

    def _drop(self, identity: bytes) -> None:
        reason = f"{MAX_OFFENCES} messages against the protocol"
        self._send(identity, wire.Bye(reason=reason))
        peer = self._roster.get(identity)
        if peer is not None:
            self._lose(peer, reason)
            self._roster.remove(peer)

    def _obey(self, identity: bytes, message: wire.FromPeer) -> None:
        if isinstance(message, wire.Hello):
            self._greet(identity, message)
            return
        peer = self._roster.get(identity)
        if peer is None:
            # The learner was restarted under a live worker: it has to introduce itself again.
            self._send(identity, wire.Bye(reason="introduce yourself", again=True))
            return
        peer.last_seen_s = self._clock()
        if peer.state == "lost":
            self._change(peer, "joined")
        match message:
            case wire.Beat():
                self._heed(peer, message)
            case wire.Group() if peer.role == "rollout":
                self._receive(peer, message)
            case wire.Evaluation() if peer.role == "evaluator":
                self._evaluations.add(message, self._table.version)
            case wire.Bye():
                self._table.hand_back(peer.name)
                self._change(peer, "left")
                self._roster.remove(peer)
            case _:
                raise ProtocolError(f"{type(message).__name__} from a peer whose role is {peer.role}")

    def _greet(self, identity: bytes, hello: wire.Hello) -> None:
        refusal = self._roster.refusal(identity, hello)
        if refusal is not None:
            self._send(identity, wire.Bye(reason=refusal))
            return
        if hello.role in self._dismissed:
            self._send(identity, wire.Bye(reason=self._dismissed[hello.role], dismissed=True))
            return
        # A reconnect under the same name: what it held before is held no more.
        self._table.hand_back(hello.name)
        peer = self._roster.admit(identity, hello, self._clock())
        self._send(identity, self._welcome)
        self._change(peer, "joined")

    def _heed(self, peer: Peer, beat: wire.Beat) -> None:
        now_s = self._clock()
        peer.count(beat, now_s)
        if beat.state in ("sampling", "waiting") and peer.state != beat.state:
            self._change(peer, beat.state)
        self._table.reconcile(peer.name, beat.holding, now_s)
        if peer.role in self._dismissed:
            self._send(peer.identity, wire.Bye(reason=self._dismissed[peer.role]))
        elif peer.works and self._published >= 0:
            self._send(peer.identity, wire.Announcement(version=self._published))

    def _receive(self, peer: Peer, message: wire.Group) -> None:
        verdict = self._table.judge(message.lease, message.attempt, oldest_version(message))
        if verdict.new:
            try:
                self._take(peer, message, verdict)
            except ProtocolError as error:
                self._answer(peer, replace(verdict, accepted=False, reason=str(error)))
                raise
        self._answer(peer, verdict)

    def _take(self, peer: Peer, message: wire.Group, verdict: Verdict) -> None:
        """Check what the group holds, count it and put it into the table."""
        group = self._supply.group(message, peer.name, self._table.version)
        peer.groups += 1
        self._tokens_in += sum(sum(completion.sampled) for completion in group.completions)
        for failure in message.failures:
            self.record("log", {"level": "warning", "text": f"{group.problem.id}: {failure}"})
        self._table.accept(verdict, group, self._selection.filter_group(group))

    def _answer(self, peer: Peer, verdict: Verdict) -> None:
        """Acknowledge a group, after its lease was given back if it is refused: the only place that does."""
        if not verdict.accepted:
            self._table.refuse(verdict.lease, verdict.attempt)
        answer = wire.Ack(
            lease=verdict.lease, attempt=verdict.attempt, accepted=verdict.accepted, reason=verdict.reason
        )
        self._send(peer.identity, answer)

    # --- losses -----------------------------------------------------------------------------------

    def _lose(self, peer: Peer, why: str) -> None:
        self._change(peer, "lost", why=why)
        self._report_set_aside(self._table.release(peer.name))

    def _report_set_aside(self, positions: Sequence[int]) -> None:
        for position in positions:
            _, problem = self._supply.problem(position)
            text = f"{problem.id}: three workers died or timed out on it; it is left out (lease {position})"
            self.record("alarm", {"name": "problem set aside", "text": text})

    # --- granting ---------------------------------------------------------------------------------

    def _grant(self, now_s: float) -> None:
        """Hand out what may go out, to whoever holds least: a small window is shared among all."""
        willing = [peer for peer in self._roster if peer.works and peer.role not in self._dismissed]
        while willing:
            peer = min(willing, key=lambda peer: self._table.held_by(peer.name))
            granted = self._table.grant(peer.name, peer.credits, now_s)
            if not granted:
                willing.remove(peer)
                continue
            grants = wire.Grant(leases=[self._supply.lease(grant) for grant in granted])
            if not self._send(peer.identity, grants):
                # They never went out: nothing is held against them.
                for grant in granted:
                    self._table.refuse(grant.lease, grant.attempt)
                self._lose(peer, "its connection is closed or full")
                willing.remove(peer)

    def _leaves_out(self, position: int) -> bool:
        complaint = self._supply.too_long(position)
        if complaint is not None and position > self._left_out:  # it may be asked again
            self._left_out = position
            self.record("log", {"level": "info", "text": complaint})
        return complaint is not None

    # --- sending ----------------------------------------------------------------------------------

    def _change(self, peer: Peer, state: str, **more: Any) -> None:
        """A worker's new state, which is an event, unless it only went between sampling and waiting."""
        worth_telling = state in ("joined", "left", "lost") or peer.state in ("joined", "lost")
        peer.state = state
        if worth_telling:
            self.record("worker", {**peer.describe(), **more})

    def _send(self, identity: bytes, message: wire.Message) -> bool:
        return self._control.send(identity, wire.encode(message))
