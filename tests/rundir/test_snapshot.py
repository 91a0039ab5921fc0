"""A checkpoint's arrays in the host's memory: the files that come of them, and when there is no memory for them."""

import time

import mlx.core as mx
import pytest
from host_copies import HostCopy
from test_tensor_files import one_of_each

from grpo_actors.rundir.snapshot import reserve, size_of
from grpo_actors.rundir.tensor_files import Remote, fetched, freeze, write_files

pytestmark = pytest.mark.gpu


def arrays_of_many_sizes():
    sizes = [1, 16, 17, 64, 200, 0, 64, 3, 128]
    arrays = {f"a{n}": mx.arange(n, n + size).astype(mx.uint8) for n, size in enumerate(sizes)}
    return arrays | one_of_each()


def written(folder, files):
    folder.mkdir()
    return write_files(folder, files)


def test_copies_in_host_memory_give_the_same_files_as_the_arrays(tmp_path):
    states = freeze("model", arrays_of_many_sizes(), shard_bytes=150), freeze("optimizer", one_of_each())
    files = [file for state in states for file in state]
    host_memory = reserve(size_of(files), HostCopy, lambda: 2 * size_of(files))
    assert host_memory.has_room(files)
    assert not host_memory.has_room([*files, *freeze("more", {"a": mx.zeros(1, mx.uint8)})])
    copies = host_memory.copy(files)
    assert not any(isinstance(tensor, mx.array) for file in copies for tensor in file.data.values())
    expected = written(tmp_path / "in-place", files)
    assert written(tmp_path / "copied", copies) == expected
    # The memory is used again.
    other = host_memory.copy(freeze("model", {"a": mx.full(size_of(files), 255, mx.uint8)}))
    assert written(tmp_path / "other", other) != expected
    assert written(tmp_path / "again", host_memory.copy(files)) == expected
    host_memory.close()


def test_arrays_of_other_processes_are_fetched_in_their_order_and_give_the_same_files(tmp_path):
    arrays, asked = arrays_of_many_sizes(), []

    def remote(name, array):
        def fetch():
            asked.append(name)
            return array

        return Remote(array.shape, array.dtype, fetch)

    mixed = {
        name: remote(name, array) if number % 2 else array
        for number, (name, array) in enumerate(arrays.items())
    }
    files, expected = freeze("state", mixed, 150), written(tmp_path / "own", freeze("state", arrays, 150))
    assert not asked, "sizes and headers need no array"
    host_memory = reserve(size_of(files), HostCopy, lambda: 2 * size_of(files))
    assert written(tmp_path / "pinned", host_memory.copy(files)) == expected
    odd = list(arrays)[1::2]
    assert asked == [name for name in odd if arrays[name].size]
    for to_host in (False, True):
        asked.clear()
        assert written(tmp_path / f"fetched-{to_host}", fetched(files, to_host=to_host)) == expected
        assert asked == odd
    host_memory.close()


def test_at_most_half_of_the_hosts_available_memory_is_reserved():
    assert reserve(4096, HostCopy, lambda: 8192) is not None
    assert reserve(4097, HostCopy, lambda: 8192) is None


def test_arrays_begin_at_multiples_of_sixteen_bytes():
    arrays = {"a": mx.zeros(17, mx.uint8), "b": mx.zeros(16, mx.uint8)}
    assert size_of(freeze("model", arrays)) == 32 + 16


def test_closed_host_memory_is_not_pinned_any_more():
    pinned = []

    def pin(memory):
        pinned.append(HostCopy(memory))
        return pinned[0]

    reserve(4096, pin, lambda: 8192).close()
    assert pinned[0].closed


def test_nothing_is_reserved_if_the_driver_pins_no_more():
    assert reserve(4096, lambda _: None, lambda: 8192) is None


@pytest.mark.skipif(not mx.cuda.is_available(), reason="memory is pinned for CUDA")
def test_a_cuda_device_copies_the_same_bytes_and_then_holds_nothing_of_them(tmp_path):
    def state():
        arrays = {f"a{n}": mx.random.normal((n + 1, 9999), key=mx.random.key(n)) for n in range(64)}
        return freeze("model", arrays | one_of_each(), shard_bytes=1 << 20)

    host_memory = reserve(size_of(state()))
    assert host_memory is not None
    before = mx.get_active_memory()
    copies = host_memory.copy(state())
    assert size_of(copies) > 64 << 20
    deadline_s = time.monotonic() + 10
    while (
        mx.get_active_memory() - before > 1 << 20
    ):  # MLX frees arrays once its own thread sees the copy's end
        assert time.monotonic() < deadline_s
        mx.synchronize()
    assert written(tmp_path / "copied", copies) == written(tmp_path / "in-place", state())
    host_memory.close()
