import pytest

from grpo_actors.tensor_header import header_of

HEADER = b'{"a": 1}'
LENGTH = len(HEADER).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("content", "header"),
    [
        (LENGTH + HEADER, HEADER),
        (LENGTH + HEADER + b"data", HEADER),
        (LENGTH + HEADER[:-1], None),
        (LENGTH[:4], None),
        (b"PK\x03\x04 of another kind", None),
    ],
)
def test_a_header_is_whole_or_there_is_none(tmp_path, content, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    assert header_of(file) == header
