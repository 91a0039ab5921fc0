"""Bytes in memory that two processes map: readers tell whole versions from overwritten ones."""

import os
import subprocess
import sys

import pytest

from grpo_actors.transport.weights import shared_memory as module
from grpo_actors.transport.weights.base import Version
from grpo_actors.transport.weights.shared_memory import SharedMemoryReader, SharedMemoryWriter


def unpinned(_memory):
    return None


@pytest.fixture
def writer():
    writer = SharedMemoryWriter(unpinned)
    yield writer
    writer.close()


@pytest.fixture
def reader():
    reader = SharedMemoryReader(unpinned)
    yield reader
    reader.close()


def publish(writer, version, content):
    buffer = writer.buffer(version, len(content))
    buffer.data[:] = content
    return writer.publish(version, buffer.data)


def fetch(reader, path, version, size):
    return reader.fetch(Version(version, size, 1, (path,)))


def test_another_process_reads_what_was_written(writer):
    content = bytes(range(256)) * 5000
    path = publish(writer, 7, content)
    program = (
        "import sys; from grpo_actors.transport.weights.base import Version\n"
        "from grpo_actors.transport.weights.shared_memory import SharedMemoryReader\n"
        f"found = SharedMemoryReader(lambda memory: None).fetch(Version(7, {len(content)}, 1, ({path!r},)))\n"
        "sys.stdout.buffer.write(found.data); assert found.whole()"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == content


def test_a_version_stays_while_the_next_one_is_written_and_goes_with_the_one_after(writer, reader):
    path = publish(writer, 1, b"one")
    found = fetch(reader, path, 1, 3)
    publish(writer, 2, b"two")
    assert bytes(found.data) == b"one"
    assert found.whole()
    buffer = writer.buffer(3, 3)  # from here on the bytes are being overwritten
    assert not found.whole()
    assert fetch(reader, path, 1, 3) is None
    writer.publish(3, buffer.data)
    assert fetch(reader, path, 3, 3) is not None


def test_a_file_is_mapped_and_pinned_once_for_all_versions_that_it_holds(writer):
    seen, closed = [], []

    class Pin:
        def close(self):
            closed.append(self)

    def pin(memory):
        seen.append(memory.nbytes)
        return Pin()

    reader = SharedMemoryReader(pin)
    # Versions 1, 3, 5 are in one file, 2 and 4 in the other.
    for version in range(1, 6):
        content = b"version %d" % version
        found = fetch(reader, publish(writer, version, content), version, len(content))
        assert bytes(found.data) == content
    assert seen == [9, 9]
    other = SharedMemoryWriter(unpinned)  # of a learner that was started again
    for version in (6, 7):
        assert fetch(reader, publish(other, version, b"abc"), version, 3).whole()
    assert seen == [9, 9, 3, 3]
    assert len(closed) == 2  # the first two files are no longer mapped
    reader.close()
    assert len(closed) == 4
    other.close()


def test_the_writers_memory_is_pinned_until_it_is_replaced_or_the_writer_is_closed():
    pinned, closed = [], []

    class Pin:
        def close(self):
            closed.append(self)

    def pin(memory):
        pinned.append(Pin())
        return pinned[-1]

    writer = SharedMemoryWriter(pin)
    for version in (1, 2, 3):
        publish(writer, version, b"abc")
    assert (len(pinned), closed) == (2, [])
    publish(writer, 5, b"abcdef")  # in the place of 3
    assert (len(pinned), closed) == (3, pinned[:1])
    writer.close()
    assert set(closed) == set(pinned)


def test_a_closed_reader_has_nothing_mapped(writer, reader):
    found = fetch(reader, publish(writer, 1, b"abc"), 1, 3)
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        found.whole()


def test_a_file_costs_each_side_one_descriptor_until_it_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MEMORY", tmp_path)

    def descriptors():
        return sorted(path.name for path in module.Path("/dev/fd").iterdir())

    before = descriptors()
    writer, reader = SharedMemoryWriter(unpinned), SharedMemoryReader(unpinned)
    path = publish(writer, 1, b"abc")
    assert len(descriptors()) == len(before) + 2  # the folder's lock, and the mapped file
    for _ in range(3):
        assert fetch(reader, path, 1, 3)
        module.remove_leftovers()
    assert len(descriptors()) == len(before) + 3
    reader.close()
    for _ in range(2):
        writer.close()
    del writer
    assert descriptors() == before


@pytest.mark.skipif(
    not hasattr(os, "posix_fallocate"), reason="only there can pages be had before they are used"
)
def test_all_memory_of_a_file_is_there_before_it_is_written(writer):
    size = 2**20
    writer.buffer(1, size)
    (file,) = writer._folder.iterdir()
    assert file.stat().st_blocks * 512 >= size


def test_version_zero_is_distinguished_from_no_version(writer, reader):
    path = publish(writer, 0, b"")
    assert fetch(reader, path, 0, 0) is not None
    assert fetch(reader, path, 1, 0) is None


@pytest.mark.parametrize("size", [2, 4])
def test_a_file_of_another_size_is_not_the_version(writer, reader, size):
    assert fetch(reader, publish(writer, 1, b"abc"), 1, size) is None


def test_a_path_of_another_host_is_not_an_error(reader):
    assert fetch(reader, "/nowhere/at/all", 1, 3) is None
    assert fetch(reader, "", 1, 3) is None


def test_a_model_of_another_size_gets_a_new_file(writer, reader):
    path = publish(writer, 1, b"abc")
    old = fetch(reader, path, 1, 3)
    publish(writer, 3, b"abcdef")
    assert bytes(old.data) == b"abc"
    assert bytes(fetch(reader, path, 3, 6).data) == b"abcdef"


def test_without_memory_for_a_file_the_bytes_are_not_shared(writer):
    # Larger than any disk: the allocation fails, not the first write.
    assert writer._file(0, 2**62) is None
    assert list(writer._folder.iterdir()) == []
    assert publish(writer, 1, b"abc")


def test_a_version_that_was_written_elsewhere_has_no_address(writer):
    assert writer.publish(1, memoryview(b"abc")) == ""
    writer.buffer(1, 3)
    assert writer.publish(1, memoryview(b"abc")) == ""


def test_addresses_of_other_transports_are_skipped(writer, reader):
    path = publish(writer, 1, b"abc")
    found = reader.fetch(Version(1, 3, 1, ("s3://bucket/1", path)))
    assert bytes(found.data) == b"abc"


def test_closing_removes_the_files_and_spares_a_mapped_one(writer, reader):
    path = publish(writer, 1, b"abc")
    found = fetch(reader, path, 1, 3)
    writer.close()
    assert bytes(found.data) == b"abc"
    assert fetch(reader, path, 1, 3) is None


def test_the_folder_is_private(writer):
    path = publish(writer, 1, b"abc")
    assert module.Path(path).stat().st_mode & 0o777 == 0o600
    assert module.Path(path).parent.stat().st_mode & 0o777 == 0o700


def test_the_next_writer_removes_what_a_killed_writer_left_and_spares_the_living(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MEMORY", tmp_path)
    program = (
        "import sys; from pathlib import Path; from grpo_actors.transport.weights import shared_memory as module\n"
        f"module.MEMORY = Path({str(tmp_path)!r}); writer = module.SharedMemoryWriter(lambda memory: None)\n"
        "buffer = writer.buffer(1, 3); buffer.data[:] = b'abc'; writer.publish(1, buffer.data)\n"
        "print(writer._folder, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        left = module.Path(process.stdout.readline().decode().strip())
        writer = SharedMemoryWriter(unpinned)
        other = SharedMemoryWriter(unpinned)
        assert left.is_dir(), "it lives"
        process.kill()
    assert (left / "1").is_file()
    module.remove_leftovers()
    assert not left.exists()
    assert len(list(tmp_path.iterdir())) == 2  # of the two live writers
    writer.close()
    other.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none_of_a_writer_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MEMORY", tmp_path)
    (tmp_path / "precious").mkdir()
    (tmp_path / f"{module.PREFIX}1-link").symlink_to(tmp_path / "precious")
    (tmp_path / f"{module.PREFIX}1-file").touch()
    module.remove_leftovers()
    assert len(list(tmp_path.iterdir())) == 3


def test_the_files_can_be_removed_while_they_are_in_use(writer, reader):
    """A process that ends at once does so in another thread."""
    path = publish(writer, 1, b"abc")
    found = fetch(reader, path, 1, 3)
    writer.unlink()
    assert not module.Path(path).parent.exists()
    assert bytes(found.data) == b"abc"
    writer.unlink()
