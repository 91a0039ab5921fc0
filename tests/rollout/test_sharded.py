"""A worker whose model is divided among ranks samples what one process samples."""

from pathlib import Path

import pytest
from rank_groups import found_by_ranks
from sharded_cases import CASES

HERE = Path(__file__).parent
#: Of a logit: float32 sums of 128 and 256 terms, added up in two parts, in each of four layers. On the scale of the
#: logits, about 10, and with each rounding half of 2⁻²³, that is about 10 · √256 · 2⁻²⁴ · 4.
ROUNDING = 4e-5
#: A number that is cached in 8 bits may be rounded to the next one, a part of 255 of what a group of them spans.
ROUNDING_OF_BITS = 5e-3


@pytest.fixture(scope="module")
def found():
    return found_by_ranks(HERE / "sharded_cases.py", 2)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_sample_the_tokens_of_one(found, case):
    assert found[case]["same"]
    assert found[case]["tokens"] > 20
    # Two logits of a log-prob, both divided by the temperature.
    bound = 2 * (ROUNDING_OF_BITS if "8 bits" in case else ROUNDING)
    assert found[case]["gap"] < bound / found[case]["temperature"]
    assert found[case]["identity"] is None


def test_all_ranks_take_new_weights_and_replies(found):
    assert found["new weights between two tokens"]["versions"] == [1, 2]
    assert found["an environment"]["replies"] > 0


def test_a_rank_never_holds_more_whole_matrices_than_one(found):
    # Of an unquantised model: as in the file, as float32, and its part.
    assert found["adapter"]["peak"] <= 3 * found["adapter"]["largest"]
