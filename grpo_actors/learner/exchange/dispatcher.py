"""The dispatcher: the exchange thread's work. It reads what arrives, and answers the learner's requests.

Each message goes to whom it concerns, who answers it:

    attendance   who takes part
    lease_desk   leases out, groups in
    evaluations  scores

The decisions behind them are in `schedule`, `peers`, `supply`, `selection`, `quarantine` and `standstill`. One thread owns a
Dispatcher.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_actors.errors import ProtocolError
from grpo_actors.learner.exchange.attendance import Attendance
from grpo_actors.learner.exchange.evaluations import Evaluations
from grpo_actors.learner.exchange.lease_desk import LeaseDesk
from grpo_actors.learner.exchange.notices import Notices
from grpo_actors.learner.exchange.peers import Roster
from grpo_actors.learner.exchange.selection import Selection
from grpo_actors.learner.exchange.supply import Supply
from grpo_actors.learner.groups import SampledGroup
from grpo_actors.observe.sinks import Journal
from grpo_actors.rundir.checkpoints import Snapshot
from grpo_actors.schedule.leases import LeaseTable
from grpo_actors.schedule.quarantine import Gap, Quarantine
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
        self._selection = selection
        self._quarantine = quarantine
        self._clock = clock
        self._roster = Roster(welcome.run_id, lost_s, evaluator_token)
        self._notices = Notices(journal, clock)
        self._evaluations = Evaluations()
        self._desk = LeaseDesk(
            table=table,
            supply=supply,
            selection=selection,
            notices=self._notices,
            send=lambda peer, message: control.send(peer.identity, wire.encode(message)),
        )
        self._attendance = Attendance(
            control=control,
            journal=journal,
            roster=self._roster,
            desk=self._desk,
            notices=self._notices,
            welcome=welcome,
            clock=clock,
        )
        self._next_tick_s = 0.0

    # --- the learner's requests -------------------------------------------------------------------

    def consume(self, leases: Sequence[int], gaps: Mapping[int, Sequence[Gap]]) -> None:
        """Consume these leases: their groups produced the next version, which may be published a while later.

        A worker that is quarantined for its `gaps` loses its leases before another batch is taken.
        """
        if not leases:
            return
        measured = [
            (self._desk.session_of(lease), gap) for lease, of_lease in gaps.items() for gap in of_lease
        ]
        self._notices.alarm_of_update = None
        self._desk.consume(leases)
        for session, reason in self._quarantine.judge(measured).items():
            self._attendance.isolate(session, reason)

    def publish(self, manifest: wire.Manifest, data: memoryview) -> None:
        """Serve this version to the workers, and announce it."""
        self._weights.publish(manifest.version, wire.encode(manifest), data, manifest.chunk_bytes)
        self._attendance.announce(manifest.version)
        fields = {"version": manifest.version, "bytes": manifest.size, "digest": manifest.digest}
        self.record("policy", fields)

    def next_batch(self) -> list[SampledGroup] | None:
        """Return the groups of the next update once all have arrived, else None (`LeaseDesk.next_batch`)."""
        return self._desk.next_batch()

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
        return Snapshot(self._desk.cursor, self._journal.seq, success_rates=rates)

    def take_evaluations(self) -> list[wire.Evaluation | wire.Unscored]:
        """Return the evaluations that arrived since the last call."""
        return self._evaluations.take()

    def take_tokens(self) -> int:
        """Return the number of sampled tokens in the groups that arrived since the last call."""
        return self._desk.take_tokens()

    def alarm(self) -> str | None:
        """Return name and text of the alarm that the last update raised; None: it raised none."""
        return self._notices.alarm_of_update

    def evaluator_present(self) -> bool:
        """Return whether an evaluator takes part."""
        return any(self._roster.present("evaluator"))

    def dismiss(self, role: str, reason: str) -> None:
        """Make all peers of a role leave, and any peer of this role that joins later."""
        self._attendance.dismiss(role, reason)

    def awaits_goodbyes(self) -> bool:
        """Return whether a dismissed peer has not left yet (`Attendance.awaits_goodbyes`)."""
        return self._attendance.awaits_goodbyes()

    # --- one turn ---------------------------------------------------------------------------------

    def turn(self) -> None:
        """Do everything that can be done now; never wait."""
        self._weights.serve()
        for identity, data, sender in self._control.receive():
            self._receive(identity, data, sender)
        now_s = self._clock()
        if now_s >= self._next_tick_s:
            self._next_tick_s = now_s + TICK_S
            self._attendance.call_the_roll(now_s)
            self._desk.expire(now_s)
            self._explain_standstill(now_s)
        for peer in self._desk.grant(self._attendance.workers(), now_s):
            self._attendance.mark_lost(peer, "its connection is closed or full")

    def _receive(self, identity: bytes, data: bytes, sender: Sender) -> None:
        banned = self._roster.banned(identity)
        if banned and len(data) > MAX_HELLO_BYTES:
            return
        try:
            message = wire.decode(wire.from_peer, data)
            if isinstance(message, wire.Hello):
                self._attendance.greet(identity, message, sender)
            elif not banned:
                self._handle(identity, message, sender)
        except ProtocolError as error:
            if not banned:
                self._attendance.count_offence(identity, str(error))

    def _handle(self, identity: bytes, message: wire.FromPeer, sender: Sender) -> None:
        peer = self._attendance.recognise(identity, sender)
        if peer is None:
            return
        match message:
            case wire.Beat():
                self._attendance.note_beat(peer, message)
            case wire.Group() if peer.role == "rollout":
                self._desk.take_group(peer, message)
            case wire.Evaluation() | wire.Unscored() if peer.role == "evaluator":
                self._evaluations.add(message, self._desk.version)
            case wire.Bye():
                self._attendance.note_goodbye(peer)
            case _:
                raise ProtocolError(f"{type(message).__name__} from a peer whose role is {peer.role}")

    def _explain_standstill(self, now_s: float) -> None:
        waits = self._desk.awaits_groups and not self._attendance.is_dismissed("rollout")
        # While other workers sample, a quarantine is not what the learner waits for.
        alone = not any(peer.may_hold_leases for peer in self._roster)
        shut_out = {
            peer.name: f"quarantined, {peer.quarantine}" for peer in self._roster if peer.quarantine and alone
        }
        self._notices.explain_standstill(now_s, waits=waits, shut_out=shut_out)
