"""Addresses and options that all sockets of a run share.

Measured with libzmq 4.3.5; these are the reasons for the options below:

- An option set after ``connect`` or ``bind`` silently has no effect on that address, so all are set before.
- Without IMMEDIATE a message to a dead peer seems sent. With it, messages that have arrived but were not read are lost
  when the connection is cut, so a sender that needs an effect repeats its message.
- When a peer takes over an identity (HANDOVER), the old owner stays connected but can neither send nor receive, and gets
  no event. Only the answers to its beats show a peer that it is still the owner.
- A message carries its connection's descriptor (SRCFD) and, with keys, its key (User-Id); see `cut` and `access`.
- A frame above MAXMSGSIZE ends the connection. A binding socket continues and its peer reconnects; a connecting socket
  never comes back. So no sender may exceed the receiver's bound.
- A second ipc bind on one path steals it; the lock on the run folder prevents that.
"""

import contextlib
import errno
import hashlib
import json
import os
import shlex
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import zmq

from grpo_actors.atomic import write_whole
from grpo_actors.errors import RunError
from grpo_actors.invocation import SCRIPT, pasted
from grpo_actors.rundir.folder import ENDPOINTS_FILE
from grpo_actors.transport.limits import MAX_MESSAGE_BYTES

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]

#: Largest control message in bytes.
CONTROL_BYTES = MAX_MESSAGE_BYTES
#: Bytes per chunk of a version: 1 to 4 MiB are the fastest.
CHUNK_BYTES = 2**21

#: Least bound on the frames of a bound socket: those of an encrypted handshake have up to 400 bytes.
LEAST_FRAME_BYTES = 2**10

HANDSHAKE_TIMEOUT_S = 5.0
#: ZeroMQ's own heartbeats detect a dead host, but not a hung Python loop.
HEARTBEAT_S = 2.0
HEARTBEAT_TIMEOUT_S = 10.0
RECONNECT_FIRST_S = 0.1
#: Workers try to connect before the learner has loaded its model: a longer interval would delay the start as much.
RECONNECT_LONGEST_S = 0.2
#: Messages per queue; few, because the largest may have 64 MiB.
QUEUED = 100

PARTS = ("control", "weights", "events")

#: Added to the path of a Unix socket: where it is bound behind its gate (`gate`).
INNER = "~"
#: Longest path of a Unix socket in bytes: the limit of the kernel's address structure.
MAX_IPC_PATH = 103 if sys.platform == "darwin" else 107


