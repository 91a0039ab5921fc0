import numpy as np
import pytest

from grpo_actors.objective.shaping import overlong_penalty, top_entropy_masks


def test_the_overlong_penalty_is_a_ramp_at_the_end():
    # L_max 100, L_c 20: 0 up to 80, then −(length − 80) / 20.
    got = overlong_penalty(np.array([1, 80, 85, 90, 100, 120]), max_new_tokens=100, overlong_tokens=20)
    assert got == pytest.approx([0.0, 0.0, -0.25, -0.5, -1.0, -1.0])


def test_no_slope_is_no_penalty_and_a_slope_longer_than_the_limit_is_refused():
    assert overlong_penalty(np.array([100]), max_new_tokens=100, overlong_tokens=0).tolist() == [0.0]
    with pytest.raises(ValueError, match=r"overlong_tokens must be in \[0, 100\]"):
        overlong_penalty(np.array([1]), max_new_tokens=100, overlong_tokens=101)
    with pytest.raises(ValueError, match=r"overlong_tokens must be in \[0, 100\]"):
        overlong_penalty(np.array([1]), max_new_tokens=100, overlong_tokens=-1)


def test_the_tokens_of_highest_entropy_are_those_of_the_whole_update_however_it_is_cut():
    h, m = np.arange(10.0).reshape(2, 5), np.ones((2, 5), bool)
    m[1, 4] = False  # the highest, 9.0, is padding
    # Nine active entropies 0 … 8; the quantile 1 − 0.25 lies at 0.75 · 8 = 6.
    (whole,) = top_entropy_masks([h], [m], share=0.25)
    assert h[whole].tolist() == [6.0, 7.0, 8.0]
    parts = top_entropy_masks([h[:1], h[1:]], [m[:1], m[1:]], share=0.25)
    assert np.concatenate(parts).tolist() == whole.tolist()


def test_only_active_tokens_decide_where_the_highest_entropy_begins():
    # The median of 1, 2, 3, 4 is 2.5.
    h = np.array([[1.0, 2.0, 3.0, 4.0]])
    (kept,) = top_entropy_masks([h], [np.ones((1, 4), bool)], share=0.5)
    assert h[kept].tolist() == [3.0, 4.0]


def test_the_whole_share_keeps_all_active_tokens_and_an_empty_update_is_no_error():
    (kept,) = top_entropy_masks([np.ones((2, 3))], [np.eye(2, 3, dtype=bool)], share=1.0)
    assert kept.tolist() == np.eye(2, 3, dtype=bool).tolist()
    assert top_entropy_masks([], [], share=0.2) == []
    for share in (0, 1.01):
        with pytest.raises(ValueError, match=rf"share must be in \(0, 1\], got {share}"):
            top_entropy_masks([], [], share=share)
    with pytest.raises(ValueError, match="one shape"):
        top_entropy_masks([np.ones((2, 3))], [np.ones((2, 2), bool)], share=0.2)
    with pytest.raises(ValueError, match="shorter"):
        top_entropy_masks([np.ones((2, 3))], [], share=0.2)
