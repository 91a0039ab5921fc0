"""Attendance: who takes part in the run. Lets peers in, parts from them, and tells of both in the journal.

`peers` decides who may join and who is lost. A peer that goes gives its leases back (`lease_desk`).
"""

from collections.abc import Callable, Iterator
from typing import Any

from grpo_actors.learner.exchange.lease_desk import LeaseDesk
from grpo_actors.learner.exchange.notices import Notices
from grpo_actors.learner.exchange.peers import MAX_OFFENCES, Peer, Roster
from grpo_actors.observe.sinks import Journal
from grpo_actors.transport.access import Sender
from grpo_actors.transport.control import ControlServer
from grpo_actors.wire import messages as wire


class Attendance:
    """The peers of one run as they come and go."""

    def __init__(
        self,
        *,
        control: ControlServer,
        journal: Journal,
        roster: Roster,
        desk: LeaseDesk,
        notices: Notices,
        welcome: wire.Welcome,
        clock: Callable[[], float],
    ) -> None:
        self._control = control
        self._journal = journal
        self._roster = roster
        self._desk = desk
        self._notices = notices
        self._welcome = welcome
        self._clock = clock
        self._published = -1  # the newest version that workers can fetch
        self._dismissed: dict[str, str] = {}  # role -> reason for which its peers must leave

    # --- joining ----------------------------------------------------------------------------------

    def greet(self, identity: bytes, hello: wire.Hello, sender: Sender) -> None:
        """Let a peer join, or tell it why it may not."""
        former = self._roster.named(hello.name)
        if former is not None and former.state != "lost" and not self._reaches(former):
            self.mark_lost(former, "its connection is closed")
        refusal = self._roster.refusal(identity, hello, sender)
        if refusal is not None:
            self._notices.warn(f"{hello.name} on {hello.host} was refused: {refusal}")
            self._send(identity, wire.Bye(reason=refusal))
            return
        if hello.role in self._dismissed:
            self._send(identity, wire.Bye(reason=self._dismissed[hello.role], dismissed=True))
            return
        if former is not None:
            # Its process was started again, or its connection was cut: the peer no longer holds its earlier leases.
            self._desk.hand_back(former)
            if former.identity != identity:
                self._send(former.identity, wire.Bye(reason="another process took its name"))
                self._roster.remove(former)
        peer = self._roster.admit(identity, hello, sender, self._clock())
        self._send(identity, self._welcome)
        self._set_state(peer, "joined")

    def recognise(self, identity: bytes, sender: Sender) -> Peer | None:
        """Return the peer that sent a message, which is a sign of life; None: it must say Hello, and is told so."""
        peer = self._roster.get(identity)
        if peer is None or peer.sender.key != sender.key:
            # The learner was restarted while this peer was running.
            self._send(identity, wire.Bye(reason="say Hello again", again=True))
            return None
        peer.last_seen_s = self._clock()
        if peer.state == "lost":
            self._set_state(peer, "joined")
        return peer

    def note_beat(self, peer: Peer, beat: wire.Beat) -> None:
        """Take over what a beat says about its peer; answer with what the peer may have missed."""
        peer.record_beat(beat, self._clock())
        if beat.state in ("sampling", "waiting") and peer.state != beat.state:
            self._set_state(peer, beat.state)
        self._desk.reconcile(peer, beat.holding, self._clock())
        if peer.role in self._dismissed:
            self._send_away(peer)
        elif peer.role == "rollout" and self._published >= 0:
            self._send(peer.identity, wire.Announcement(version=self._published))

    def announce(self, version: int) -> None:
        """Tell the workers, and the evaluator, that there is a new version of the weights."""
        self._published = version
        for peer in self._roster:
            if peer.may_hold_leases or (peer.role == "evaluator" and peer.state != "lost"):
                self._send(peer.identity, wire.Announcement(version=version))

    # --- going ------------------------------------------------------------------------------------

    def note_goodbye(self, peer: Peer) -> None:
        """Part from a peer that leaves."""
        self._desk.hand_back(peer)
        self._set_state(peer, "left")
        self._roster.remove(peer)

    def dismiss(self, role: str, reason: str) -> None:
        """Make all peers of a role leave, and any peer of this role that joins later."""
        self._dismissed[role] = reason
        for peer in self._roster:
            if peer.role == role:
                self._send_away(peer)

    def _send_away(self, peer: Peer) -> None:
        self._send(peer.identity, wire.Bye(reason=self._dismissed[peer.role], dismissed=True))

    def is_dismissed(self, role: str) -> bool:
        """Return whether the peers of a role must leave."""
        return role in self._dismissed

    def awaits_goodbyes(self) -> bool:
        """Return whether a dismissed peer has not left yet; the local worker, in this process, does not count."""
        return any(
            not peer.in_this_process for role in self._dismissed for peer in self._roster.present(role)
        )

    def count_offence(self, identity: bytes, reason: str) -> None:
        """Count a message against the protocol; part from a peer that has sent too many."""
        peer = self._roster.get(identity)
        name = "a stranger" if peer is None else peer.name  # the identity itself is a secret
        self._notices.warn(f"{name}: {reason}")
        self._notices.blame(name, reason)
        if not self._roster.count_offence(identity):
            return
        why = f"{MAX_OFFENCES} messages against the protocol, the last: {reason}"
        self._send(identity, wire.Bye(reason=why))
        if peer is not None:
            self._notices.blame(peer.name, f"dropped after {why}")
            self._drop(peer, why)

    def isolate(self, session: str, reason: str) -> None:
        """Quarantine a worker: it gets no more leases, and its groups that have not trained are sampled again."""
        peer = self._roster.of_session(session)
        # The worker in this process samples with the learner's own policy.
        if peer is None or peer.in_this_process:
            return
        self._desk.distrust(peer)
        peer.quarantine = reason
        text = f"{peer.name} gets no more leases: {reason}; start it again"
        self._notices.alarm("worker quarantined", text, self._desk.version)
        self._journal.append("worker", peer.describe())

    # --- signs of life ----------------------------------------------------------------------------

    def call_the_roll(self, now_s: float) -> None:
        """Probe the silent peers; part from those whose key was revoked or that are lost."""
        for peer in self._roster.to_probe(now_s):
            if not self._reaches(peer):
                self.mark_lost(peer, "its connection is closed")
        for peer in self._roster:
            if not self._control.admits(peer.sender):
                self._drop(peer, "its key was revoked")
                self._control.cut(peer.sender)
        for peer, why in self._roster.find_lost(now_s):
            self.mark_lost(peer, why)

    def mark_lost(self, peer: Peer, why: str) -> None:
        """Record that a peer is gone without a word; it may come back."""
        self._set_state(peer, "lost", why=why)
        self._desk.release(peer)

    def _drop(self, peer: Peer, why: str) -> None:
        """Part from a peer. This is no loss of its leases: the problems are not why it goes."""
        self._desk.hand_back(peer)
        self._set_state(peer, "lost", why=why)
        self._roster.remove(peer)

    def _reaches(self, peer: Peer) -> bool:
        """Return whether a peer is connected: send it a message that changes nothing."""
        probe = wire.Announcement(version=max(0, self._published))
        return self._control.reaches(peer.identity, wire.encode(probe))

    def workers(self) -> Iterator[Peer]:
        """Return the workers that may get leases."""
        if self.is_dismissed("rollout"):
            return iter(())
        return (peer for peer in self._roster if peer.may_hold_leases)

    def _set_state(self, peer: Peer, state: str, **more: Any) -> None:
        """Set the state of a peer, and record it; a change between sampling and waiting is not recorded."""
        is_event = state in ("joined", "left", "lost") or peer.state in ("joined", "lost")
        peer.state = state
        if is_event:
            self._journal.append("worker", {**peer.describe(), **more})

    def _send(self, identity: bytes, message: wire.Message) -> None:
        self._control.send(identity, wire.encode(message))