# --- addresses ---


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Addresses at which a run listens. RUN/endpoints.json holds them, so that `--attach RUN_DIR` needs no address."""

    control: str
    weights: str
    events: str
    pid: int
    #: Folder of the run's CUDA MPS; empty if it has none.
    mps: str = ""
    #: The learner's session, which its records name too.
    session: str = ""
    #: The command that adds a worker from another host; empty if no other host can reach the run.
    join: str = ""

    @property
    def how_to_join(self) -> str:
        """Return `join`, and as a comment of the shell where its key file comes from."""
        made = f"  # FILE: {pasted('keys', 'new', 'NAME')}" if "--key" in self.join else ""
        return f"{self.join}{made}"

    def __post_init__(self) -> None:
        for name, kind in type(self).__annotations__.items():
            if type(getattr(self, name)) is not kind:
                raise TypeError(f"{name} must be {kind.__name__}")

    def write(self, run_dir: Path) -> None:
        """Write the file in the run folder, whole or not at all."""
        write_whole(run_dir / ENDPOINTS_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, run_dir: Path) -> "Endpoints":
        """Read the endpoints of the run in `run_dir`.

        Raises:
            RunError: there is no run, or it is over.
        """
        path = run_dir / ENDPOINTS_FILE
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            raise RunError(
                f"{run_dir}: no run is live here ({ENDPOINTS_FILE} not found); start it with grpo train"
            ) from None
        except (ValueError, TypeError) as error:
            raise RunError(f"{path}: unreadable ({error}); start the run anew, or give its address") from None


def plan_endpoints(
    run_dir: Path, scheme: str, host: str, port: int, *, keys: bool = False, options: Sequence[str] = ()
) -> Endpoints:
    """Choose the three addresses of a run, without binding them.

    ipc sockets are in a folder of mode 0700 under the system's temporary folder, whose name is derived from the run
    folder's path: that path itself may be longer than the path of a Unix socket can be. `keys`: whether peers need one. `options`:
    what else a worker's command needs.

    Raises:
        RunError: the folder for the sockets cannot be created, or no port is free.
    """
    if scheme == "ipc":
        folder = _private_folder(run_dir)
        control, weights, events = (f"ipc://{folder}/{part}" for part in PARTS)
        return Endpoints(control, weights, events, pid=os.getpid())
    first = port or _free_port(host)
    control, weights, events = (f"tcp://{_bracketed(host)}:{first + i}" for i in range(len(PARTS)))
    # An address that stands for all of this host's is none that another host could connect to.
    reached = _bracketed(socket.gethostname() if host in ("0.0.0.0", "::", "[::]") else host)  # noqa: S104
    command = [SCRIPT, "worker", "--connect", f"tcp://{reached}:{first}"]
    command += [*(["--key", "FILE"] if keys else []), *options]
    return Endpoints(control, weights, events, pid=os.getpid(), join=shlex.join(command))


def _bracketed(host: str) -> str:
    return f"[{host.strip('[]')}]" if ":" in host else host


def remove_endpoints(run_dir: Path, endpoints: Endpoints) -> None:
    """Remove the endpoints file, the socket files and their folder."""
    (run_dir / ENDPOINTS_FILE).unlink(missing_ok=True)
    for endpoint in (endpoints.control, endpoints.weights, endpoints.events):
        if endpoint.startswith("ipc://"):
            path = Path(endpoint.removeprefix("ipc://"))
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}{INNER}").unlink(missing_ok=True)
            # It may have gone, or hold something of another run.
            with contextlib.suppress(OSError):
                path.parent.rmdir()


def reachable_endpoint(endpoint: str, reached: str) -> str:
    """Return the address of `endpoint` for a peer that reaches another socket of the same run at `reached`.

    The learner may listen on every address (0.0.0.0) or behind a forwarded port: only the peer knows a name that works.
    """
    if not (endpoint.startswith("tcp://") and reached.startswith("tcp://")):
        return endpoint
    return f"{reached.rpartition(':')[0]}:{endpoint.rpartition(':')[2]}"


def check_ports(host: str, first: int) -> None:
    """Check that three consecutive ports are free.

    Raises:
        RunError: one is not; the message names it.
    """
    with contextlib.ExitStack() as stack:
        for port in range(first, first + len(PARTS)):
            try:
                _bind_port(stack, host, port)
            except OSError as error:
                raise RunError(
                    f"transport.port: tcp://{host}:{port} cannot be bound ({error.strerror}); a run needs three ports "
                    "from transport.port on; choose others, or 0 to have free ones chosen"
                ) from None


def _private_folder(run_dir: Path) -> Path:
    name = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"grpo-{os.getuid()}-{name}"
    longest = max(len(os.fsencode(folder / f"{part}{INNER}")) for part in PARTS)
    if longest > MAX_IPC_PATH:
        raise RunError(
            f"{folder}: too long for sockets ({longest} characters with their names, at most {MAX_IPC_PATH}); "
            "set TMPDIR to a shorter folder, or transport.scheme = 'tcp'"
        )
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        # Do not follow a symbolic link: another user may have put one there.
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise RunError(f"{folder}: is no folder of this user's; remove it or set TMPDIR")
        folder.chmod(0o700)
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be made ({error.strerror}); set TMPDIR to a folder you may write to"
        ) from None
    return folder


def _free_port(host: str) -> int:
    """Return the first of three consecutive free ports."""
    for _ in range(50):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, OverflowError):
            first = _bind_port(stack, host, 0)
            for offset in range(1, len(PARTS)):
                _bind_port(stack, host, first + offset)
            return first
    raise RunError(
        f"transport: no three consecutive free ports on {host}; set transport.port or transport.host"
    )


def _bind_port(stack: contextlib.ExitStack, host: str, port: int) -> int:
    """Bind a port (0: any) until `stack` is closed, and return its number."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    probe = stack.enter_context(socket.socket(family))
    # ZeroMQ binds the same way: a port whose last connection has just closed counts as free.
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind((host.strip("[]"), port))
    number: int = probe.getsockname()[1]
    return number


# --- options ---


def bind(
    context: Context,
    kind: int,
    endpoint: str,
    max_bytes: int,
    options: Iterable[tuple[int, int | bytes]] = (),
) -> Socket:
    """Bind a socket that accepts frames of at most `max_bytes`.

    Raises:
        RunError: the address is in use, too long or invalid.
    """
    bound = _open(context, kind, endpoint, max_bytes)
    if kind == zmq.ROUTER:
        # MANDATORY: a send to a peer that left is an error instead of silence. HANDOVER: a worker that reconnects under
        # its name replaces its dead connection.
        bound.setsockopt(zmq.ROUTER_MANDATORY, 1)
        bound.setsockopt(zmq.ROUTER_HANDOVER, 1)
    for option, value in options:
        bound.setsockopt(option, value)
    try:
        bound.bind(endpoint)
    except zmq.ZMQError as error:
        bound.close()
        raise RunError(_bind_failure(endpoint, error)) from None
    return bound


