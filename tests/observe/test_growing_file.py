"""Lines of a file that grows: whole ones only, and from the start again after it was truncated."""

from pathlib import Path

import pytest

from grpo_actors.observe.growing_file import GrowingFile


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


@pytest.fixture
def file(path):
    file = GrowingFile(path)
    yield file
    file.close()


def test_lines_are_read_once_they_are_whole(path, file):
    assert file.read() is None, "it is not there yet"
    with path.open("ab", buffering=0) as writer:
        writer.write(b"one\ntw")
        assert [file.read(), file.read(), file.read()] == [b"one\n", None, None]
        writer.write(b"o\n")
        assert [file.read(), file.read()] == [b"two\n", None]
    assert (file.offset, file.rewinds) == (8, 0)


def test_a_truncated_file_is_read_again_also_if_it_is_longer_than_before(path, file):
    path.write_bytes(b"one\ntwo\n")
    assert [file.read(), file.read(), file.read()] == [b"one\n", b"two\n", None]
    path.write_bytes(b"one\nTWO\nthree\n")
    assert [file.read(), file.read(), file.read(), file.read()] == [b"one\n", b"TWO\n", b"three\n", None]
    assert (file.offset, file.rewinds) == (14, 1)
    path.write_bytes(b"")
    assert file.read() is None
    assert (file.offset, file.rewinds) == (0, 2)


def test_a_file_that_was_read_from_the_start_again_has_all_of_its_lines(path, file):
    path.write_bytes(b"one\ntwo\n")
    file.rewind()  # nothing is open yet
    assert file.read() == b"one\n"
    file.rewind()
    assert (file.offset, file.read()) == (0, b"one\n")
    assert file.rewinds == 2


def test_a_closed_file_is_closed(path, file):
    path.write_bytes(b"one\n")
    opened = len(list(Path("/dev/fd").iterdir()))
    file.read()
    assert len(list(Path("/dev/fd").iterdir())) == opened + 1
    file.close()
    file.close()
    assert len(list(Path("/dev/fd").iterdir())) == opened
