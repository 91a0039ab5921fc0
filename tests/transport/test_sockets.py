"""Addresses and options: where a run listens, and how its sockets behave on errors."""

import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from real_sockets import wait_until

from grpo_actors.errors import RunError
from grpo_actors.transport.sockets import (
    INNER,
    MAX_IPC_PATH,
    Endpoints,
    bind,
    check_ports,
    connect,
    cut,
    plan_endpoints,
    reachable_endpoint,
    remove_endpoints,
    zmq_context,
)

DEADLINE_MS = 10_000


@pytest.fixture
def short_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # Not tmp_path: on macOS that is longer than an ipc path may be.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


# --- addresses ------------------------------------------------------------------------------------


def test_ipc_sockets_are_in_a_folder_that_no_other_user_may_enter(short_tmp, tmp_path):
    endpoints = plan_endpoints(tmp_path, "ipc", "", 0)
    folder = Path(endpoints.control.removeprefix("ipc://")).parent
    assert folder.parent == short_tmp
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert endpoints.pid == os.getpid()
    assert {endpoints.control, endpoints.weights, endpoints.events} == {
        f"ipc://{folder}/{part}" for part in ("control", "weights", "events")
    }


def test_one_run_folder_has_one_socket_folder_and_two_have_two(short_tmp, tmp_path):
    first, again = (plan_endpoints(tmp_path / "a", "ipc", "", 0) for _ in range(2))
    other = plan_endpoints(tmp_path / "b", "ipc", "", 0)
    assert first == again
    assert first.control != other.control


def test_a_socket_folder_that_was_open_to_others_is_closed(short_tmp, tmp_path):
    folder = Path(plan_endpoints(tmp_path, "ipc", "", 0).control.removeprefix("ipc://")).parent
    folder.chmod(0o777)
    plan_endpoints(tmp_path, "ipc", "", 0)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_link_in_place_of_the_socket_folder_is_refused(short_tmp, tmp_path):
    folder = Path(plan_endpoints(tmp_path, "ipc", "", 0).control.removeprefix("ipc://")).parent
    folder.rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    folder.symlink_to(elsewhere)
    with pytest.raises(RunError, match=r"no folder of this user's; remove it or set TMPDIR"):
        plan_endpoints(tmp_path, "ipc", "", 0)
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o755


def test_a_temporary_folder_that_is_too_deep_for_sockets_is_refused_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", f"/{'x' * MAX_IPC_PATH}")
    with pytest.raises(
        RunError, match=r"too long for sockets .* set TMPDIR to a shorter folder, or transport.scheme"
    ):
        plan_endpoints(tmp_path, "ipc", "", 0)


@pytest.mark.parametrize(
    ("host", "keys", "join"),
    [
        ("192.0.2.1", True, "--connect tcp://192.0.2.1:7000 --key FILE"),
        ("192.0.2.1", False, "--connect tcp://192.0.2.1:7000"),
        ("::1", True, "--connect 'tcp://[::1]:7000' --key FILE"),
        ("[::1]", False, "--connect 'tcp://[::1]:7000'"),
        ("0.0.0.0", True, f"--connect tcp://{socket.gethostname()}:7000 --key FILE"),  # noqa: S104
        ("::", False, f"--connect tcp://{socket.gethostname()}:7000"),
        ("[::]", False, f"--connect tcp://{socket.gethostname()}:7000"),
    ],
)
def test_the_endpoints_hold_the_command_for_another_host(tmp_path, host, keys, join):
    endpoints = plan_endpoints(tmp_path, "tcp", host, 7000, keys=keys, options=["--allow", "my file.py:f"])
    assert endpoints.join == f"grpo worker {join} --allow 'my file.py:f'"
    assert endpoints.how_to_join.startswith(endpoints.join)
    assert ("keys new NAME" in endpoints.how_to_join) == keys
    endpoints.write(tmp_path)
    assert Endpoints.read(tmp_path).join == endpoints.join


def test_unix_sockets_have_no_command_for_another_host(short_tmp, tmp_path):
    assert plan_endpoints(tmp_path, "ipc", "", 0).join == ""


