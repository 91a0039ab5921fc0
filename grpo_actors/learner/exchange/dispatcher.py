"""The dispatcher: the exchange thread's work. It grants leases, accepts groups, serves weights and writes records.

Other modules decide; this one carries their decisions to the sockets and into the journal:

    schedule     which leases may be granted, and which groups may train
    peers        who takes part
    supply       what a group must look like
    selection    which groups count

A group on its way in: `_receive` decodes it, `_handle_group` judges it, `_accept_group` puts it into the lease
table, `_acknowledge` answers the worker. One thread owns a Dispatcher.
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

#: Seconds between two checks of deadlines and processes: a killed local worker is noticed within this time.
TICK_S = 0.25


class Dispatcher:
    """The exchange thread's state. `turn` does one step; the other public methods are the learner's requests."""

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
        self._table.leaves_out = self._is_left_out
        self._table.skips = selection.skips
        self._supply = supply
        self._selection = selection
        self._welcome = welcome
        self._clock = clock
        self._roster = Roster(welcome.run_id, lost_s)
        self._published = -1  # the newest version that workers can fetch
        self._batch_taken = False
        self._evaluations = Evaluations()
        self._sampled_tokens = 0
        self._next_tick_s = 0.0
        self._last_left_out = -1  # the last position whose exclusion was logged
        self._dismissed: dict[str, str] = {}  # role -> reason for which its peers must leave

    # --- the learner's requests -------------------------------------------------------------------

    def consume(self, leases: Sequence[int]) -> None:
        """Consume these leases: their groups produced the next version, which may be published a while later."""
        if leases:
            alarm = self._selection.settle(self._table.consume(leases))
            if alarm is not None:
                self.record("alarm", {"name": "no signal", "text": alarm, "update": self._table.version})
            self._batch_taken = False

    def publish(self, manifest: wire.Manifest, data: memoryview) -> None:
        """Serve this version to the workers, and announce it."""
        self._weights.publish(manifest.version, wire.encode(manifest), data, manifest.chunk_bytes)
        self._published = manifest.version
        for peer in self._roster:
            if peer.may_hold_leases:
                self._send(peer.identity, wire.Announcement(version=self._published))
        fields = {"version": manifest.version, "bytes": manifest.size, "digest": manifest.digest}
        self.record("policy", fields)

    def next_batch(self) -> list[SampledGroup] | None:
        """Return the groups of the next update once all have arrived, else None.

        After that it returns None until `consume`: the learner has one batch at a time.
        """
        batch = None if self._batch_taken else self._table.next_batch()
        if batch is None:
            return None
        self._batch_taken = True
        return [group for _, group in batch]

    def record(self, topic: str, fields: Mapping[str, Any]) -> None:
        """Number, keep and publish one record.

        A ``metrics`` record also gets the metrics of the selection; a record of each worker's state comes before it.
        """
        if topic == "metrics":
            share = self._roster.take_wait_share()
            fields = {
                **fields,
                "rollout_wait_share": share,
                "peers_memory_gb": {
                    peer.name: peer.memory_gb for peer in self._roster if not peer.in_this_process
                },
                **self._selection.metrics(),
            }
            for peer in self._roster:
                if peer.role == "rollout":
                    self._journal.append("worker", peer.describe())
        self._journal.append(topic, fields)

    def snapshot(self) -> Snapshot:
        """Return the state of the exchange that a checkpoint stores; by then all records so far are on the disk."""
        self._journal.sync()
        rates = self._selection.success_rates()
        return Snapshot(self._table.cursor, self._journal.seq, success_rates=rates)

    def take_evaluations(self) -> list[wire.Evaluation | wire.Unscored]:
        """Return the evaluations that arrived since the last call."""
        return self._evaluations.take()

    def take_tokens(self) -> int:
        """Return the number of sampled tokens in the groups that arrived since the last call."""
        tokens, self._sampled_tokens = self._sampled_tokens, 0
        return tokens

    def evaluator_present(self) -> bool:
        """Return whether an evaluator takes part."""
        return any(self._roster.present("evaluator"))

    def dismiss(self, role: str, reason: str) -> None:
        """Make all peers of a role leave, and any peer of this role that joins later."""
        self._dismissed[role] = reason
        for peer in self._roster:
            if peer.role == role:
                self._send(peer.identity, wire.Bye(reason=reason))

    def awaits_goodbyes(self) -> bool:
        """Return whether a dismissed peer has not left yet; the local worker, in this process, does not count."""
        return any(
            not peer.in_this_process for role in self._dismissed for peer in self._roster.present(role)
        )

    # --- one turn ---------------------------------------------------------------------------------

    def turn(self) -> None:
        """Do everything that can be done now; never wait."""
        self._weights.serve()
        for identity, data in self._control.receive():
            self._receive(identity, data)
        now_s = self._clock()
        if now_s >= self._next_tick_s:
            self._next_tick_s = now_s + TICK_S
            probe = wire.encode(wire.Announcement(version=max(0, self._published)))
            for peer in self._roster.to_probe(now_s):
                if not self._control.reaches(peer.identity, probe):
                    self._mark_lost(peer, "its connection is closed")
            for peer, why in self._roster.find_lost(now_s):
                self._mark_lost(peer, why)
            self._report_set_aside(self._table.expire(now_s))
        self._grant(now_s)

    def _receive(self, identity: bytes, data: bytes) -> None:
        if self._roster.banned(identity):
            return
        try:
            self._handle(identity, wire.decode(wire.from_peer, data))
        except ProtocolError as error:
            self.record("log", {"level": "warning", "text": f"{identity.decode(errors='replace')}: {error}"})
            if self._roster.count_offence(identity):
                self._ban(identity)

    def _ban(self, identity: bytes) -> None:
        reason = f"{MAX_OFFENCES} messages against the protocol"
        self._send(identity, wire.Bye(reason=reason))
        peer = self._roster.get(identity)
        if peer is not None:
            self._mark_lost(peer, reason)
            self._roster.remove(peer)

    def _handle(self, identity: bytes, message: wire.FromPeer) -> None:
        if isinstance(message, wire.Hello):
            self._handle_hello(identity, message)
            return
        peer = self._roster.get(identity)
        if peer is None:
            # The learner was restarted while this peer was running: the peer must say Hello again.
            self._send(identity, wire.Bye(reason="say Hello again", again=True))
            return
        peer.last_seen_s = self._clock()
        if peer.state == "lost":
            self._set_state(peer, "joined")
        match message:
            case wire.Beat():
                self._handle_beat(peer, message)
            case wire.Group() if peer.role == "rollout":
                self._handle_group(peer, message)
            case wire.Evaluation() | wire.Unscored() if peer.role == "evaluator":
                self._evaluations.add(message, self._table.version)
            case wire.Bye():
                self._table.hand_back(peer.name)
                self._set_state(peer, "left")
                self._roster.remove(peer)
            case _:
                raise ProtocolError(f"{type(message).__name__} from a peer whose role is {peer.role}")

    def _handle_hello(self, identity: bytes, hello: wire.Hello) -> None:
        refusal = self._roster.refusal(identity, hello)
        if refusal is not None:
            self._send(identity, wire.Bye(reason=refusal))
            return
        if hello.role in self._dismissed:
            self._send(identity, wire.Bye(reason=self._dismissed[hello.role], dismissed=True))
            return
        # A reconnect under the same name: the peer no longer holds its earlier leases.
        self._table.hand_back(hello.name)
        peer = self._roster.admit(identity, hello, self._clock())
        self._send(identity, self._welcome)
        self._set_state(peer, "joined")

    def _handle_beat(self, peer: Peer, beat: wire.Beat) -> None:
        now_s = self._clock()
        peer.record_beat(beat, now_s)
        if beat.state in ("sampling", "waiting") and peer.state != beat.state:
            self._set_state(peer, beat.state)
        self._table.reconcile(peer.name, beat.holding, now_s)
        if peer.role in self._dismissed:
            self._send(peer.identity, wire.Bye(reason=self._dismissed[peer.role]))
        elif peer.may_hold_leases and self._published >= 0:
            self._send(peer.identity, wire.Announcement(version=self._published))

    def _handle_group(self, peer: Peer, message: wire.Group) -> None:
        verdict = self._table.judge(message.lease, message.attempt, oldest_version(message))
        if verdict.new:
            try:
                self._accept_group(peer, message, verdict)
            except ProtocolError as error:
                self._acknowledge(peer, replace(verdict, accepted=False, reason=str(error)))
                raise
        self._acknowledge(peer, verdict)

    def _accept_group(self, peer: Peer, message: wire.Group, verdict: Verdict) -> None:
        """Check the contents of the group, count it and put it into the lease table."""
        group = self._supply.read_group(message, peer.name, self._table.version)
        peer.groups += 1
        self._sampled_tokens += sum(sum(completion.sampled) for completion in group.completions)
        for failure in message.failures:
            self.record("log", {"level": "warning", "text": f"{group.problem.id}: {failure}"})
        self._table.accept(verdict, group, self._selection.filter_group(group))

    def _acknowledge(self, peer: Peer, verdict: Verdict) -> None:
        """Acknowledge a group; give back its lease first if it is refused. Only this method does either."""
        if not verdict.accepted:
            self._table.refuse(verdict.lease, verdict.attempt)
        ack = wire.Ack(
            lease=verdict.lease, attempt=verdict.attempt, accepted=verdict.accepted, reason=verdict.reason
        )
        self._send(peer.identity, ack)

    # --- losses -----------------------------------------------------------------------------------

    def _mark_lost(self, peer: Peer, why: str) -> None:
        self._set_state(peer, "lost", why=why)
        self._report_set_aside(self._table.release(peer.name))

    def _report_set_aside(self, positions: Sequence[int]) -> None:
        for position in positions:
            _, problem = self._supply.problem(position)
            text = f"{problem.id}: three workers died or timed out on it; it is left out (lease {position})"
            self.record("alarm", {"name": "problem set aside", "text": text})

    # --- granting ---------------------------------------------------------------------------------

    def _grant(self, now_s: float) -> None:
        """Grant the leases that may go out, to the worker with the fewest first, so that all share a small window.

        The last run of leases that a worker may hold would only wait there until the worker is free. It is granted only
        if no other worker asks for leases: another one may be free earlier.
        """
        willing = [peer for peer in self._roster if peer.may_hold_leases and peer.role not in self._dismissed]
        run = self._table.batch_groups
        reserve = run if sum(peer.credits > 0 for peer in willing) > 1 else 0
        while willing:
            peer = min(willing, key=lambda peer: self._table.held_by(peer.name))
            capacity = max(min(run, peer.credits), peer.credits - reserve)
            granted = self._table.grant(peer.name, capacity, now_s)
            if not granted:
                willing.remove(peer)
                continue
            grants = wire.Grant(leases=[self._supply.lease_message(grant) for grant in granted])
            if not self._send(peer.identity, grants):
                # The grant was never sent, so it does not count as a loss of these leases.
                for grant in granted:
                    self._table.refuse(grant.lease, grant.attempt)
                self._mark_lost(peer, "its connection is closed or full")
                willing.remove(peer)

    def _is_left_out(self, position: int) -> bool:
        reason = self._supply.exclusion_reason(position)
        if reason is not None and position > self._last_left_out:  # the table may ask again for a position
            self._last_left_out = position
            self.record("log", {"level": "info", "text": reason})
        return reason is not None

    # --- sending ----------------------------------------------------------------------------------

    def _set_state(self, peer: Peer, state: str, **more: Any) -> None:
        """Set the state of a peer, and record it; a change between sampling and waiting is not recorded."""
        is_event = state in ("joined", "left", "lost") or peer.state in ("joined", "lost")
        peer.state = state
        if is_event:
            self.record("worker", {**peer.describe(), **more})

    def _send(self, identity: bytes, message: wire.Message) -> bool:
        return self._control.send(identity, wire.encode(message))
