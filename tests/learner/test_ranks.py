"""Several ranks take the steps of one process: real processes, over MLX's ring back end on a CPU."""

from pathlib import Path

import numpy as np
import pytest
from rank_cases import CASES
from rank_groups import found_by_ranks

HERE = Path(__file__).parent
#: Relative difference that the order of float32 additions makes in the sum of all terms, or in the largest gap of one token.
ROUNDING, ROUNDING_OF_ONE = 1e-6, 1e-4
#: Of a divided model, whose layers' products are added up in parts. A change of every weight by 6e-8 of itself, which is half a unit in
#: the last place, changes this gradient by 1.3e-5 in one process.
ROUNDING_OF_PARTS = 3e-5
#: Where the gradient is that of a second step, or of micro-batches that were cut in another way, whose widths decide how
#: float32 products are added up.
ROUNDING_OF_OTHER_SHAPES = 5e-6
OTHER_SHAPES = ("every term", "one micro-batch")
#: Metrics of time and memory, and of one process.
NOT_OF_TRAINING = ("learner_tokens_per_s", "memory_gb")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request):
    return found_by_ranks(HERE / "rank_cases.py", request.param)


@pytest.fixture
def result(found, case):
    """What the ranks found in a case."""
    if case not in found:
        pytest.skip("the embedded model is too small for as many ranks")
    return found[case]


@pytest.mark.parametrize("case", CASES)
def test_several_ranks_take_the_step_of_one(result, case):
    bound = ROUNDING_OF_OTHER_SHAPES if case in OTHER_SHAPES else ROUNDING
    assert result["gradient"] <= (ROUNDING_OF_PARTS if "divided" in case else bound)
    assert result["weights"] <= ROUNDING
    assert result["float32 weights"] <= ROUNDING
    assert len(result["marks"]) == result["size"]
    assert len(set(result["marks"])) == 1, "all ranks hold the same weights"


@pytest.mark.parametrize("case", CASES)
def test_each_rank_holds_its_share_of_the_state(result, case):
    size, held, whole = (result[key] for key in ("size", "held", "whole"))
    # Rate and step of up to two optimizers are with every rank.
    assert 0 <= sum(held) - whole <= 4 * (size - 1)
    # Arrays are divided by their elements, and for each of these adafactor and muon do not always hold the same. A rank of four has
    # one or two large ones.
    share = (1.15 if case in ("adafactor", "muon") else 1.02) if size == 2 else 1.3
    assert max(held) <= share * whole / size + 4


@pytest.mark.parametrize("case", CASES)
def test_the_metrics_are_those_of_the_whole_update(result, case):
    alone, together = result["metrics"]
    assert alone.keys() == together.keys()
    for key in alone.keys() - set(NOT_OF_TRAINING):
        if not isinstance(alone[key], float):
            assert key == "logprob_gaps" or together[key] == alone[key], key
            continue
        # A gap is the difference of two log-probs: here, on policy, it is nothing but their rounding.
        one_token = key.endswith("_max") or "gap" in key or key in ("mismatch_kl", "kl")
        np.testing.assert_allclose(
            together[key],
            alone[key],
            rtol=ROUNDING_OF_ONE if one_token else ROUNDING_OF_PARTS if "divided" in case else 5 * ROUNDING,
            atol=1e-5 if one_token else 1e-6,
            err_msg=key,
        )
