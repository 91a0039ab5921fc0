"""Safetensors files written by several threads: what mlx and others read, the digests, the sizes of the files."""

import hashlib

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from grpo_actors.rundir.staging import open_staging
from grpo_actors.rundir.tensor_files import THREADS, freeze, write_files


def one_of_each():
    """Return an array of every type that a model or an optimizer has, some empty, scalar or not contiguous."""
    grid = mx.arange(12).reshape(3, 4)
    arrays = {f"t.{i}": grid.astype(dtype) for i, dtype in enumerate((mx.float32, mx.float16, mx.bfloat16))}
    arrays |= {
        f"q.{i}": grid.astype(dtype) for i, dtype in enumerate((mx.uint32, mx.uint8, mx.int32, mx.bool_))
    }
    return arrays | {
        "step": mx.array(3, mx.uint64),
        "none": mx.zeros((0, 4)),
        "turned": grid.T,
        "spread": mx.broadcast_to(mx.array(2.5), (5, 2)),
    }


def read_back(folder, names):
    found = {}
    for name in names:
        found |= mx.load(str(folder / name))
    return found


def assert_equal(found, arrays):
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert mx.array_equal(found[name], array), name


def test_every_type_and_shape_comes_back_and_the_digest_is_that_of_the_file(tmp_path):
    arrays = one_of_each()
    entries = write_files(tmp_path, freeze("model", arrays))
    assert list(entries) == ["model.safetensors"]
    assert_equal(read_back(tmp_path, entries), arrays)
    content = (tmp_path / "model.safetensors").read_bytes()
    assert entries["model.safetensors"] == {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "mlx"}, "as mlx-lm writes it; transformers requires the key"
        np.testing.assert_array_equal(file.get_tensor("turned"), np.array(arrays["turned"]))


@pytest.mark.parametrize(
    ("sizes", "files"),
    [
        # 10 kB in files of at most about 4 kB: three, each of 10 / 3 kB give or take half an array.
        ([1000] * 10, [3000, 4000, 3000]),
        ([10_000], [10_000]),  # one array stays whole
        ([9000, 500, 500], [9000, 1000]),
        ([4000], [4000]),
        ([], [0]),
    ],
)
def test_large_states_become_files_of_about_equal_size(tmp_path, sizes, files):
    arrays = {f"a{n}": mx.full(size, n % 256, mx.uint8) for n, size in enumerate(sizes)}
    frozen = freeze("optimizer", arrays, shard_bytes=4000)
    assert [file.bytes for file in frozen] == files
    names = [file.name for file in frozen]
    assert names == (
        ["optimizer.safetensors"]
        if len(files) == 1
        else [f"optimizer-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    )
    write_files(tmp_path, frozen)
    assert_equal(read_back(tmp_path, names), arrays)


class HostRoom:
    """Stands for pinned memory where there is no CUDA device: copies when the arrays are stored."""

    def __init__(self, memory):
        self.memory, self.closed = memory, False

    def store(self, arrays):
        for offset, array in arrays.items():
            assert offset % 16 == 0, "the device copies 16 bytes at a time"
            self.memory[offset : offset + array.nbytes] = np.asarray(array).data
        return list(arrays.values())

    def close(self):
        self.closed = True


def test_what_passes_through_pinned_memory_in_parts_gives_the_same_files(tmp_path):
    # 64 bytes of room: arrays of 1 to 200 bytes share it, fill it exactly, or take several parts.
    arrays = {
        f"a{n}": mx.arange(n % 256, n % 256 + size).astype(mx.uint8)
        for n, size in enumerate([1, 16, 17, 64, 200, 0, 64, 3, 128])
    }
    files = freeze("model", arrays | one_of_each(), shard_bytes=150)
    rooms = []

    def pin(memory):
        rooms.append(HostRoom(memory))
        return rooms[-1]

    staging = open_staging(pin, room_bytes=64)
    assert staging is not None
    (tmp_path / "staged").mkdir()
    assert write_files(tmp_path / "staged", files, staging.read) == write_files(tmp_path, files)
    staging.close()
    assert [room.closed for room in rooms] == [True] * THREADS


def test_without_room_for_every_thread_nothing_is_pinned():
    rooms = []

    def pin(memory):
        if len(rooms) == THREADS - 1:
            return None
        rooms.append(HostRoom(memory))
        return rooms[-1]

    assert open_staging(pin, room_bytes=64) is None
    assert all(room.closed for room in rooms)


@pytest.mark.skipif(not mx.cuda.is_available(), reason="memory is pinned for CUDA")
def test_a_cuda_device_gives_the_same_files_through_pinned_memory_while_it_computes(tmp_path):
    arrays = {f"a{n}": mx.random.normal((n + 1, 999)).astype(mx.bfloat16) for n in range(64)} | one_of_each()
    files = freeze("model", arrays, shard_bytes=1 << 20)
    staging = open_staging(room_bytes=1 << 16)
    assert staging is not None
    (tmp_path / "staged").mkdir()
    staged = write_files(tmp_path / "staged", files, staging.read)
    staging.close()
    assert staged == write_files(tmp_path, files)
