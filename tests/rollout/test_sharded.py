"""A worker whose model is divided among ranks samples what one process samples."""

from pathlib import Path

import pytest
from rank_groups import found_by_ranks
from sharded_cases import CASES

HERE = Path(__file__).parent
#: Of a log-prob, in nats: float32 products of 128 and 256 terms, added up in two parts, in each of four layers; on the
#: scale of the logits, about 10, that is 10 · √256 · 2⁻²⁴ · 4 at most.
ROUNDING = 5e-5
#: A number that is cached in 8 bits may be rounded to the next one, a part of 255 of what a group of them spans.
ROUNDING_OF_BITS = 5e-3


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return found_by_ranks(HERE / "sharded_cases.py", tmp_path_factory.mktemp("ranks"), 2)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_sample_the_tokens_of_one(found, case):
    assert found[case]["same"]
    assert found[case]["tokens"] > 100
    assert found[case]["gap"] < (ROUNDING_OF_BITS if "8 bits" in case else ROUNDING)
    assert found[case]["identity"] is None
