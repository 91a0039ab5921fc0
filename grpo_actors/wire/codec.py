"""Encode messages as bytes and decode them: MessagePack within bounds, and flat arrays.

Received bytes may come from anyone, so a message is measured before it is unpacked. A length is only a claim until that
many bytes have arrived, and ten megabytes of empty maps would unpack to three quarters of a gigabyte. Nothing in a
message is executable, and `decode` raises nothing but ProtocolError.
"""

from array import array
from typing import Any, TypeVar

import msgpack
from pydantic import BaseModel, TypeAdapter, ValidationError

from grpo_actors.errors import ProtocolError

M = TypeVar("M")

MAX_MESSAGE_BYTES = 64 * 2**20
#: Bytes of one text.
MAX_TEXT = 2**22
#: Bytes of one array: a million int32.
MAX_ARRAY_BYTES = 2**22
#: Values in one message, including those in lists and maps: bounds the memory that it unpacks to.
MAX_ITEMS = 200_000
#: Nesting depth of lists and maps: a deeper value cannot even be shown in an error.
MAX_DEPTH = 16
#: Entries of one map: bounds the list of errors about unknown ones.
MAX_ENTRIES = 128
#: Characters of a part of an error text: the name of an unknown field may have millions.
MAX_ERROR_CHARS = 300

# The first bytes of MessagePack values. _WHOLE: the value is this one byte. _SCALAR_BYTES: the number of bytes that
# follow. The widths: bytes of the length field that follows, for bytes and texts, lists, and maps. Extension types are
# not used here.
_WHOLE = frozenset({0xC0, 0xC2, 0xC3, *range(0x80), *range(0xE0, 0x100)})
_SCALAR_BYTES = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_RAW_WIDTH = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_LIST_WIDTH = {0xDC: 2, 0xDD: 4}
_MAP_WIDTH = {0xDE: 2, 0xDF: 4}


def encode(message: BaseModel) -> bytes:
    """Return the wire form of a message."""
    packed: bytes = msgpack.packb(message.model_dump(round_trip=True))
    return packed


def decode(adapter: TypeAdapter[M], data: bytes) -> M:
    """Decode and validate one message.

    Raises:
        ProtocolError: the data are not MessagePack, too large, or not a message of this direction.
    """
    try:
        _measure(data)
        raw: Any = msgpack.unpackb(
            data,
            max_str_len=MAX_TEXT,
            max_bin_len=MAX_ARRAY_BYTES,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ENTRIES,
        )
        return adapter.validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:MAX_ERROR_CHARS]
        raise ProtocolError(f"message refused: {where}: {first['msg'][:MAX_ERROR_CHARS]}") from None
    except (ValueError, msgpack.UnpackException, TypeError, RecursionError) as error:
        reason = str(error)[:MAX_ERROR_CHARS]
        raise ProtocolError(f"message refused: not MessagePack within the limits: {reason}") from None


def _measure(data: bytes) -> None:
    """Check sizes and nesting by walking over the values without creating any; raise ValueError beyond a bound."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"{len(data)} bytes, at most {MAX_MESSAGE_BYTES}")
    at, items = 0, 1
    # Values still to come, on each level.
    open_: list[int] = [1]
    while open_:
        if not open_[-1]:
            open_.pop()
            continue
        if at >= len(data):
            raise ValueError("cut off")
        open_[-1] -= 1
        head = data[at]
        at += 1
        if head in _WHOLE:
            continue
        behind, inside = _extent(head, data, at)
        at += behind
        items += inside
        open_.append(inside)
        if items > MAX_ITEMS or len(open_) > MAX_DEPTH:
            raise ValueError(f"more than {MAX_ITEMS} values, or nested deeper than {MAX_DEPTH}")


def _extent(head: int, data: bytes, at: int) -> tuple[int, int]:
    """Return the extent of a value by its first byte, `head`: (bytes after that byte, values inside it)."""
    if head < 0x90:
        return 0, 2 * (head & 0x0F)
    if head < 0xA0:
        return 0, head & 0x0F
    if head < 0xC0:
        return head & 0x1F, 0
    if head in _SCALAR_BYTES:
        return _SCALAR_BYTES[head], 0
    for widths, bytes_each, values_each in ((_RAW_WIDTH, 1, 0), (_LIST_WIDTH, 0, 1), (_MAP_WIDTH, 0, 2)):
        if head in widths:
            length = int.from_bytes(data[at : at + widths[head]], "big")
            return widths[head] + bytes_each * length, values_each * length
    raise ValueError(f"type {head:#x} is not used here")


def ints(values: list[int]) -> bytes:
    """Return `values` as int32 bytes; little-endian, like every machine that MLX runs on."""
    return array("i", values).tobytes()


def floats(values: list[float]) -> bytes:
    """Return `values` as float32 bytes."""
    return array("f", values).tobytes()


def read_ints(data: bytes) -> list[int]:
    """Read the bytes that `ints` wrote."""
    return array("i", data).tolist()


def read_floats(data: bytes) -> list[float]:
    """Read the bytes that `floats` wrote."""
    return array("f", data).tolist()
