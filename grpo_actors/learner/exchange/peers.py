"""The peers of a run: names, signs of life, offences. No socket; time is an argument."""

import hmac
import math
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_actors.progress import LOADING_S, LOST_S
from grpo_actors.wire.messages import PROTOCOL_VERSION, Beat, Hello

if TYPE_CHECKING:
    from grpo_actors.transport.access import Sender

#: A peer that is silent for this many seconds is sent a probe. If its process or its host is gone, the connection
#: turns out closed, at once or when ZeroMQ's heartbeats fail: within 12 s in all.
PROBE_S = 2.0
#: Peers send a beat every BEAT_S seconds. One that is silent for LOST_S is considered hung, and its leases go out
#: again; for one that has sent no beat yet the limit is LOADING_S: it loads its model and holds no lease.
BEAT_S = 1.0
#: A lost peer that is still silent after this many seconds is forgotten; if it wakes up, it says Hello again.
FORGET_S = 600.0
#: A peer that has sent this many messages against the protocol is banned: its messages are ignored until it says Hello
#: again. The ban ends a session, not a name: the process that replaces the peer has the same name.
MAX_OFFENCES = 10
#: Number of offenders remembered. It is bounded because a stranger can use any number of identities.
MAX_OFFENDERS = 1024
#: Shortest time over which a token rate is measured, in seconds.
RATE_S = 2.0


@dataclass(slots=True)
class Peer:
    """A worker or an evaluator, as its messages describe it."""

    #: Session token of its process.
    identity: bytes
    #: Its name and the number of its Hello. Leases belong to a session: what one holds is not the next one's.
    session: str
    #: Key and connection of its Hello.
    sender: "Sender"
    name: str
    role: str
    host: str
    pid: int
    #: Whether its process is on this host, so that its end can be noticed.
    local: bool
    #: Name of the device on which it computes; empty if it is not known.
    device: str
    last_seen_s: float
    probed_s: float = 0.0
    state: str = "joined"
    #: Why it gets no leases until it says Hello again; "": it gets some.
    quarantine: str = ""
    has_beaten: bool = False
    credits: int = 0
    version: int = -1
    #: When it was last granted leases, in seconds of the exchange's clock.
    granted_s: float = -math.inf
    groups: int = 0
    tokens: int = 0
    tokens_per_s: float = 0.0
    #: Most bytes of arrays that its process has held; None before its first beat.
    peak_bytes: int | None = None
    #: Seconds spent since the last `Roster.take_wait_share`, according to its beats.
    working_s: float = 0.0
    waiting_s: float = 0.0
    _rate_since: tuple[float, int] | None = None
    _last_beat: Beat | None = None

    @property
    def in_this_process(self) -> bool:
        """Whether it is the local worker (``rollout.workers = 0``), which is silent while the learner computes."""
        return self.local and self.pid == os.getpid()

    @property
    def may_hold_leases(self) -> bool:
        """Whether it is a worker that is neither lost nor quarantined."""
        return self.role == "rollout" and self.state != "lost" and not self.quarantine

    def record_beat(self, beat: Beat, now_s: float) -> None:
        """Update the peer from a beat."""
        self.has_beaten = True
        self.version, self.credits, self.tokens = beat.version, beat.credits, beat.tokens
        self.peak_bytes = beat.peak_bytes
        # Beats count from the start of a process. A restarted process is a new peer: its first beat is the baseline.
        last = self._last_beat or beat
        self.working_s += max(0.0, beat.working_s - last.working_s)
        self.waiting_s += max(0.0, beat.waiting_s - last.waiting_s)
        self._last_beat = beat
        since_s, before = self._rate_since or (now_s, beat.tokens)
        if now_s - since_s > RATE_S:
            self.tokens_per_s = max(0, beat.tokens - before) / (now_s - since_s)
        if self._rate_since is None or now_s - since_s > RATE_S:
            self._rate_since = (now_s, beat.tokens)

    def describe(self) -> dict[str, Any]:
        """Return the fields of a `worker` record."""
        shut_out = self.quarantine and self.state not in ("left", "lost")
        return {
            "worker": self.name,
            "role": self.role,
            "state": "quarantined" if shut_out else self.state,
            "why": self.quarantine if shut_out else None,
            "groups": self.groups,
            "tokens_per_s": round(self.tokens_per_s, 1),
            "version": self.version,
            "memory_gb": self.memory_gb,
            "device": self.device or None,
        }

    @property
    def memory_gb(self) -> float | None:
        """`peak_bytes` in GB."""
        return None if self.peak_bytes is None else self.peak_bytes / 1e9


