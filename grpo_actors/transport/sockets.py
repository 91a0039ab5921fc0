"""What every socket of a run has in common: the options, the endpoints, who may listen where."""

import contextlib
import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import zmq

from grpo_actors.errors import RunError

#: A control message holds one group: 64 MiB is far above any sane one. A chunk is at most 4 MiB.
CONTROL_BYTES = 64 * 2**20
CHUNK_BYTES = 2**21

ENDPOINTS_FILE = "endpoints.json"


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a run listens; RUN/endpoints.json holds them, so that `--attach RUN_DIR` needs no address."""

    control: str
    weights: str
    events: str
    pid: int

    def write(self, run_dir: Path) -> None:
        temporary = run_dir / f"{ENDPOINTS_FILE}.tmp"
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")
        temporary.replace(run_dir / ENDPOINTS_FILE)

    @classmethod
    def read(cls, run_dir: Path) -> "Endpoints":
        """The endpoints of the run in `run_dir`.

        Raises:
            RunError: no such run, or it is over.
        """
        path = run_dir / ENDPOINTS_FILE
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            raise RunError(
                f"{run_dir}: no run is live here ({ENDPOINTS_FILE} not found); start it with launch.py"
            ) from None
        except (ValueError, TypeError) as error:
            raise RunError(f"{path}: unreadable ({error}); is the run folder of an older version?") from None


def plan_endpoints(run_dir: Path, scheme: str, host: str, port: int) -> Endpoints:
    """Choose the three addresses of a run; nothing is bound yet.

    ipc sockets lie in a folder of mode 0700 under the system's temporary folder, named after the run
    folder: the path of a Unix socket is limited to 107 bytes, and run folders are deep.
    """
    if scheme == "ipc":
        name = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]
        folder = Path(tempfile.gettempdir()) / f"grpo-{os.getuid()}-{name}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise RunError(f"{folder}: belongs to another user; remove it or set TMPDIR")
        folder.chmod(0o700)
        addresses = [f"ipc://{folder}/{part}" for part in ("control", "weights", "events")]
    else:
        first = port or _free_port(host)
        addresses = [f"tcp://{host}:{first + i}" for i in range(3)]
    return Endpoints(*addresses, pid=os.getpid())


def remove_endpoints(run_dir: Path, endpoints: Endpoints) -> None:
    """Leave nothing behind: the endpoints file, the socket files, their folder."""
    (run_dir / ENDPOINTS_FILE).unlink(missing_ok=True)
    for endpoint in (endpoints.control, endpoints.weights, endpoints.events):
        if endpoint.startswith("ipc://"):
            path = Path(endpoint.removeprefix("ipc://"))
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another run's leftovers, or already gone
                path.parent.rmdir()


def bind(context: "zmq.Context[zmq.Socket[bytes]]", kind: int, endpoint: str, max_bytes: int) -> "zmq.Socket[bytes]":
    """A bound socket with the run's options.

    Raises:
        RunError: the address is taken.
    """
    bound = context.socket(kind)
    for option, value in (
        (zmq.MAXMSGSIZE, max_bytes),
        (zmq.HANDSHAKE_IVL, 5_000),
        (zmq.HEARTBEAT_IVL, 2_000),
        (zmq.HEARTBEAT_TIMEOUT, 10_000),
        (zmq.LINGER, 0),
    ):
        bound.setsockopt(option, value)
    if kind == zmq.ROUTER:
        # MANDATORY: a send to a peer that left is an error, not silence. HANDOVER: a worker that
        # reconnects under its own name replaces its dead connection.
        bound.setsockopt(zmq.ROUTER_MANDATORY, 1)
        bound.setsockopt(zmq.ROUTER_HANDOVER, 1)
    try:
        bound.bind(endpoint)
    except zmq.ZMQError as error:
        bound.close()
        raise RunError(
            f"transport: {endpoint} cannot be bound ({error.strerror}); "
            "set transport.port to a free one, or 0 to have it chosen"
        ) from None
    return bound


def connect(context: "zmq.Context[zmq.Socket[bytes]]", kind: int, endpoint: str, max_bytes: int) -> "zmq.Socket[bytes]":
    """A connecting socket with the run's options; it reconnects by itself, for ever."""
    connected = context.socket(kind)
    for option, value in (
        (zmq.MAXMSGSIZE, max_bytes),
        (zmq.HEARTBEAT_IVL, 2_000),
        (zmq.HEARTBEAT_TIMEOUT, 10_000),
        (zmq.RECONNECT_IVL, 100),
        (zmq.RECONNECT_IVL_MAX, 5_000),
        (zmq.LINGER, 1_000),
    ):
        connected.setsockopt(option, value)
    return connected


def _free_port(host: str) -> int:
    """The first of three consecutive free ports."""
    for _ in range(50):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            first = _taken(stack, host, 0)
            for offset in (1, 2):
                _taken(stack, host, first + offset)
            return first
    raise RunError(f"transport: no three consecutive free ports on {host}; set transport.port")


def _taken(stack: contextlib.ExitStack, host: str, port: int) -> int:
    probe = stack.enter_context(socket.socket())
    probe.bind((host, port))
    number: int = probe.getsockname()[1]
    return number


@contextlib.contextmanager
def zmq_context() -> "Iterator[zmq.Context[zmq.Socket[bytes]]]":
    """A context of its own for one actor, destroyed with all its sockets."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        yield context
    finally:
        context.destroy(linger=0)