def test_the_longest_path_that_is_planned_can_be_bound(zmq_sockets, tmp_path, monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        # The longest socket name, and the longest folder that still fits with it.
        room = MAX_IPC_PATH - len(f"{short}//grpo-{os.getuid()}-{'0' * 12}/control~")
        monkeypatch.setattr(tempfile, "tempdir", f"{short}/{'x' * room}")
        Path(tempfile.tempdir or "").mkdir()
        endpoints = plan_endpoints(tmp_path, "ipc", "", 0)
        inner = f"{endpoints.control}{INNER}"
        assert len(inner.removeprefix("ipc://")) == MAX_IPC_PATH
        bind(zmq_sockets, zmq.ROUTER, inner, 100)
        monkeypatch.setattr(tempfile, "tempdir", f"{tempfile.tempdir}x")
        with pytest.raises(RunError, match="too long"):
            plan_endpoints(tmp_path, "ipc", "", 0)


def test_a_temporary_folder_that_cannot_be_written_is_refused_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nothing")
    with pytest.raises(RunError, match=r"cannot be made .* set TMPDIR"):
        plan_endpoints(tmp_path, "ipc", "", 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_free_tcp_ports_are_three_in_a_row(tmp_path, host):
    endpoints = plan_endpoints(tmp_path, "tcp", host, 0)
    first = int(endpoints.control.rpartition(":")[2])
    assert endpoints.weights == f"tcp://{host}:{first + 1}"
    assert endpoints.events == f"tcp://{host}:{first + 2}"
    check_ports(host, first)


def test_a_port_that_was_asked_for_is_used(tmp_path):
    assert plan_endpoints(tmp_path, "tcp", "127.0.0.1", 7000).events == "tcp://127.0.0.1:7002"


def test_an_ipv6_address_is_written_in_brackets_and_can_be_bound(zmq_sockets, tmp_path):
    try:
        endpoints = plan_endpoints(tmp_path, "tcp", "::1", 0)
    except RunError:
        pytest.skip("this host has no IPv6")
    assert endpoints.control.startswith("tcp://[::1]:")
    server = bind(zmq_sockets, zmq.ROUTER, endpoints.control, 100)
    connect(zmq_sockets, zmq.DEALER, endpoints.control, 100).send(b"hello")
    assert server.poll(DEADLINE_MS)


def test_an_address_of_another_host_has_no_free_ports(tmp_path):
    with pytest.raises(RunError, match=r"no three consecutive free ports on 192.0.2.1; set transport.port"):
        plan_endpoints(tmp_path, "tcp", "192.0.2.1", 0)  # an address reserved for documentation


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=rf"127.0.0.1:{port} cannot be bound"):
            check_ports("127.0.0.1", port - 1)


def test_ports_whose_last_connections_have_just_closed_are_free(tmp_path):
    first = int(plan_endpoints(tmp_path, "tcp", "127.0.0.1", 0).control.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", first)) as server, socket.create_connection(("127.0.0.1", first)):
        server.accept()[0].close()  # its side ends first, so that the kernel keeps the address for a minute
    check_ports("127.0.0.1", first)


@pytest.mark.parametrize(
    ("endpoint", "reached", "expected"),
    [
        ("tcp://127.0.0.1:7001", "ipc:///tmp/a/control", "tcp://127.0.0.1:7001"),
        ("tcp://0.0.0.0:7001", "tcp://gpu-3:7000", "tcp://gpu-3:7001"),
        ("tcp://127.0.0.1:7001", "tcp://localhost:7000", "tcp://localhost:7001"),
        ("tcp://[::]:7001", "tcp://[fe80::1]:7000", "tcp://[fe80::1]:7001"),
        ("ipc:///tmp/a/weights", "ipc:///tmp/a/control", "ipc:///tmp/a/weights"),
    ],
)
def test_a_peer_finds_the_other_sockets_where_it_found_the_first(endpoint, reached, expected):
    assert reachable_endpoint(endpoint, reached) == expected


def test_endpoints_are_read_as_they_were_written(tmp_path):
    endpoints = Endpoints("ipc:///a", "ipc:///b", "ipc:///c", 7)
    endpoints.write(tmp_path)
    assert Endpoints.read(tmp_path) == endpoints
    assert [path.name for path in tmp_path.iterdir()] == ["endpoints.json"]
    assert (tmp_path / "endpoints.json").read_text().startswith('{\n  "control": "ipc:///a",\n')


def test_a_folder_without_a_live_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="no run is live here"):
        Endpoints.read(tmp_path)


WRONG_TYPE = {"control": "a", "weights": "b", "events": "c", "pid": "7"}


@pytest.mark.parametrize(
    "text", ["{", "[]", *map(json.dumps, ({"control": "x"}, {"surprise": 1}, WRONG_TYPE))]
)
def test_an_invalid_endpoints_file_is_refused(tmp_path, text):
    (tmp_path / "endpoints.json").write_text(text)
    with pytest.raises(RunError, match="unreadable"):
        Endpoints.read(tmp_path)


def test_remove_endpoints_leaves_no_file_and_may_be_called_twice(zmq_sockets, short_tmp, tmp_path):
    endpoints = plan_endpoints(tmp_path, "ipc", "", 0)
    endpoints.write(tmp_path)
    bind(zmq_sockets, zmq.ROUTER, endpoints.control, 100)
    bind(zmq_sockets, zmq.ROUTER, f"{endpoints.events}{INNER}", 100)
    remove_endpoints(tmp_path, endpoints)
    remove_endpoints(tmp_path, endpoints)
    assert not [*tmp_path.iterdir(), *short_tmp.iterdir()]


# --- options --------------------------------------------------------------------------------------


def test_a_frame_above_the_bound_cuts_the_connection_and_the_peer_reconnects(zmq_sockets, ipc_address):
    server = bind(zmq_sockets, zmq.ROUTER, ipc_address, 1000)
    peer = connect(zmq_sockets, zmq.DEALER, ipc_address, 1000, [(zmq.IDENTITY, b"p")])
    peer.send(bytes(1001))

    def comes_back() -> bool:
        # A message sent before the cut is detected is lost with the connection, so it is repeated.
        with contextlib.suppress(zmq.Again):
            peer.send(b"small", zmq.DONTWAIT)
        return bool(server.poll(50))

    wait_until(comes_back)
    assert server.recv_multipart() == [b"p", b"small"]


def test_a_message_without_a_connection_is_not_reported_as_sent(zmq_sockets, ipc_address):
    peer = connect(zmq_sockets, zmq.DEALER, ipc_address, 1000)
    with pytest.raises(zmq.Again):
        peer.send(b"hello", zmq.DONTWAIT)


def test_an_invalid_address_is_refused():
    with zmq_context() as context:
        with pytest.raises(RunError, match=r"no address to connect to .*ipc:///path"):
            connect(context, zmq.DEALER, "nonsense", 1000)
        with pytest.raises(RunError, match=r"nonsense cannot be bound .*; see transport.scheme"):
            bind(context, zmq.ROUTER, "nonsense", 1000)


def test_a_path_that_is_too_long_is_refused_with_the_cure(zmq_sockets):
    with pytest.raises(RunError, match=r"too long for an ipc path .* choose a shorter folder"):
        bind(zmq_sockets, zmq.ROUTER, f"ipc:///tmp/{'x' * 200}", 1000)


def test_an_end_that_is_silent_for_ten_seconds_is_given_up_by_both(zmq_sockets, ipc_address):
    peer = connect(zmq_sockets, zmq.DEALER, ipc_address, 1000)
    beats = {
        zmq.HEARTBEAT_IVL: 2_000,
        zmq.HEARTBEAT_TIMEOUT: 10_000,
        zmq.HEARTBEAT_TTL: 10_000,
    }  # milliseconds
    assert {option: peer.getsockopt(option) for option in beats} == beats
    pauses = {zmq.RECONNECT_IVL: 100, zmq.RECONNECT_IVL_MAX: 200}  # milliseconds between attempts
    assert {option: peer.getsockopt(option) for option in pauses} == pauses
    # A peer that never ends its handshake would keep its connection.
    bound = bind(zmq_sockets, zmq.ROUTER, ipc_address, 1000)
    assert bound.getsockopt(zmq.HANDSHAKE_IVL) == 5_000


def test_only_a_connection_of_the_address_is_cut(zmq_sockets, ipc_address, tmp_path):
    bind(zmq_sockets, zmq.ROUTER, ipc_address, 1000)
    one, other = socket.socketpair()
    with one, other, (tmp_path / "file").open("wb") as file:
        closed = os.dup(file.fileno())
        os.close(closed)
        for descriptor in (one.fileno(), file.fileno(), closed):
            cut(ipc_address, descriptor)
        one.sendall(b"still open")
        assert other.recv(100) == b"still open"
        os.fstat(file.fileno())


def test_an_address_in_use_is_refused_with_the_cure():
    with zmq_context() as context:
        first = bind(context, zmq.ROUTER, "tcp://127.0.0.1:*", 1000)
        address = first.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        with pytest.raises(RunError, match="is in use; stop the other run"):
            bind(context, zmq.ROUTER, address, 1000)


def test_only_this_host_can_reach_the_default_tcp_address(tmp_path):
    endpoints = plan_endpoints(tmp_path, "tcp", "127.0.0.1", 0)
    with zmq_context() as context:
        bound = bind(context, zmq.ROUTER, endpoints.control, 1000)
        listens = bound.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        assert listens == endpoints.control


#: A learner that reads nothing for a while; the last line asks it for what waited.
FLOODED = """
import sys, time, zmq
from grpo_actors.transport.sockets import HEARTBEAT_S, bind
with zmq.Context() as context:
    bound = bind(context, zmq.ROUTER, sys.argv[1], 2**10, [(zmq.RCVHWM, 4)])
    print("bound", flush=True)
    sys.stdin.readline()
    time.sleep(2 * HEARTBEAT_S)  # libzmq's own timer is what must pass
    print(len(bound.recv_multipart()), flush=True)
    bound.close()
"""


def test_a_peer_that_floods_a_socket_and_closes_does_not_abort_its_process(ipc_address):
    with subprocess.Popen(
        [sys.executable, "-c", FLOODED, ipc_address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as learner:
        assert learner.stdout.readline() == "bound\n"
        with zmq.Context() as context, contextlib.closing(context.socket(zmq.DEALER)) as peer:
            peer.setsockopt(zmq.LINGER, 0)
            peer.setsockopt(zmq.SNDHWM, 100)
            peer.setsockopt(zmq.SNDTIMEO, 500)
            peer.connect(ipc_address)
            with contextlib.suppress(zmq.Again):  # the learner's queue, the kernel's and this one are full
                while True:
                    peer.send(bytes(500))
        out, _ = learner.communicate("closed\n")
    assert (out, learner.returncode) == ("2\n", 0)
