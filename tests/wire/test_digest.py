"""The digest of a version's bytes."""

import xxhash

from grpo_actors.wire import digest as module
from grpo_actors.wire.digest import digest


def test_a_digest_is_made_of_the_digests_of_all_pieces_in_order(monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", 4)
    pieces = (b"0123", b"4567", b"89")
    each = b"".join(map(xxhash.xxh3_128_digest, pieces))
    assert digest(b"".join(pieces)) == xxhash.xxh3_128_hexdigest(each)
