"""Bytes that two processes map: whole, or told to be not."""

import subprocess
import sys

import pytest

from grpo_actors.transport import shared as module
from grpo_actors.transport.shared import Shelf, shared


@pytest.fixture
def shelf():
    shelf = Shelf()
    yield shelf
    shelf.close()


def put(shelf, version, content):
    shelf.room(version, len(content))[:] = content
    return shelf.finish(version)


def test_another_process_reads_what_was_written(shelf):
    content = bytes(range(256)) * 5000
    path = put(shelf, 7, content)
    program = (
        "import sys; from grpo_actors.transport.shared import shared\n"
        f"with shared({path!r}, 7, {len(content)}) as found: sys.stdout.buffer.write(found.data); assert found.whole"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == content


def test_a_version_stays_while_the_next_one_is_written_and_goes_with_the_one_after(shelf):
    path = put(shelf, 1, b"one")
    with shared(path, 1, 3) as found:
        put(shelf, 2, b"two")
        assert bytes(found.data) == b"one"
        assert found.whole
        shelf.room(3, 3)  # from here on the bytes are being overwritten
        assert not found.whole
    with shared(path, 1, 3) as found:
        assert found is None
    shelf.finish(3)
    with shared(path, 3, 3) as found:
        assert found is not None


def test_version_zero_is_told_from_nothing(shelf):
    path = put(shelf, 0, b"")
    with shared(path, 0, 0) as found:
        assert found is not None
    with shared(path, 1, 0) as found:
        assert found is None


@pytest.mark.parametrize("size", [2, 4])
def test_a_file_of_another_size_is_not_the_version(shelf, size):
    path = put(shelf, 1, b"abc")
    with shared(path, 1, size) as found:
        assert found is None


def test_a_path_of_another_host_is_no_error():
    with shared("/nowhere/at/all", 1, 3) as found:
        assert found is None
    with shared("", 1, 3) as found:
        assert found is None


def test_a_model_of_another_size_gets_a_file_of_its_own(shelf):
    path = put(shelf, 1, b"abc")
    with shared(path, 1, 3) as old:
        put(shelf, 3, b"abcdef")
        assert bytes(old.data) == b"abc"
    with shared(path, 3, 6) as new:
        assert bytes(new.data) == b"abcdef"


def test_without_memory_for_a_file_the_bytes_are_not_shared(shelf):
    # Beyond any disk: refused when it is asked for, and not when it is written to.
    assert shelf._file(0, 2**62) is None
    room = shelf.room(1, 3)
    room[:] = b"abc"
    assert shelf.finish(1)


def test_nothing_stays_behind(shelf):
    path = put(shelf, 1, b"abc")
    with shared(path, 1, 3) as found:
        shelf.close()
        assert bytes(found.data) == b"abc"
    with shared(path, 1, 3) as found:
        assert found is None


def test_the_folder_is_private(shelf):
    path = put(shelf, 1, b"abc")
    assert module.Path(path).stat().st_mode & 0o777 == 0o600
    assert module.Path(path).parent.stat().st_mode & 0o777 == 0o700
