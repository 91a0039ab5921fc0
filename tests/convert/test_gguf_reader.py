"""The container of a GGUF file, written here byte by byte: what is read, and what is refused."""

import grpo_actors.policy  # noqa: F401  the fast BLAS comes before MLX

# isort: split

import struct

import numpy as np
import pytest

from grpo_actors.convert.gguf.reader import GgufFile
from grpo_actors.errors import ModelError

#: Numbers in the file of a type of metadata, and of the number format F32.
UINT32, INT32, FLOAT32, BOOL, TEXT, ARRAY, INT64, FLOAT64 = 4, 5, 6, 7, 8, 9, 11, 12
F32 = 0


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(key: str, kind: int, form: str, *values: object) -> bytes:
    return text(key.encode()) + struct.pack("<I" + form, kind, *values)


def tensor(name: str, shape: tuple[int, ...], offset: int = 0, form: int = F32) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name.encode()) + sizes + struct.pack("<IQ", form, offset)


@pytest.fixture
def gguf(tmp_path):
    """Write a file and open it: a header of entries and tensors, blanks up to a multiple of `alignment`, and data."""

    def _open(entries=(), tensors=(), data=b"", alignment=32, version=3):
        header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries))
        header += b"".join(entries) + b"".join(tensors)
        blanks = b"\0" * (-len(header) % alignment)
        (tmp_path / "a.gguf").write_bytes(header + blanks + data)
        return GgufFile(tmp_path / "a.gguf")

    return _open


def test_entries_of_all_kinds_are_read_as_what_they_mean(gguf):
    entries = [
        entry("u", UINT32, "I", 7),
        entry("i", INT64, "q", -7),
        entry("f", FLOAT32, "f", 1e-5),
        entry("d", FLOAT64, "d", 1e-5),
        entry("b", BOOL, "?", True),
        text(b"t") + struct.pack("<I", TEXT) + text("ö".encode()),
        entry("a", ARRAY, "IQ3i", INT32, 3, 1, 2, 3),
        text(b"s") + struct.pack("<IIQ", ARRAY, TEXT, 2) + text(b"x") + text(b"y"),
    ]
    file = gguf(entries)
    assert file.metadata == {
        "u": 7,
        "i": -7,
        "f": 1e-5,
        "d": 1e-5,
        "b": True,
        "t": "ö",
        "a": [1, 2, 3],
        "s": ["x", "y"],
    }
    assert file.value("i", int) == -7
    assert (file.value("u", float), type(file.value("u", float))) == (7.0, float)
    assert file.value("none", int, 3) == 3


@pytest.mark.parametrize(
    ("key", "kind", "words"),
    [
        ("none", int, "metadata key none is missing"),
        ("f", int, "f must be a usable int, got 0.5"),
        ("b", int, "b must be a usable int, got True"),
        ("u", str, "u must be a usable str, got 7"),
        ("inf", float, "inf must be a usable float, got inf"),
        ("b", float, "b must be a usable float, got True"),
    ],
)
def test_a_value_of_another_kind_is_refused(gguf, key, kind, words):
    file = gguf(
        [
            entry("f", FLOAT32, "f", 0.5),
            entry("b", BOOL, "?", True),
            entry("u", UINT32, "I", 7),
            entry("inf", FLOAT32, "f", float("inf")),
        ]
    )
    with pytest.raises(ModelError, match=words):
        file.value(key, kind)


NUMBERS = np.arange(6, dtype="<f4")


@pytest.mark.parametrize("alignment", [None, 1, 64])
def test_tensors_lie_at_their_offsets_after_the_header_and_its_blanks(gguf, alignment):
    tensors = [tensor("a", (2, 2)), tensor("b", (2,), offset=16)]
    entries = [] if alignment is None else [entry("general.alignment", UINT32, "I", alignment)]
    file = gguf(entries, tensors, NUMBERS.tobytes(), alignment=alignment or 32)
    assert file.read("a").tolist() == [[0, 1], [2, 3]]
    assert file.read("b").tolist() == [4, 5]
    assert file.type_counts() == {"F32": 2}
    # One byte less is too few.
    with pytest.raises(ModelError, match="the file ends inside tensor b"):
        gguf(entries, tensors, NUMBERS.tobytes()[:-1], alignment=alignment or 32)


def test_a_tensor_has_one_to_four_dimensions(gguf):
    assert gguf([], [tensor("a", (1, 2, 1, 3))], NUMBERS.tobytes()).read("a").shape == (1, 2, 1, 3)
    for shape in ((), (1, 1, 1, 1, 1)):
        with pytest.raises(ModelError, match=f"tensor a claims {len(shape)} dimensions"):
            gguf([], [tensor("a", shape)], NUMBERS.tobytes())


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"tensors": [tensor("a", (1,)), tensor("a", (1,))]}, "names a tensor twice"),
        ({"entries": [entry("general.alignment", UINT32, "I", 0)]}, "alignment must be ≥ 1, got 0"),
        ({"version": 1}, "version must be 2 or 3, little-endian, got 1"),
        ({"entries": [entry("a", 99, "I", 0)]}, "unknown metadata type 99"),
        ({"tensors": [tensor("a", (33,), form=8)]}, "tensor a: a row of Q8_0 must be a multiple of 32 weights, got 33"),
        ({"tensors": [tensor("a", (1,), form=999)]}, "tensor a: unknown GGML type 999"),
        # 2^40 items are not waited for.
        ({"entries": [entry("a", ARRAY, "IQ", INT32, 2**40)]}, "the file ends inside its header"),
        ({"entries": [entry("a", ARRAY, "IQ", TEXT, 2**40)]}, "the file ends inside its header"),
    ],
)  # fmt: skip
def test_a_damaged_header_is_refused_by_what_is_wrong_with_it(gguf, parts, words):
    with pytest.raises(ModelError, match=words):
        gguf(**{"data": NUMBERS.tobytes()} | parts)


def test_version_2_is_read_too(gguf):
    assert gguf(version=2).tensors == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"GGU", "not a GGUF file"),
        (b"GGUX", "not a GGUF file"),
        (b"GGUF", "the file ends inside its header"),
    ],
)
def test_what_is_no_gguf_file_is_refused(tmp_path, content, words):
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=words):
        GgufFile(tmp_path / "a.gguf")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"cannot be read: No such file or directory; give the path"):
        GgufFile(tmp_path / "a.gguf")
