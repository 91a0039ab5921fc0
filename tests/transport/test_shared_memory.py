"""Bytes that two processes map: whole, or told to be not."""

import subprocess
import sys

import pytest

from grpo_actors.transport.weights import shared_memory as module
from grpo_actors.transport.weights.base import Version
from grpo_actors.transport.weights.shared_memory import Reader, Shelf


def unpinned(_memory):
    return None


@pytest.fixture
def shelf():
    shelf = Shelf(unpinned)
    yield shelf
    shelf.close()


@pytest.fixture
def reader():
    reader = Reader(unpinned)
    yield reader
    reader.close()


def put(shelf, version, content):
    room = shelf.room(version, len(content))
    room.data[:] = content
    return shelf.put(version, room.data)


def take(reader, path, version, size):
    return reader.take(Version(version, size, 1, (path,)))


def test_another_process_reads_what_was_written(shelf):
    content = bytes(range(256)) * 5000
    path = put(shelf, 7, content)
    program = (
        "import sys; from grpo_actors.transport.weights.base import Version\n"
        "from grpo_actors.transport.weights.shared_memory import Reader\n"
        f"found = Reader(lambda memory: None).take(Version(7, {len(content)}, 1, ({path!r},)))\n"
        "sys.stdout.buffer.write(found.data); assert found.whole()"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == content


def test_a_version_stays_while_the_next_one_is_written_and_goes_with_the_one_after(shelf, reader):
    path = put(shelf, 1, b"one")
    found = take(reader, path, 1, 3)
    put(shelf, 2, b"two")
    assert bytes(found.data) == b"one"
    assert found.whole()
    room = shelf.room(3, 3)  # from here on the bytes are being overwritten
    assert not found.whole()
    assert take(reader, path, 1, 3) is None
    shelf.put(3, room.data)
    assert take(reader, path, 3, 3) is not None


def test_a_file_is_mapped_and_pinned_once_for_all_versions_that_it_holds(shelf):
    seen, closed = [], []

    class Pin:
        def close(self):
            closed.append(self)

    def pin(memory):
        seen.append(memory.nbytes)
        return Pin()

    reader = Reader(pin)
    # Versions 1, 3, 5 are in one file, 2 and 4 in the other.
    for version in range(1, 6):
        content = b"version %d" % version
        found = take(reader, put(shelf, version, content), version, len(content))
        assert bytes(found.data) == content
    assert seen == [9, 9]
    other = Shelf(unpinned)  # a learner that was started again
    for version in (6, 7):
        assert take(reader, put(other, version, b"abc"), version, 3).whole()
    assert seen == [9, 9, 3, 3]
    assert len(closed) == 2  # the first two are let go
    reader.close()
    assert len(closed) == 4
    other.close()


def test_version_zero_is_told_from_nothing(shelf, reader):
    path = put(shelf, 0, b"")
    assert take(reader, path, 0, 0) is not None
    assert take(reader, path, 1, 0) is None


@pytest.mark.parametrize("size", [2, 4])
def test_a_file_of_another_size_is_not_the_version(shelf, reader, size):
    assert take(reader, put(shelf, 1, b"abc"), 1, size) is None


def test_a_path_of_another_host_is_no_error(reader):
    assert take(reader, "/nowhere/at/all", 1, 3) is None
    assert take(reader, "", 1, 3) is None


def test_a_model_of_another_size_gets_a_file_of_its_own(shelf, reader):
    path = put(shelf, 1, b"abc")
    old = take(reader, path, 1, 3)
    put(shelf, 3, b"abcdef")
    assert bytes(old.data) == b"abc"
    assert bytes(take(reader, path, 3, 6).data) == b"abcdef"


def test_without_memory_for_a_file_the_bytes_are_not_shared(shelf):
    # Beyond any disk: refused when it is asked for, and not when it is written to.
    assert shelf._file(0, 2**62) is None
    assert put(shelf, 1, b"abc")


def test_a_version_that_was_written_elsewhere_has_no_address(shelf):
    assert shelf.put(1, memoryview(b"abc")) == ""
    shelf.room(1, 3)
    assert shelf.put(1, memoryview(b"abc")) == ""


def test_addresses_of_other_transports_are_passed_over(shelf, reader):
    path = put(shelf, 1, b"abc")
    found = reader.take(Version(1, 3, 1, ("s3://bucket/1", path)))
    assert bytes(found.data) == b"abc"


def test_nothing_stays_behind(shelf, reader):
    path = put(shelf, 1, b"abc")
    found = take(reader, path, 1, 3)
    shelf.close()
    assert bytes(found.data) == b"abc"
    assert take(reader, path, 1, 3) is None


def test_the_folder_is_private(shelf):
    path = put(shelf, 1, b"abc")
    assert module.Path(path).stat().st_mode & 0o777 == 0o600
    assert module.Path(path).parent.stat().st_mode & 0o777 == 0o700


def test_what_a_killed_writer_left_goes_with_the_next_writer(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MEMORY", tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()  # reaped: its number is nobody's
    left = tmp_path / f"{module.PREFIX}{dead.pid}-abc"
    left.mkdir()
    (left / "0").write_bytes(b"a version")
    alive = Shelf(unpinned)
    other = Shelf(unpinned)
    assert not left.exists()
    assert put(alive, 1, b"abc")
    assert len(list(tmp_path.iterdir())) == 2  # the two that live
    alive.close()
    other.close()
