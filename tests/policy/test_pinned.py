"""Pinned memory: the device itself copies between its arrays and the host's memory; only CUDA does this."""

import mmap

import mlx.core as mx
import numpy as np
import pytest
from test_weights import bits, mixed

from grpo_actors.policy.pinned import pin
from grpo_actors.policy.weights import freeze, pack, unpack

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(mx.cuda.is_available(), reason="CUDA pins memory")
def test_nothing_is_pinned_without_cuda():
    assert pin(memoryview(mmap.mmap(-1, 4096))) is None


@pytest.mark.skipif(not mx.cuda.is_available(), reason="memory is pinned for CUDA")
def test_a_version_passes_through_pinned_memory_bit_for_bit_as_without_it():
    arrays = mixed()
    frozen = freeze(3, arrays)
    buffer = memoryview(mmap.mmap(-1, mmap.PAGESIZE + frozen.size))[mmap.PAGESIZE :]
    pinned = pin(buffer)
    assert pinned is not None
    manifest, data = pack(frozen, 1024, buffer, pinned)
    plain_manifest, plain = pack(frozen, 1024)
    assert bytes(data) == bytes(plain)
    assert manifest.digest == plain_manifest.digest
    back = unpack(manifest, data, of_this_host=True, pinned=pinned)
    for name, array in arrays.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape), name
        if array.size:
            assert bits(back[name]) == bits(mx.contiguous(array)), name
    pinned.close()
    assert np.frombuffer(buffer, np.uint8).size == frozen.size
