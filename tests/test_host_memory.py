"""How much memory a process may still take, read from files as Linux writes them."""

import pytest

from grpo_actors.host_memory import available_bytes


@pytest.fixture
def meminfo(tmp_path):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:   2000 kB\nMemAvailable:   1000 kB\nHugePages_Total:       0\n")
    return file


def container(folder, limit):
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text("500000\n")
    (folder / "memory.stat").write_text("anon 400000\ninactive_file 60000\nactive_file 40000\n")
    return folder


def test_it_is_what_the_host_has_and_the_container_may_take(meminfo, tmp_path):
    assert available_bytes(meminfo, tmp_path) == 1000 * 1024
    assert available_bytes(meminfo, container(tmp_path, "max")) == 1000 * 1024
    # Of 800,000 bytes 500,000 are used, but 100,000 of these are cached files.
    assert available_bytes(meminfo, container(tmp_path, 800_000)) == 400_000
    assert available_bytes(meminfo, container(tmp_path, 5_000_000)) == 1000 * 1024
    assert available_bytes(meminfo, container(tmp_path, 100_000)) == 0


def test_a_container_whose_system_does_not_say_what_is_cached_has_what_is_not_used(meminfo, tmp_path):
    (container(tmp_path, 800_000) / "memory.stat").write_text("anon 400000\n")
    assert available_bytes(meminfo, tmp_path) == 300_000
    (tmp_path / "memory.stat").unlink()
    assert available_bytes(meminfo, tmp_path) == 300_000


def test_where_the_system_does_not_tell_it_is_nothing(tmp_path):
    assert available_bytes(tmp_path / "absent", tmp_path) == 0
    (tmp_path / "meminfo").write_text("MemTotal:   2000 kB\n")  # a kernel that does not estimate it
    assert available_bytes(tmp_path / "meminfo", tmp_path) == 0
