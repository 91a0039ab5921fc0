"""A version from another host is fetched once for all workers there: real processes and TCP on the loopback address.

The learner of these tests keeps no version in shared memory, so its workers are in the place of those of another host.
"""

import contextlib
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from bounds import HANG_S
from real_sockets import wait_until

from grpo_actors.errors import ProtocolError
from grpo_actors.transport.sockets import endpoint_of, zmq_context
from grpo_actors.transport.weights import Version, WeightsClient, WeightsServer
from grpo_actors.transport.weights import shared_memory as memory
from grpo_actors.transport.weights.host_copy import _SharedFolder
from grpo_actors.wire import fetching

CHUNK, CHUNKS = 1000, 40
SIZE = CHUNK * CHUNKS - 1
RUN = "run-of-this-test"

#: A worker: fetches the version that each line of its standard input names, and prints that it begins and what it got.
WORKER = f"""
import sys
from grpo_actors.transport.sockets import zmq_context
from grpo_actors.transport.weights import Version, WeightsClient, host_copy, shared_memory
from grpo_actors.wire import fetching
host_copy.FETCH_TIMEOUT_S = float(sys.argv[2])
shared_memory.MEMORY = shared_memory.Path(sys.argv[3])
with zmq_context() as context:
    client = WeightsClient(context, sys.argv[1], fetching, run={RUN!r})
    for line in sys.stdin:
        number, digest = line.split()
        begun = []
        def begin():
            if not begun:
                print("begun", flush=True)
                begun.append(True)
        found = client.fetch(Version(int(number), {SIZE}, {CHUNK}, (), digest), begin)
        print(found and fetching.digest(found.data), flush=True)
    client.close()
"""


class Learner:
    """Serves versions in a thread, and counts the chunks."""

    def __init__(self, context) -> None:
        self.chunks = 0
        self.limit = 10**9
        self._server = WeightsServer(context, "tcp://127.0.0.1:*", self)
        self.endpoint = endpoint_of(self._server.socket)
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def __getattr__(self, name):
        return getattr(fetching, name)

    def chunk_header(self, version: int, index: int) -> bytes:
        self.chunks += 1
        return fetching.chunk_header(version, index)

    def publish(self, number: int, seed: int = 0) -> Version:
        data = bytes((at * 7 + number + seed) % 251 for at in range(SIZE))
        with self._lock:
            self._server.publish(number, b"", memoryview(data), CHUNK)
        return Version(number, SIZE, CHUNK, (), fetching.digest(data))

    def _serve(self) -> None:
        while not self._over.is_set():
            if self.chunks < self.limit and self._server.socket.poll(10):
                with self._lock:
                    self._server.serve()

    def close(self) -> None:
        self._over.set()
        self._thread.join()