class Roster:
    """All peers of a run, by socket identity."""

    def __init__(self, run_id: str, lost_s: float = LOST_S, evaluator_token: str = "") -> None:
        """Make an empty roster.

        Args:
            run_id: The run.
            lost_s: Longest silence of a peer that has sent a beat, in seconds.
            evaluator_token: Secret of the run's own evaluator; empty: it has none.
        """
        self._run_id = run_id
        self._evaluator_token = evaluator_token
        self._lost_s = lost_s
        self._peers: dict[bytes, Peer] = {}
        self._hellos = 0
        self._offences: dict[bytes, int] = {}

    def __iter__(self) -> Iterator[Peer]:
        """Iterate over a copy: peers may be removed meanwhile."""
        return iter(list(self._peers.values()))

    def present(self, role: str) -> Iterator[Peer]:
        """Return the peers of a role that are not lost."""
        return (peer for peer in self if peer.role == role and peer.state != "lost")

    def take_wait_share(self) -> float | None:
        """Return the share of all workers' time since the last call with nothing to sample; None if no beat came."""
        working_s = waiting_s = 0.0
        for peer in self:
            working_s, waiting_s = working_s + peer.working_s, waiting_s + peer.waiting_s
            peer.working_s = peer.waiting_s = 0.0
        return waiting_s / (working_s + waiting_s) if working_s + waiting_s else None

    def get(self, identity: bytes) -> Peer | None:
        """Return the peer that said Hello with this identity; None if there is none."""
        return self._peers.get(identity)

    def named(self, name: str) -> Peer | None:
        """Return the peer of this name; None if there is none."""
        return next((peer for peer in self if peer.name == name), None)

    def of_session(self, session: str) -> Peer | None:
        """Return the peer of a session; None if it left or was replaced."""
        return next((peer for peer in self if peer.session == session), None)

    def refusal(self, identity: bytes, hello: Hello, sender: "Sender") -> str | None:
        """Return why this Hello is refused, as text for the user who started the peer; None: accept it."""
        if hello.protocol != PROTOCOL_VERSION:
            return f"protocol {hello.protocol} there, {PROTOCOL_VERSION} here: install the same version"
        if hello.run_id and hello.run_id != self._run_id:
            return f"this is run {self._run_id}, not {hello.run_id}"
        if hello.role == "evaluator" and not self._is_evaluator(hello, sender):
            return "only the run's own evaluator, or one whose key has that role, may report scores"
        if hello.role == "rollout" and not sender.may_sample:
            return f"its key has the role {sender.role!r}, not 'worker'"
        return self._name_refusal(identity, hello.name, sender)

    def _name_refusal(self, identity: bytes, name: str, sender: "Sender") -> str | None:
        former, namesake = self.get(identity), self.named(name)
        if former is not None and former is not namesake:
            return f"this process joined as {former.name!r} already"
        if namesake is not None and not self._may_replace(namesake, identity, sender):
            return f"a live peer has the name {name!r}; choose another with --name"
        return None

    def _is_evaluator(self, hello: Hello, sender: "Sender") -> bool:
        token = self._evaluator_token
        has_token = bool(token) and hmac.compare_digest(hello.token.encode(), token.encode())
        return sender.may_evaluate or (sender.is_own and has_token)

    def _may_replace(self, peer: Peer, identity: bytes, sender: "Sender") -> bool:
        """Return whether a newcomer is the same process or holds the same listed key, or the peer is gone."""
        if peer.identity == identity:
            return True
        # The run's own key proves no more than none: all of the run's processes have it.
        same_key = not sender.is_own and peer.sender.key == sender.key
        return same_key or peer.state == "lost" or (peer.local and not process_lives(peer.pid))

    def admit(self, identity: bytes, hello: Hello, sender: "Sender", now_s: float) -> Peer:
        """Add a peer. It replaces one with the same identity: its connection was cut."""
        self._offences.pop(identity, None)
        self._hellos += 1
        # Two hosts may have the same name, so a process that is not visible here now is never watched.
        local = hello.host == socket.gethostname() and process_lives(hello.pid)
        session = f"{hello.name}#{self._hellos}"
        peer = Peer(
            *(identity, session, sender, hello.name, hello.role, hello.host, hello.pid, local, hello.device),
            last_seen_s=now_s,
        )
        self._peers[identity] = peer
        return peer

    def remove(self, peer: Peer) -> None:
        """Remove a peer."""
        self._peers.pop(peer.identity, None)

    def count_offence(self, identity: bytes) -> bool:
        """Count a message against the protocol; return whether the identity is now banned."""
        self._offences[identity] = self._offences.pop(identity, 0) + 1
        if len(self._offences) > MAX_OFFENDERS:
            del self._offences[next(iter(self._offences))]
        return self.banned(identity)

    def banned(self, identity: bytes) -> bool:
        """Return whether messages of this identity are ignored, except a Hello."""
        return self._offences.get(identity, 0) >= MAX_OFFENCES

    def to_probe(self, now_s: float) -> Iterator[Peer]:
        """Yield the peers whose connection must be probed now, and note the probe."""
        for peer in self:
            last_contact_s = max(peer.last_seen_s, peer.probed_s)
            if peer.state != "lost" and not peer.in_this_process and now_s - last_contact_s > PROBE_S:
                peer.probed_s = now_s
                yield peer

    def find_lost(self, now_s: float) -> Iterator[tuple[Peer, str]]:
        """Yield the peers that are newly lost, and why; remove dead local ones and those silent for `FORGET_S`."""
        for peer in self:
            if peer.in_this_process:
                continue
            silent_s = now_s - peer.last_seen_s
            if peer.local and not process_lives(peer.pid):
                self.remove(peer)
                if peer.state != "lost":
                    yield peer, "its process ended"
            elif peer.state != "lost" and silent_s > (self._lost_s if peer.has_beaten else LOADING_S):
                yield peer, f"silent for {silent_s:.0f} s"
            elif peer.state == "lost" and silent_s > FORGET_S:
                self.remove(peer)


def process_lives(pid: int) -> bool:
    """Return whether a process with this id runs on this host."""
    try:
        os.kill(pid, 0)
        # A killed process answers the signal until its parent, perhaps a busy shell, reaps it: a zombie, state Z.
        # Without the file this is not Linux.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except ProcessLookupError:
        return False
    except OSError:
        return True
