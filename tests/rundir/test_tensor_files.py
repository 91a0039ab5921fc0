"""Safetensors files written by several threads: what mlx and others read, the digests, the sizes of the files."""

import hashlib
import os

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from grpo_actors.rundir.tensor_files import freeze, write_files


def one_of_each():
    """Return an array of every type that a model or an optimizer has, some empty, scalar or not contiguous."""
    grid = mx.arange(12).reshape(3, 4)
    arrays = {f"t.{i}": grid.astype(dtype) for i, dtype in enumerate((mx.float32, mx.float16, mx.bfloat16))}
    whole = (mx.uint8, mx.uint16, mx.uint32, mx.int8, mx.int16, mx.int32, mx.int64, mx.bool_)
    arrays |= {f"q.{i}": grid.astype(dtype) for i, dtype in enumerate(whole)}
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
    assert int.from_bytes(content[:8], "little") % 8 == 0, "readers map the data, which must be aligned"
    assert entries["model.safetensors"] == {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "mlx"}, "as mlx-lm writes it; transformers requires the key"
        np.testing.assert_array_equal(file.get_tensor("turned"), np.array(arrays["turned"]))


@pytest.mark.parametrize("arrays", [{}, {"none": mx.zeros(0, mx.uint8)}])
def test_a_state_without_a_byte_is_one_file(arrays):
    [file] = freeze("optimizer", arrays)
    assert (file.name, file.bytes, file.data.keys()) == ("optimizer.safetensors", 0, arrays.keys())


def test_every_file_is_on_the_disk_whole_when_it_is_told(tmp_path, monkeypatch):
    synced = {}

    def sync(descriptor):
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fsync", sync)
    arrays = {f"a{n}": mx.full(3000, n, mx.uint8) for n in range(3)}
    entries = write_files(tmp_path, freeze("model", arrays, shard_bytes=4000))
    assert len(entries) == 3
    assert synced == {(tmp_path / name).stat().st_ino: entry["bytes"] for name, entry in entries.items()}


@pytest.mark.parametrize(
    ("sizes", "files"),
    [
        # 10 kB in files of at most about 4 kB: three, each of 10 / 3 kB give or take half an array.
        ([1000] * 10, [3000, 4000, 3000]),
        ([10_000], [10_000]),  # one array stays whole
        ([9000, 500, 500], [9000, 1000]),
        ([4000], [4000]),
        ([], [0]),
        ([0], [0]),
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
