"""The cores and the memory that a process may use, read from files as Linux writes them."""

import os

import pytest

from grpo_actors.host import available_bytes, cores, memory_bytes


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


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max 100000", 4), ("150000 100000", 2), ("25000 100000", 1), ("900000 100000", 4)],
)
def test_a_container_has_as_many_cores_as_its_share_of_time_keeps_busy(
    tmp_path, monkeypatch, limit, expected
):
    monkeypatch.setattr(os, "sched_getaffinity", {0: set(range(4))}.__getitem__, raising=False)
    assert cores(tmp_path) == 4  # not in a container
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert cores(tmp_path) == expected


@pytest.mark.parametrize(("count", "expected"), [(6, 6), (None, 1)])
def test_where_a_process_is_bound_to_no_cores_all_of_the_host_count(tmp_path, monkeypatch, count, expected):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert cores(tmp_path) == expected


def test_a_container_has_the_memory_that_it_may_take(tmp_path):
    of_host = memory_bytes(tmp_path)
    assert of_host == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_bytes(container(tmp_path, "max")) == of_host
    assert memory_bytes(container(tmp_path, 800_000)) == 800_000
    assert memory_bytes(container(tmp_path, 2 * of_host)) == of_host
