"""GGML's number formats: decode the bytes of a tensor to float32.

The six common formats are decoded here, exactly (every value is a float16 scale times a small integer,
which float32 holds; only Q4_1's sum rounds), so that a plain installation converts common files, in half the time of
``gguf.quants`` 0.19: all of SmolLM2-135M in Q4_1 takes 0.7 s against 1.5 s, to the same bits. The rest (K-quants, IQ, Q5, MXFP4, …) goes through the
``gguf`` package, an optional extra. Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from grpo_actors.errors import ModelError

Raw = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class Format(NamedTuple):
    """One format: `block_bytes` bytes hold `block_size` weights of one row; `decode` takes (blocks, block_bytes)."""

    name: str
    block_size: int
    block_bytes: int
    decode: Callable[[Raw], Floats]


def _float16(raw: Raw) -> Floats:
    return raw.view("<f2").astype(np.float32)


def _bfloat16(raw: Raw) -> Floats:
    # bfloat16 is the upper half of float32.
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _nibbles(raw: Raw) -> Floats:
    """Unpack 16 bytes to 32 integers 0..15: low halves are weights 0..15, high halves 16..31."""
    return np.concatenate([raw & 0x0F, raw >> 4], axis=1).astype(np.float32)


def _q4_0(raw: Raw) -> Floats:
    return _float16(raw[:, :2].copy()) * (_nibbles(raw[:, 2:]) - 8)


def _q4_1(raw: Raw) -> Floats:
    scale, minimum = _float16(raw[:, :2].copy()), _float16(raw[:, 2:4].copy())
    return scale * _nibbles(raw[:, 4:]) + minimum


def _q8_0(raw: Raw) -> Floats:
    return _float16(raw[:, :2].copy()) * raw[:, 2:].copy().view(np.int8).astype(np.float32)


#: Type number in the file -> format.
NATIVE = {
    0: Format("F32", 1, 4, lambda raw: raw.view("<f4").astype(np.float32)),
    1: Format("F16", 1, 2, _float16),
    2: Format("Q4_0", 32, 18, _q4_0),
    3: Format("Q4_1", 32, 20, _q4_1),
    8: Format("Q8_0", 32, 34, _q8_0),
    30: Format("BF16", 1, 2, _bfloat16),
}


def type_name(type_number: int) -> str:
    """Return the format's name in GGML, such as ``Q4_K``."""
    if type_number in NATIVE:
        return NATIVE[type_number].name
    return str(_gguf_type(_gguf_package(type_number), type_number).name)


def byte_count(type_number: int, shape: tuple[int, ...]) -> int:
    """Return the size of a tensor in bytes.

    Raises:
        ModelError: the type is unknown or needs the ``gguf`` package, or its block size does not divide the row.
    """
    if type_number in NATIVE:
        _, block_size, block_bytes, _ = NATIVE[type_number]
    else:
        package = _gguf_package(type_number)
        block_size, block_bytes = package.GGML_QUANT_SIZES[_gguf_type(package, type_number)]
    if shape[-1] % block_size:
        raise ModelError(
            f"a row of {type_name(type_number)} must be a multiple of {block_size} weights, got {shape[-1]}"
        )
    return math.prod(shape) // block_size * block_bytes


def decode(raw: Raw, type_number: int, shape: tuple[int, ...]) -> Floats:
    """Decode the bytes of one tensor to float32 of `shape`; raises ModelError as `byte_count` does."""
    if type_number in NATIVE:
        form = NATIVE[type_number]
        return form.decode(np.ascontiguousarray(raw).reshape(-1, form.block_bytes)).reshape(shape)
    package = _gguf_package(type_number)
    kind = _gguf_type(package, type_number)
    rows = math.prod(shape[:-1])
    try:
        decoded = package.quants.dequantize(np.ascontiguousarray(raw).reshape(rows, -1), kind)
    except NotImplementedError:
        raise ModelError(f"GGML type {kind.name} holds no weights that can be decoded") from None
    return np.asarray(decoded, dtype=np.float32).reshape(shape)


def _gguf_package(type_number: int) -> Any:
    try:
        import gguf  # noqa: PLC0415  an optional extra, needed by the rarer formats only
        import gguf.quants  # noqa: PLC0415
    except ImportError:
        known = ", ".join(form.name for form in NATIVE.values())
        raise ModelError(
            f"GGML type {type_number} needs the gguf package: pip install 'grpo-actors[gguf]' "
            f"(without it: {known})"
        ) from None
    return gguf


def _gguf_type(package: Any, type_number: int) -> Any:
    try:
        return package.GGMLQuantizationType(type_number)
    except ValueError:
        raise ModelError(f"unknown GGML type {type_number}; a newer gguf package may know it") from None
