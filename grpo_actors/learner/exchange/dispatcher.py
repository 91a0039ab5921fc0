"""The dispatcher: the exchange thread's work. It grants leases, accepts groups, serves weights and writes records.

Other modules decide; this one carries their decisions to the sockets and into the journal:

    schedule     which leases may be granted, and which groups may train
    peers        who takes part
    supply       what a group must look like
    selection    which groups count
    quarantine   whose log-probs cannot be trusted
    standstill   why no group arrives

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
from grpo_actors.learner.exchange.standstill import Standstill
from grpo_actors.learner.exchange.supply import Supply, oldest_version
from grpo_actors.learner.exchange.throttle import Throttle
from grpo_actors.learner.groups import SampledGroup
from grpo_actors.observe.sinks import Journal
from grpo_actors.rundir.checkpoints import Snapshot
from grpo_actors.schedule.lease import Claim, Verdict
from grpo_actors.schedule.leases import LeaseTable
from grpo_actors.schedule.quarantine import Gap, Quarantine
from grpo_actors.tasks.failures import Failures
from grpo_actors.transport.access import Sender
from grpo_actors.transport.control import ControlServer
from grpo_actors.transport.weights import WeightsServer
from grpo_actors.wire import messages as wire

#: Seconds between two checks of deadlines and processes: a killed local worker is noticed within this time.
TICK_S = 0.25
#: A longer message of a banned peer is not even read: it is no Hello.
MAX_HELLO_BYTES = 4096


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
        quarantine: Quarantine,
        welcome: wire.Welcome,
        lost_s: float,
        evaluator_token: str,
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
        self._quarantine = quarantine
        #: Name and text of the alarm that the last update raised; None: it raised none.
        self.alarm: str | None = None
        self._welcome = welcome
        self._clock = clock
        self._roster = Roster(welcome.run_id, lost_s, evaluator_token)
        self._warnings = Throttle()
        self._failures = Failures()
        self._published = -1  # the newest version that workers can fetch
        self._batch_taken = False
        self._evaluations = Evaluations()
        self._standstill = Standstill()
        self._sampled_tokens = 0
        self._next_tick_s = 0.0
        self._last_left_out = -1  # the last position whose exclusion was logged
        self._dismissed: dict[str, str] = {}  # role -> reason for which its peers must leave

    # --- the learner's requests -------------------------------------------------------------------

    def consume(self, leases: Sequence[int], gaps: Mapping[int, Sequence[Gap]]) -> None:
        """Consume these leases: their groups produced the next version, which may be published a while later.

        A worker that is quarantined for its `gaps` loses its leases before another batch is taken.
        """
        if not leases:
            return
        measured = [
            (self._table.worker_of(lease), gap) for lease, of_lease in gaps.items() for gap in of_lease
        ]
        self.alarm = None
        alarm = self._selection.settle(self._table.consume(leases))
        if alarm is not None:
            self._raise_alarm("no signal", alarm)
        for session, reason in self._quarantine.judge(measured).items():
            self._isolate(session, reason)
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
                self._send(peer.identity, wire.Bye(reason=reason, dismissed=True))

    def awaits_goodbyes(self) -> bool:
        """Return whether a dismissed peer has not left yet; the local worker, in this process, does not count."""
        return any(
            not peer.in_this_process for role in self._dismissed for peer in self._roster.present(role)
        )

    # --- one turn ---------------------------------------------------------------------------------

    def turn(self) -> None:
        """Do everything that can be done now; never wait."""
        self._weights.serve()
        for identity, data, sender in self._control.receive():
            self._receive(identity, data, sender)
        now_s = self._clock()
        if now_s >= self._next_tick_s:
            self._next_tick_s = now_s + TICK_S
            for peer in self._roster.to_probe(now_s):
                if not self._control.reaches(peer.identity, self._probe):
                    self._mark_lost(peer, "its connection is closed")
            for peer in self._roster:
                if not self._control.admits(peer.sender):
                    self._shut_out(peer)
            for peer, why in self._roster.find_lost(now_s):
                self._mark_lost(peer, why)
            self._report_set_aside(self._table.expire(now_s))
            self._report_standstill(now_s)
        self._grant(now_s)

    @property
    def _probe(self) -> bytes:
        """A message that changes nothing, to learn whether a peer is connected."""
        return wire.encode(wire.Announcement(version=max(0, self._published)))

    def _receive(self, identity: bytes, data: bytes, sender: Sender) -> None:
        banned = self._roster.banned(identity)
        if banned and len(data) > MAX_HELLO_BYTES:
            return
        try:
            message = wire.decode(wire.from_peer, data)
            if not banned or isinstance(message, wire.Hello):
                self._handle(identity, message, sender)
        except ProtocolError as error:
            if not banned:
                self._count_offence(identity, str(error))

    def _count_offence(self, identity: bytes, reason: str) -> None:
        peer = self._roster.get(identity)
        name = "a stranger" if peer is None else peer.name  # the identity itself is a secret
        self._warn(f"{name}: {reason}")
        self._standstill.note(name, reason)
        if self._roster.count_offence(identity):
            self._ban(identity, f"{MAX_OFFENCES} messages against the protocol, the last: {reason}")

    def _ban(self, identity: bytes, reason: str) -> None:
        self._send(identity, wire.Bye(reason=reason))
        peer = self._roster.get(identity)
        if peer is not None:
            self._standstill.note(peer.name, f"dropped after {reason}")
            self._drop(peer, reason)

    def _handle(self, identity: bytes, message: wire.FromPeer, sender: Sender) -> None:
        if isinstance(message, wire.Hello):
            self._handle_hello(identity, message, sender)
            return
        peer = self._roster.get(identity)
        if peer is None or peer.sender.key != sender.key:
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
                self._table.hand_back(peer.session)
                self._set_state(peer, "left")
                self._roster.remove(peer)
            case _:
                raise ProtocolError(f"{type(message).__name__} from a peer whose role is {peer.role}")

    def _handle_hello(self, identity: bytes, hello: wire.Hello, sender: Sender) -> None:
        former = self._roster.named(hello.name)
        if (
            former is not None
            and former.state != "lost"
            and not self._control.reaches(former.identity, self._probe)
        ):
            self._mark_lost(former, "its connection is closed")
        refusal = self._roster.refusal(identity, hello, sender)
        if refusal is not None:
            self._warn(f"{hello.name} on {hello.host} was refused: {refusal}")
            self._send(identity, wire.Bye(reason=refusal))
            return
        if hello.role in self._dismissed:
            self._send(identity, wire.Bye(reason=self._dismissed[hello.role], dismissed=True))
            return
        if former is not None:
            # Its process was started again, or its connection was cut: the peer no longer holds its earlier leases.
            self._table.hand_back(former.session)
            if former.identity != identity:
                self._send(former.identity, wire.Bye(reason="another process took its name"))
                self._roster.remove(former)
        peer = self._roster.admit(identity, hello, sender, self._clock())
        self._send(identity, self._welcome)
        self._set_state(peer, "joined")

    def _handle_beat(self, peer: Peer, beat: wire.Beat) -> None:
        now_s = self._clock()
        peer.record_beat(beat, now_s)
        if beat.state in ("sampling", "waiting") and peer.state != beat.state:
            self._set_state(peer, beat.state)
        self._table.reconcile(peer.session, beat.holding, now_s)
        if peer.role in self._dismissed:
            self._send(peer.identity, wire.Bye(reason=self._dismissed[peer.role], dismissed=True))
        elif peer.role == "rollout" and self._published >= 0:
            self._send(peer.identity, wire.Announcement(version=self._published))

    def _handle_group(self, peer: Peer, message: wire.Group) -> None:
        claim = Claim(peer.session, message.lease, message.attempt, message.token, oldest_version(message))
        verdict = self._table.judge(claim)
        if verdict.new:
            try:
                self._accept_group(peer, message, verdict)
            except ProtocolError as error:
                self._acknowledge(peer, replace(verdict, accepted=False, reason=str(error)), faulty=True)
                raise
        self._acknowledge(peer, verdict)
        if verdict.forged:
            raise ProtocolError(verdict.reason)

    def _accept_group(self, peer: Peer, message: wire.Group, verdict: Verdict) -> None:
        """Check the contents of the group, count it and put it into the lease table."""
        group = self._supply.read_group(message, peer.name, self._table.version)
        peer.groups += 1
        self._sampled_tokens += sum(sum(completion.sampled) for completion in group.completions)
        for text in self._failures.new(group.problem.id, group.failures):
            self._warn(text)
        self._table.accept(verdict, group, self._selection.filter_group(group))
        self._standstill.end()

    def _acknowledge(self, peer: Peer, verdict: Verdict, *, faulty: bool = False) -> None:
        """Acknowledge a group; give back its lease first if it is refused. Only this method does either."""
        claim = verdict.claim
        if not verdict.accepted:
            self._standstill.note(peer.name, verdict.reason)
            self._report_set_aside(self._table.refuse(claim, faulty=faulty))
        ack = wire.Ack(
            lease=claim.lease, attempt=claim.attempt, accepted=verdict.accepted, reason=verdict.reason
        )
        self._send(peer.identity, ack)

    def _isolate(self, session: str, reason: str) -> None:
        """Quarantine a worker: it gets no more leases, and its groups that have not trained are sampled again."""
        peer = self._roster.of_session(session)
        # The worker in this process samples with the learner's own policy.
        if peer is None or peer.in_this_process:
            return
        self._table.distrust(session)
        peer.quarantine = reason
        self._raise_alarm("worker quarantined", f"{peer.name} gets no more leases: {reason}; start it again")
        self.record("worker", peer.describe())

    def _raise_alarm(self, name: str, text: str) -> None:
        self.record("alarm", {"name": name, "text": text, "update": self._table.version})
        self.alarm = self.alarm or f"{name}: {text}"

    # --- losses -----------------------------------------------------------------------------------

    def _mark_lost(self, peer: Peer, why: str) -> None:
        self._set_state(peer, "lost", why=why)
        self._report_set_aside(self._table.release(peer.session))

    def _drop(self, peer: Peer, why: str) -> None:
        """Part from a peer. This is no loss of its leases: the problems are not why it goes."""
        self._table.hand_back(peer.session)
        self._set_state(peer, "lost", why=why)
        self._roster.remove(peer)

    def _shut_out(self, peer: Peer) -> None:
        """Part from a peer whose key was revoked."""
        self._drop(peer, "its key was revoked")
        self._control.cut(peer.sender)

    def _report_set_aside(self, positions: Sequence[int]) -> None:
        for position in positions:
            _, problem = self._supply.problem(position)
            text = (
                f"{problem.id}: three attempts failed (a worker died, timed out, or sent a group that was refused); "
                f"it is left out (lease {position})"
            )
            self.record("alarm", {"name": "problem set aside", "text": text})

    def _report_standstill(self, now_s: float) -> None:
        waits = (
            not self._batch_taken and "rollout" not in self._dismissed and self._table.next_batch() is None
        )
        # While other workers sample, a quarantine is not what the learner waits for.
        alone = not any(peer.may_hold_leases for peer in self._roster)
        shut_out = {
            peer.name: f"quarantined, {peer.quarantine}" for peer in self._roster if peer.quarantine and alone
        }
        text = self._standstill.explain(now_s, waits=waits, shut_out=shut_out)
        if text is not None:
            self.record("log", {"level": "warning", "text": text})

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
            peer = min(willing, key=lambda peer: self._table.held_by(peer.session))
            capacity = max(min(run, peer.credits), peer.credits - reserve)
            granted = self._table.grant(peer.session, capacity, now_s)
            if not granted:
                willing.remove(peer)
                continue
            grants = wire.Grant(leases=[self._supply.lease_message(grant) for grant in granted])
            if not self._send(peer.identity, grants):
                # The grant was never sent, so it does not count as a loss of these leases.
                self._table.withdraw(granted)
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

    def _warn(self, text: str) -> None:
        """Record a warning that a peer caused. A peer can cause any number, and of any length."""
        for line in self._warnings.let_through(text, self._clock()):
            self.record("log", {"level": "warning", "text": line})

    def _send(self, identity: bytes, message: wire.Message) -> bool:
        return self._control.send(identity, wire.encode(message))
