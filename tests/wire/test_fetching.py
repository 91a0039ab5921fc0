"""Requests for weights and their answers."""

import pytest

from grpo_actors.errors import ProtocolError
from grpo_actors.wire import fetching
from grpo_actors.wire import messages as wire

MANIFEST = wire.Manifest(version=3, size=0, digest="0" * 32, chunk_bytes=1, tensors=[])


def test_a_request_says_what_is_asked_for():
    assert fetching.read_request(fetching.manifest_request()) is None
    assert fetching.read_request(fetching.chunk_request(3, 5)) == (3, 5)


def test_a_chunk_says_its_index():
    assert fetching.chunk_index(fetching.chunk_header(3, 5), 3) == 5


@pytest.mark.parametrize("answer", [fetching.chunk_header(2, 5), wire.encode(MANIFEST)])
def test_anything_but_a_chunk_of_the_version_is_refused(answer):
    with pytest.raises(ProtocolError, match="asked for a chunk of version 3"):
        fetching.chunk_index(answer, 3)