def connect(
    context: Context,
    kind: int,
    endpoint: str,
    max_bytes: int,
    options: Iterable[tuple[int, int | bytes]] = (),
    *,
    before: Callable[[Socket], object] = lambda _: None,
) -> Socket:
    """Return a socket that connects as soon as `endpoint` is bound, and reconnects by itself without limit.

    `before` is called with the socket before it connects.

    Raises:
        RunError: `endpoint` is not a valid address.
    """
    connected = _open(context, kind, endpoint, max_bytes)
    # Only this end sends heartbeats, and its TTL makes the other end notice its silence. A bound socket that sends them is
    # aborted by libzmq (4.3.5, "!_io_error") if a peer closes while more of its messages wait than the queue holds.
    connected.setsockopt(zmq.HEARTBEAT_IVL, _ms(HEARTBEAT_S))
    connected.setsockopt(zmq.HEARTBEAT_TIMEOUT, _ms(HEARTBEAT_TIMEOUT_S))
    connected.setsockopt(zmq.HEARTBEAT_TTL, _ms(HEARTBEAT_TIMEOUT_S))
    connected.setsockopt(zmq.RECONNECT_IVL, _ms(RECONNECT_FIRST_S))
    connected.setsockopt(zmq.RECONNECT_IVL_MAX, _ms(RECONNECT_LONGEST_S))
    if kind == zmq.DEALER:
        # Queue only on an established connection; otherwise a message to a dead learner seems sent.
        connected.setsockopt(zmq.IMMEDIATE, 1)
    for option, value in options:
        connected.setsockopt(option, value)
    before(connected)
    try:
        connected.connect(endpoint)
    except zmq.ZMQError as error:
        connected.close()
        raise RunError(
            f"{endpoint} is no address to connect to ({_reason(error)}); "
            "give one like ipc:///path/to/socket or tcp://host:port"
        ) from None
    return connected


def _open(context: Context, kind: int, endpoint: str, max_bytes: int) -> Socket:
    opened = context.socket(kind)
    for option, value in (
        (zmq.LINGER, 0),
        (zmq.MAXMSGSIZE, max_bytes),
        (zmq.HANDSHAKE_IVL, _ms(HANDSHAKE_TIMEOUT_S)),
        (zmq.SNDHWM, QUEUED),
        (zmq.RCVHWM, QUEUED),
        (zmq.IPV6, int("[" in endpoint)),
    ):
        opened.setsockopt(option, value)
    return opened


def cut(endpoint: str, descriptor: int) -> None:
    """Close a connection of the socket bound at an address, by its descriptor; the peer may connect again.

    ZeroMQ has no call for this. It notices that the connection is shut down, and frees all that it holds for it.
    """
    try:
        duplicate = os.dup(descriptor)
    except OSError:  # already closed
        return
    try:
        connection = socket.socket(fileno=duplicate)
    except OSError:  # closed, and the number now belongs to a file
        os.close(duplicate)
        return
    with connection, contextlib.suppress(OSError):
        # The number may by now belong to a connection of somebody else.
        if _is_at(connection.getsockname(), endpoint):
            # Without lingering, so that a peer in the middle of a large message learns of it at once.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.shutdown(socket.SHUT_RDWR)


def endpoint_of(bound: Socket) -> str:
    """Return the address at which a socket is bound, with the port that was chosen."""
    return bound.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")


def _is_at(name: str | tuple[str, int], endpoint: str) -> bool:
    if isinstance(name, str):
        return endpoint == f"ipc://{name}"
    return endpoint.rpartition(":")[2] == str(name[1])


@contextlib.contextmanager
def zmq_context() -> Iterator[Context]:
    """Create a ZeroMQ context for one actor; destroy it with all its sockets at the end."""
    context: Context = zmq.Context()
    try:
        yield context
    finally:
        context.destroy(linger=0)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _bind_failure(endpoint: str, error: zmq.ZMQError) -> str:
    """Return one line: the endpoint, the problem and the cure."""
    cures = {
        errno.EADDRINUSE: "is in use; stop the other run or set transport.port to 0",
        errno.ENAMETOOLONG: f"is too long for an ipc path (at most {zmq.IPC_PATH_MAX_LEN} characters); "
        "choose a shorter folder or set transport.scheme = 'tcp'",
        errno.EACCES: "may not be opened by this user; choose a folder that you own or a port above 1023",
    }
    failed = f"cannot be bound ({_reason(error)}); see transport.scheme, host and port"
    return f"transport: {endpoint} {cures.get(error.errno or 0, failed)}"


def _reason(error: zmq.ZMQError) -> str:
    return zmq.strerror(error.errno or 0)