class Worker:
    """A process of its own."""

    def __init__(self, learner: Learner, folder, timeout_s: float = HANG_S) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, learner.endpoint, str(timeout_s), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def fetch(self, version: Version) -> None:
        self.process.stdin.write(f"{version.number} {version.digest}\n")
        self.process.stdin.flush()

    def wait_until_begun(self) -> None:
        assert self.process.stdout.readline() == "begun\n"

    @property
    def fetched(self) -> str:
        """Digest of what the last order brought."""
        line = self.process.stdout.readline().strip()
        return self.process.stdout.readline().strip() if line == "begun" else line

    def leave(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(HANG_S) == 0


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """In the place of the host's memory."""
    monkeypatch.setattr(memory, "MEMORY", tmp_path)
    return tmp_path


@pytest.fixture
def learner() -> Iterator[Learner]:
    with zmq_context() as context, contextlib.closing(Learner(context)) as made:
        yield made


@pytest.fixture
def start(learner, folder):
    started: list[Worker] = []

    def start(**settings) -> Worker:
        started.append(Worker(learner, folder, **settings))
        return started[-1]

    yield start
    for worker in started:
        worker.process.kill()
        worker.process.wait()
        worker.process.stdin.close()
        worker.process.stdout.close()


@pytest.fixture
def client(learner, folder) -> Iterator[WeightsClient]:
    with (
        zmq_context() as context,
        contextlib.closing(WeightsClient(context, learner.endpoint, fetching, run=RUN)) as made,
    ):
        yield made


def test_two_workers_of_one_host_fetch_each_chunk_once(learner, start, folder):
    workers = [start(), start()]
    for number in (1, 2, 3):
        version = learner.publish(number)
        for worker in workers:
            worker.fetch(version)
        assert [worker.fetched for worker in workers] == [version.digest] * 2
        assert learner.chunks == number * CHUNKS
    # Two files for three versions, which stay until the last worker leaves.
    (shared,) = folder.iterdir()
    assert sorted(path.name for path in shared.iterdir()) == ["0", "1", "lock"]
    assert shared.stat().st_mode & 0o777 == 0o700
    assert (shared / "lock").stat().st_mode & 0o777 == 0o600
    # A waiting worker sees in each file how many chunks have arrived.
    headers = [(shared / name).read_bytes()[: memory.PROGRESS.stop] for name in ("0", "1")]
    assert [int.from_bytes(header[memory.PROGRESS], "little") for header in headers] == [CHUNKS] * 2
    workers[0].leave()
    assert shared.exists()
    workers[1].leave()
    assert list(folder.iterdir()) == []


def test_when_the_worker_that_fetches_is_killed_the_next_one_fetches(learner, start):
    version = learner.publish(1)
    learner.limit = CHUNKS // 2
    first, second = start(), start()
    first.fetch(version)
    first.wait_until_begun()
    wait_until(lambda: learner.chunks >= learner.limit)
    second.fetch(version)
    second.wait_until_begun()  # it waits
    first.process.kill()
    before, learner.limit = learner.chunks, 10**9
    assert second.fetched == version.digest
    # The dead one's last requests may have been answered too.
    assert CHUNKS <= learner.chunks - before <= CHUNKS + 4


def test_a_worker_that_hangs_while_it_fetches_keeps_the_others_waiting_for_a_while_only(learner, start):
    version = learner.publish(1)
    learner.limit = CHUNKS // 2
    first, second = start(), start(timeout_s=0.1)
    first.fetch(version)
    first.wait_until_begun()
    wait_until(lambda: learner.chunks >= learner.limit)
    first.process.send_signal(signal.SIGSTOP)
    learner.limit = 10**9
    second.fetch(version)
    assert second.fetched == version.digest
    first.process.send_signal(signal.SIGCONT)
    assert first.fetched == version.digest


def test_other_weights_under_a_number_that_was_used_before_are_fetched_anew(learner, client):
    for seed in (0, 1):
        version = learner.publish(1, seed=seed)
        found = client.fetch(version)
        assert fetching.digest(found.data) == version.digest
        assert found.whole()
    assert learner.chunks == 2 * CHUNKS


def test_a_copy_counts_as_overwritten_once_the_next_version_but_one_takes_its_place(learner, client):
    first = client.fetch(learner.publish(1))
    client.fetch(learner.publish(2))
    assert first.whole()
    client.fetch(learner.publish(3))
    assert not first.whole()


def test_bytes_without_the_digest_are_an_error_and_no_copy(learner, client):
    version = learner.publish(1)
    wrong = Version(1, SIZE, CHUNK, (), "0" * 32)
    for times in (1, 2):
        with pytest.raises(ProtocolError, match="do not have the digest"):
            client.fetch(wrong)
        assert learner.chunks == times * CHUNKS
    assert client.fetch(version) is not None


def test_a_version_that_is_gone_is_none(learner, client):
    version = learner.publish(1)
    learner.publish(2)
    assert client.fetch(version) is None


@pytest.mark.parametrize("hindrance", ["open to others", "a file"])
def test_a_folder_that_is_not_safe_is_not_used(hindrance, learner, client, folder):
    entered = _SharedFolder.enter(RUN)
    if hindrance == "open to others":
        entered.path.chmod(0o701)
    else:
        entered.leave()
        entered.path.touch()
    version = learner.publish(1)
    assert fetching.digest(client.fetch(version).data) == version.digest
    assert not (entered.path / "1").exists()
    if hindrance == "open to others":
        entered.leave()


def test_a_folder_that_somebody_removes_is_made_again(learner, client, folder):
    for number in (1, 2, 3):
        version = learner.publish(number)
        assert fetching.digest(client.fetch(version).data) == version.digest
        if number == 1:
            shutil.rmtree(next(folder.iterdir()))
    (shared,) = folder.iterdir()
    assert (shared / "1").exists()


def test_the_next_worker_removes_what_killed_workers_left(learner, start, folder):
    worker = start()
    version = learner.publish(1)
    worker.fetch(version)
    assert worker.fetched == version.digest
    memory.remove_leftovers()
    assert list(folder.iterdir()), "it lives"
    worker.process.kill()
    worker.process.wait()
    assert list(folder.iterdir())
    memory.remove_leftovers()
    assert list(folder.iterdir()) == []
