"""Who takes part in a run: names, signs of life, offences. No socket; time comes in as an argument."""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_actors.wire.messages import PROTOCOL_VERSION, Beat, Hello

#: A peer that is silent for this time is sent something: should its process or its host be gone, the
#: connection is, at once or when ZeroMQ's heartbeats fail, within 12 s in all.
PROBE_S = 2.0
#: Peers beat this often; one that is silent for LOST_S is taken for hung, and its leases go out again.
#: A first step on a GPU may compile for a minute. GRPO_ACTORS_LOST_S overrides it.
BEAT_S = 1.0
LOST_S = float(os.environ.get("GRPO_ACTORS_LOST_S", "120"))
#: A peer that has not beaten yet loads its model, perhaps from the hub; it holds no lease.
LOADING_S = 600.0
#: A lost peer that is still silent after this time is forgotten; should it wake, it says Hello anew.
FORGET_S = 600.0
#: A peer that sends this many messages against the protocol is not listened to any more.
MAX_OFFENCES = 10
#: Offenders that are remembered: a stranger has as many identities as it likes.
MAX_OFFENDERS = 1024
#: Shortest time over which a rate is taken.
RATE_S = 2.0


@dataclass(slots=True)
class Peer:
    """A worker or an evaluator, as its own messages describe it."""

    identity: bytes
    name: str
    role: str
    host: str
    pid: int
    #: Its process can be seen from here.
    local: bool
    last_seen_s: float
    probed_s: float = 0.0
    state: str = "joined"
    beaten: bool = False
    credits: int = 0
    version: int = -1
    groups: int = 0
    tokens: int = 0
    tokens_per_s: float = 0.0
    #: Seconds since `Roster.take_wait_share` was last called, as far as its beats have told.
    working_s: float = 0.0
    waiting_s: float = 0.0
    _rate_since: tuple[float, int] | None = None
    _last_beat: Beat | None = None

    @property
    def inside(self) -> bool:
        """It lives in this very process (``rollout.workers = 0``), and is silent while the learner computes."""
        return self.local and self.pid == os.getpid()

    @property
    def works(self) -> bool:
        """It may hold leases."""
        return self.role == "rollout" and self.state != "lost"

    def count(self, beat: Beat, now_s: float) -> None:
        """Take over what a beat says."""
        self.beaten = True
        self.version, self.credits, self.tokens = beat.version, beat.credits, beat.tokens
        # A process that was started again counts from 0, and is another peer: its first beat is where to count from.
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
        """The fields of a `worker` record."""
        return {
            "worker": self.name,
            "role": self.role,
            "state": self.state,
            "groups": self.groups,
            "tokens_per_s": round(self.tokens_per_s, 1),
            "version": self.version,
        }


class Roster:
    """All peers, by identity."""

    def __init__(self, run_id: str, lost_s: float = LOST_S) -> None:
        """`lost_s`: the longest silence of a peer that works, in seconds."""
        self._run_id = run_id
        self._lost_s = lost_s
        self._peers: dict[bytes, Peer] = {}
        self._offences: dict[bytes, int] = {}

    def __iter__(self) -> Iterator[Peer]:
        """Over a copy: peers may leave meanwhile."""
        return iter(list(self._peers.values()))

    def present(self, role: str) -> Iterator[Peer]:
        """Peers of a role that are not lost."""
        return (peer for peer in self if peer.role == role and peer.state != "lost")

    def take_wait_share(self) -> float | None:
        """Share of all workers' time since the last call in which they had nothing to sample; None: nobody told."""
        working_s = waiting_s = 0.0
        for peer in self:
            working_s, waiting_s = working_s + peer.working_s, waiting_s + peer.waiting_s
            peer.working_s = peer.waiting_s = 0.0
        return waiting_s / (working_s + waiting_s) if working_s + waiting_s else None

    def get(self, identity: bytes) -> Peer | None:
        """The peer that said Hello under this identity."""
        return self._peers.get(identity)

    def refusal(self, identity: bytes, hello: Hello) -> str | None:
        """Why this Hello is refused, in words for who started the peer; None: welcome."""
        if hello.protocol != PROTOCOL_VERSION:
            return f"protocol {hello.protocol} there, {PROTOCOL_VERSION} here: install the same version"
        if hello.run_id and hello.run_id != self._run_id:
            return f"this is run {self._run_id}, not {hello.run_id}"
        if hello.name.encode() != identity:
            return f"the name {hello.name!r} is not the identity of its socket"
        return None

    def admit(self, identity: bytes, hello: Hello, now_s: float) -> Peer:
        """Enter a peer. One of the same name is replaced: its process was started again, or its link cut."""
        former = self._peers.get(identity)
        if former is None or (former.host, former.pid) != (hello.host, hello.pid):
            self._offences.pop(identity, None)
        # Two hosts may have one name: a process that cannot be seen now is not watched later.
        local = hello.host == socket.gethostname() and process_lives(hello.pid)
        peer = Peer(identity, hello.name, hello.role, hello.host, hello.pid, local, now_s)
        self._peers[identity] = peer
        return peer

    def remove(self, peer: Peer) -> None:
        """Forget a peer."""
        self._peers.pop(peer.identity, None)

    def offend(self, identity: bytes) -> bool:
        """Count a message against the protocol; True: it was the last that is borne."""
        self._offences[identity] = self._offences.pop(identity, 0) + 1
        if len(self._offences) > MAX_OFFENDERS:
            del self._offences[next(iter(self._offences))]
        return self.banned(identity)

    def banned(self, identity: bytes) -> bool:
        """Whether this identity is not listened to any more."""
        return self._offences.get(identity, 0) >= MAX_OFFENCES

    def silent(self, now_s: float) -> Iterator[Peer]:
        """Peers whose connection is to be tried now."""
        for peer in self:
            heard_s = max(peer.last_seen_s, peer.probed_s)
            if peer.state != "lost" and not peer.inside and now_s - heard_s > PROBE_S:
                peer.probed_s = now_s
                yield peer

    def gone(self, now_s: float) -> Iterator[tuple[Peer, str]]:
        """Peers that must be taken for lost, and why."""
        for peer in self:
            if peer.inside:
                continue
            silent_s = now_s - peer.last_seen_s
            if peer.local and not process_lives(peer.pid):
                self.remove(peer)
                if peer.state != "lost":
                    yield peer, "its process ended"
            elif peer.state != "lost" and silent_s > (self._lost_s if peer.beaten else LOADING_S):
                yield peer, f"silent for {silent_s:.0f} s"
            elif peer.state == "lost" and silent_s > FORGET_S:
                self.remove(peer)


def process_lives(pid: int) -> bool:
    """Whether a process of this number runs on this host."""
    try:
        os.kill(pid, 0)
        # One that was killed answers until its parent, perhaps a busy shell, has taken note. No such file: no Linux.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except ProcessLookupError:
        return False
    except OSError:
        return True
