"""Spans of inserted tokens: which bounds they may have, and which tokens the policy sampled."""

import pytest

from grpo_actors.wire.spans import check_spans, sampled_mask


@pytest.mark.parametrize(
    ("bounds", "sampled"), [([], "ssssss"), ([1, 3], "s--sss"), ([1, 3, 4, 5], "s--s-s"), ([2, 5], "ss---s")]
)
def test_a_token_outside_of_all_spans_was_sampled(bounds, sampled):
    check_spans("inserted", bounds, 6)
    assert sampled_mask(bounds, 6) == [letter == "s" for letter in sampled]


@pytest.mark.parametrize("bounds", [[3], [1, 3, 4]])
def test_half_a_span_is_refused(bounds):
    with pytest.raises(ValueError, match=r"^inserted must be rising pairs of bounds between 0 and 6, got \["):
        check_spans("inserted", bounds, 6)
