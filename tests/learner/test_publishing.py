"""Versions are copied and announced while the learner goes on, one at a time and to the last one."""

import threading

import mlx.core as mx
import pytest
from bounds import HANG_S

from grpo_actors.errors import RunError
from grpo_actors.learner.publishing import Publisher
from grpo_actors.policy.weights import unpack
from grpo_actors.transport.weights import Version, shared_memory
from grpo_actors.transport.weights.shared_memory import SharedMemoryReader

ARRAYS = {"a": mx.arange(6).astype(mx.float32), "b": mx.array([[1.5], [2.5]], mx.bfloat16)}


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """In the place of the host's memory."""
    monkeypatch.setattr(shared_memory, "MEMORY", tmp_path)
    return tmp_path


def test_a_version_is_announced_with_its_bytes_and_where_this_host_finds_them(memory):
    announced = []
    publisher = Publisher(lambda manifest, data: announced.append((manifest, bytes(data))))
    for version in (1, 2):
        publisher.publish(version, {name: array + version for name, array in ARRAYS.items()})
    publisher.wait()
    publisher.wait()  # nothing is under way
    assert [manifest.version for manifest, _ in announced] == [1, 2]
    reader = SharedMemoryReader(lambda _: None)
    for manifest, data in announced:
        found = reader.fetch(Version(manifest.version, manifest.size, manifest.chunk_bytes, (manifest.path,)))
        assert bytes(found.data) == data
        arrays = unpack(manifest, bytearray(data), of_this_host=False)
        for name, array in ARRAYS.items():
            assert mx.array_equal(arrays[name], array + manifest.version)
    reader.close()
    publisher.close()
    assert list(memory.iterdir()) == []


def test_without_memory_that_is_shared_a_version_is_announced_without_an_address(memory, monkeypatch):
    monkeypatch.setattr(shared_memory, "allocate", lambda *_: None)  # as on a host without room
    announced = []
    publisher = Publisher(
        lambda manifest, data: announced.append((manifest.path, len(data) == manifest.size))
    )
    publisher.publish(1, ARRAYS)
    publisher.close()
    assert announced == [("", True)]


def test_the_learner_goes_on_while_a_version_is_published_and_closing_finishes_it(memory):
    may_go_on, announced = threading.Event(), []

    def announce(manifest, _):
        assert may_go_on.wait(HANG_S)
        announced.append(manifest.version)

    publisher = Publisher(announce)
    publisher.publish(1, ARRAYS)
    assert announced == []
    may_go_on.set()
    publisher.close()
    assert announced == [1]


def test_an_error_of_a_version_is_raised_when_the_next_one_is_published(memory):
    def fail(*_):
        raise RunError("nobody can be told")

    publisher = Publisher(fail)
    publisher.publish(1, ARRAYS)
    with pytest.raises(RunError, match="nobody can be told"):
        publisher.publish(2, ARRAYS)
    publisher.wait()  # it is raised once
    publisher.close()


def test_a_process_that_ends_at_once_leaves_no_files(memory):
    publisher = Publisher(lambda *_: None)
    publisher.publish(1, ARRAYS)
    publisher.wait()
    assert list(memory.iterdir())
    publisher.unlink()
    assert list(memory.iterdir()) == []
    publisher.close()
