import mlx.core as mx
import numpy as np
import pytest

from grpo_actors.errors import ModelError, ProtocolError
from grpo_actors.policy.weights import digest, freeze, pack, unpack
from grpo_actors.wire.messages import Manifest


def version_of(arrays):
    manifest, data = pack(freeze(3, arrays), 1024)
    return manifest, bytearray(data)


def mixed():
    rng = np.random.default_rng(0)
    values = mx.array(rng.normal(0, 100, (5, 7)).astype(np.float32))
    return {
        "layers.0.weight": values,
        "half": values.astype(mx.float16),
        "brain": values.astype(mx.bfloat16),
        "scalar": mx.array(1.5),
        "scalar.brain": mx.array(1.5, mx.bfloat16),
        "empty": mx.zeros((0, 3)),
        "empty.brain": mx.zeros((2, 0), mx.bfloat16),
        "packed": mx.array(rng.integers(0, 2**32, 6, dtype=np.uint32)),
        "bytes": mx.array(rng.integers(0, 256, 3, dtype=np.uint8)),  # the next array is not aligned
        "turned": values.T,
        "strided": values[:, ::2],
        "odd": mx.array([float("nan"), float("inf"), -0.0, 1e-45]),
        "odd.brain": mx.array([float("nan"), float("inf"), -0.0, 1e-40]).astype(mx.bfloat16),
    }


def bits(array):
    kinds = {4: mx.uint32, 2: mx.uint16, 1: mx.uint8}
    return np.array(array.reshape(-1).view(kinds[array.dtype.size])).tolist()


def test_every_array_comes_back_bit_for_bit():
    arrays = mixed()
    manifest, data = version_of(arrays)
    back = unpack(manifest, data)
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape), name
        if array.size:
            assert bits(back[name]) == bits(mx.contiguous(array)), name


def test_a_version_may_be_empty():
    assert unpack(*version_of({})) == {}


def test_one_flipped_bit_anywhere_is_refused():
    manifest, data = version_of(mixed())
    for index in range(0, len(data), 37):
        damaged = bytearray(data)
        damaged[index] ^= 1 << (index % 8)
        with pytest.raises(ProtocolError, match="digest"):
            unpack(manifest, damaged)


def test_missing_and_extra_bytes_are_refused():
    manifest, data = version_of(mixed())
    for wrong in (data[:-1], data + b"\0", bytearray()):
        with pytest.raises(ProtocolError):
            unpack(manifest, wrong)


def entry(name, shape, offset, dtype="float32"):
    return {"name": name, "dtype": dtype, "shape": shape, "offset": offset}


@pytest.mark.parametrize(
    "tensors",
    [
        [entry("a", [5], 0)],  # 20 of 16 bytes
        [entry("a", [2], 0), entry("b", [2], 12)],  # a gap, and beyond the end
        [entry("a", [4], 0), entry("b", [4], 0)],  # overlapping
        [entry("a", [2], 8), entry("b", [2], 0)],  # in another order
        [entry("a", [2], 0), entry("a", [2], 8)],  # one name twice
        [entry("a", [2], 0)],  # 8 bytes belong to no tensor
        [entry("a", [4], 2**52)],
        [entry("a", [2**32, 2**32, 4], 0)],  # 2^66 elements: 0 in 64-bit integers
        [entry("a", [2**40], 0, "uint8")],
        [],
    ],
)
def test_a_manifest_with_wrong_tensors_is_refused(tensors):
    data = bytearray(16)
    manifest = Manifest.model_validate(
        {"version": 1, "size": 16, "digest": digest(data), "chunk_bytes": 8, "tensors": tensors}
    )
    with pytest.raises(ProtocolError):
        unpack(manifest, data)


def test_weights_reach_another_process_policy_unchanged(tiny, tiny_lora):
    for policy in (tiny, tiny_lora):
        moved = {name: array + 0.01 for name, array in policy.trainable().items()}
        policy.load_trainable(unpack(*version_of(moved)))
        assert all(mx.array_equal(array, moved[name]) for name, array in policy.trainable().items())


@pytest.mark.parametrize("fault", ["missing", "added", "renamed", "reshaped"])
def test_weights_that_do_not_fit_change_nothing(tiny, fault):
    before = tiny.trainable()
    arrays = {name: array + 1 for name, array in before.items()}
    last = list(arrays)[-1]
    if fault == "missing":
        del arrays[last]
    elif fault == "added":
        arrays["another"] = mx.zeros(3)
    elif fault == "renamed":
        arrays["another"] = arrays.pop(last)
    else:
        arrays[last] = mx.zeros((2, 2))
    with pytest.raises(ModelError, match="another" if fault in {"added", "renamed"} else last):
        tiny.load_trainable(arrays)
    after = tiny.trainable()
    assert all(mx.array_equal(array, after[name]) for name, array in before.items())


def test_weights_are_cast_to_the_type_of_the_receiver(tiny):
    halves = {name: array.astype(mx.bfloat16) for name, array in tiny.trainable().items()}
    tiny.load_trainable(halves)
    assert {array.dtype for array in tiny.trainable().values()} == {mx.float32}
    assert all(mx.array_equal(array, halves[name]) for name, array in tiny.trainable().items())
