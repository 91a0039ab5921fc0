"""Who may use a run's sockets: with keys, the holders of listed ones, each for what its role may do.

ZeroMQ asks once, when a connection begins (ZAP). A connection would outlive the revocation of its key, so the key of
every message is looked up again (`sender`), and connections that only listen are looked through from time to time
(`may`). pyzmq's authenticator answers ZeroMQ; its own list of certificates is not used, because it is read once, knows
no roles, and an empty folder would have to be told from a missing one.

Without keys (Unix sockets in a private folder, or ``transport.insecure``) everybody who can connect may do everything
but report scores, for which the run's evaluator has a token of its own (`wire.messages.Hello`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import zmq
from zmq.auth.thread import ThreadAuthenticator

from grpo_actors.errors import RunError
from grpo_actors.transport.keys import RUN_ROLE, ClientKey, KeyFolder
from grpo_actors.transport.sockets import Context

#: Socket -> roles of the keys that may connect to it.
MAY_USE = {
    "control": frozenset({RUN_ROLE, "worker", "evaluator"}),
    "weights": frozenset({RUN_ROLE, "worker"}),
    "events": frozenset({RUN_ROLE, "reader"}),
}


#: Most bytes that ZeroMQ adds to a message: two frame heads, and encryption.
ADDED_BYTES = 128


@dataclass(frozen=True, slots=True)
class Sender:
    """Who sent a message: its connection's key and role, both empty without keys, and the connection's descriptor."""

    key: str = ""
    role: str = ""
    descriptor: int = -1

    @property
    def is_own(self) -> bool:
        """Whether it may be one of the run's own processes: it has the run's key, or no keys are asked for."""
        return self.role in ("", RUN_ROLE)

    @property
    def may_sample(self) -> bool:
        """Whether it may be a worker."""
        return self.is_own or self.role == "worker"

    @property
    def may_evaluate(self) -> bool:
        """Whether its key alone makes it an evaluator."""
        return self.role == "evaluator"


class Access:
    """The rules of one run's sockets."""

    def __init__(self, folder: KeyFolder | None = None, run_key: ClientKey | None = None) -> None:
        """Read the learner's key. `folder`: None: no keys are asked for. `run_key`: the key of the run's own processes.

        Raises:
            RunError: a key file is damaged or readable by others, or this ZeroMQ cannot encrypt.
        """
        self._folder = folder
        self._run_key = run_key
        self._secret = b""
        #: State of the list, and public key -> role as it was then. One value: two threads replace it.
        self._list: tuple[tuple[int, ...] | None, dict[str, str]] = (None, {})
        #: Descriptor of a connection -> bytes of the messages that it delivered, with what ZeroMQ adds to each.
        self.delivered: dict[int, int] = {}
        if folder is not None:
            check_curve()
            self._secret = folder.learner()[1].encode()
            folder.listed()

    def options(self, socket: str) -> list[tuple[int, int | bytes]]:
        """Return the options of the binding socket of this name (see `MAY_USE`)."""
        if self._folder is None:
            return []
        return [
            (zmq.CURVE_SERVER, 1),
            (zmq.CURVE_SECRETKEY, self._secret),
            (zmq.ZAP_DOMAIN, socket.encode()),
        ]

    @contextmanager
    def enforced(self, context: Context) -> Iterator[None]:
        """Answer ZeroMQ's questions about new connections of this context within the block; bind within it only."""
        if self._folder is None:
            yield
            return
        authenticator = ThreadAuthenticator(context)
        authenticator.start()
        try:
            for socket in MAY_USE:
                authenticator.configure_curve_callback(socket, self)
            yield
        finally:
            authenticator.stop()

    def callback(self, domain: str, key: bytes) -> bool:
        """Return whether a connection with this key to the socket `domain` is let in; pyzmq calls it in its thread."""
        return self.may(key.decode(), domain)

    def may(self, key: str, socket: str) -> bool:
        """Return whether the holder of a key may use a socket now."""
        return self._folder is None or self._role(key) in MAY_USE[socket]

    def sender(self, frame: zmq.Frame, socket: str) -> Sender | None:
        """Return who sent a message that arrived at a socket, by one of its frames; None: its key was revoked."""
        descriptor = int(frame.get(zmq.SRCFD))
        self.delivered[descriptor] = self.delivered.get(descriptor, 0) + len(frame) + ADDED_BYTES
        if self._folder is None:
            return Sender(descriptor=descriptor)
        key = str(frame.get("User-Id"))
        role = self._role(key)
        return Sender(key, role, descriptor) if role in MAY_USE[socket] else None

    def _role(self, key: str) -> str:
        assert self._folder is not None
        if self._run_key is not None and key == self._run_key.public:
            return RUN_ROLE
        state = self._folder.state()
        known_state, roles = self._list
        if state != known_state:
            try:
                listed = self._folder.listed()
            except RunError:  # damaged while the run lives: nobody is let in until it is repaired
                listed = {}
            roles = {public: entry.role for public, entry in listed.items()}
            self._list = state, roles
        return roles.get(key, "")


def check_curve() -> None:
    """Check that this ZeroMQ can encrypt.

    Raises:
        RunError: it was built without CURVE.
    """
    if not zmq.has("curve"):
        raise RunError(
            "transport: this pyzmq was built without CURVE, so TCP has no keys; install its wheel from PyPI, use "
            'scheme = "ipc", or set transport.insecure = true on a network you trust'
        )
