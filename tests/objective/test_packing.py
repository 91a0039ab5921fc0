import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_actors.dealing import deal
from grpo_actors.objective.micro_batches import Completion, Layout, empty_micro_batch, pack


def completion(prompt=3, length=4, first=1, **more):
    ids = list(range(first, first + prompt + length))
    return Completion(ids[:prompt], ids[prompt:], [-0.5] * length, more.pop("advantage", 1.0), **more)


def packed(completions, layout=None, aggregation="dapo", max_new_tokens=32, **more):
    layout = layout or Layout(tokens=10**6, completions=10**6)
    return pack(completions, layout, aggregation=aggregation, max_new_tokens=max_new_tokens, **more)


def lengths_of(update):
    """Tokens that train of each completion in each micro-batch: 0 for padding."""
    return [m.mask.sum(axis=1).tolist() for m in update.micro_batches]


def test_two_completions_of_one_prompt_are_laid_out_as_documented():
    # Prompt 1 2 3, completions 4 5 6 7 and 8 9; token 3 predicts the first of each.
    two = [Completion([1, 2, 3], ids, [-0.5] * len(ids), 1.0) for ids in ([8, 9], [4, 5, 6, 7])]
    (m,) = packed(two).micro_batches
    assert m.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 3, 8] + [0] * 8]
    assert m.positions[0, :8].tolist() == [0, 1, 2, 3, 4, 5, 2, 3]
    assert m.prompt_of[0].tolist() == [0] * 8 + [-1] * 8
    assert m.completion_of[0, :8].tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert m.inputs_at.tolist() == [2, 3, 4, 5, 6, 7]
    assert m.targets.tolist() == [4, 5, 6, 7, 8, 9]
    assert m.target_at.shape == m.mask.shape == m.behaviour_logprobs.shape == m.token_weights.shape == (2, 16)
    assert [m.target_at[0, :4].tolist(), m.target_at[1, :2].tolist()] == [[0, 1, 2, 3], [4, 5]]
    assert m.mask.sum(axis=1).tolist() == [4, 2]
    assert m.behaviour_logprobs[0, :5].tolist() == [-0.5] * 4 + [0.0]
    assert m.token_weights[0, :5].tolist() == pytest.approx([1 / 6] * 4 + [0.0])
    assert (m.tokens.dtype, m.targets.dtype, m.token_weights.dtype) == (np.int32, np.int32, np.float32)


def test_fixed_shapes_hold_the_same_tokens_and_every_position_predicts():
    two = [Completion([1, 2, 3], ids, [-0.5] * len(ids), 1.0) for ids in ([8, 9], [4, 5, 6, 7])]
    (m,) = packed(two, Layout(tokens=64, completions=5, fixed_row=32, longest=6)).micro_batches
    assert (m.tokens.shape, m.inputs_at.shape, m.target_at.shape) == ((1, 32), (32,), (5, 16))
    assert m.tokens[0, :9].tolist() == [1, 2, 3, 4, 5, 6, 3, 8, 0]
    assert m.inputs_at.tolist() == list(range(32))
    assert m.targets[:9].tolist() == [0, 0, 4, 5, 6, 7, 8, 9, 0]
    assert [m.target_at[0, :4].tolist(), m.target_at[1, :2].tolist()] == [[2, 3, 4, 5], [6, 7]]
    assert m.mask.sum(axis=1).tolist() == [4, 2, 0, 0, 0]


def texts_of(m):
    """Yield each completion of a micro-batch that trains: its prompt, inputs and targets, as a model would see them."""
    tokens, prompts, completions = (a.ravel() for a in (m.tokens, m.prompt_of, m.completion_of))
    for n in np.flatnonzero(m.mask.any(axis=1)):
        predicted = m.target_at[n][: np.flatnonzero(m.mask[n])[-1] + 1]
        at = m.inputs_at[predicted]
        row = np.arange(len(tokens)) // m.tokens.shape[1] == at[0] // m.tokens.shape[1]
        own = row & (prompts == prompts[at[0]])
        prompt = np.flatnonzero(own & (completions == 0))
        seen = np.concatenate([prompt, np.flatnonzero(own & (completions == completions[at[0]]))])
        assert seen.tolist() == [*prompt, *at], "nothing else of this completion, and in this order"
        assert m.positions.ravel()[seen].tolist() == list(range(len(seen)))
        yield tokens[prompt].tolist(), tokens[at].tolist(), m.targets[predicted].tolist()


def needed_row(completions, layout):
    """Return the length of a row that one text needs."""
    longest = max(len(c.prompt_ids) - 1 + len(c.completion_ids) for c in completions)
    return -(-longest // (layout.fixed_row or 16)) * (layout.fixed_row or 16)


lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), max_size=20)
layouts = st.builds(
    Layout,
    tokens=st.integers(1, 300),
    completions=st.integers(1, 9),
    shared=st.booleans(),
    fixed_row=st.sampled_from([0, 32, 128]),
    longest=st.just(40),
)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(lengths=lengths, layout=layouts, groups=st.integers(1, 5))
def test_every_completion_is_packed_once_after_its_own_prompt(lengths, layout, groups):
    # Every `groups`-th completion has the same prompt.
    completions = [
        Completion([7 + i % groups] * lengths[i % groups][0], range(100 * i, 100 * i + c), [-0.5] * c, 1.0)
        for i, (_, c) in enumerate(lengths)
    ]
    update = packed(completions, layout)
    seen = []
    for m in update.micro_batches:
        rows, length = m.tokens.shape
        assert length % 16 == 0
        assert rows * length <= layout.tokens or (rows == 1 and length <= needed_row(completions, layout))
        assert m.mask.any(axis=1).sum() <= layout.completions
        if not layout.shared:
            assert m.completion_of.max() == 1
        for prompt, inputs, targets in texts_of(m):
            i = targets[0] // 100  # the first token names the completion
            seen.append(int(i))
            c = completions[i]
            assert [*prompt, *inputs] == [*c.prompt_ids, *c.completion_ids][:-1]
            assert targets == list(c.completion_ids)
    assert sorted(seen) == [i for i, (_, c) in enumerate(lengths) if c]
    assert sum(m.mask.sum() for m in update.micro_batches) == sum(c for _, c in lengths)
    total = sum(m.token_weights.sum() for m in update.micro_batches)
    assert total == pytest.approx(1.0 if seen else 0.0, rel=1e-5)


def group(first, prompt, *lengths):
    """Completions of a prompt that no other group has."""
    return [Completion([first] * prompt, [1] * n, [-0.5] * n, 1.0) for n in lengths]


def test_completions_stay_with_their_prompt_while_there_is_room():
    # Tokens: 20 + 3 · 20 of the first group, 20 + 3 · 10 of the second; a row of 80 holds the one, or the other.
    completions = group(1, 21, 20, 20, 20) + group(2, 21, 10, 10, 10)
    update = packed(completions, Layout(80, 10**6, fixed_row=80, longest=20))
    assert lengths_of(update)[0][:3] == [20, 20, 20]
    assert lengths_of(update)[1][:3] == [10, 10, 10]
    assert update.padding_share == pytest.approx(1 - (80 + 50) / 160)
    assert update.tokens == 3 * (21 + 20) + 3 * (21 + 10)


def test_without_shared_rows_each_completion_is_counted_with_its_own_prompt():
    completions = group(1, 65, 64, 16) + group(2, 65, 63, 15)
    update = packed(completions, Layout(10**6, 2, shared=False))
    assert [m.tokens.shape for m in update.micro_batches] == [(2, 128)] * 2
    # 4 · 128 positions hold 4 · 64 tokens of prompts and 158 of completions.
    assert update.padding_share == pytest.approx(1 - (256 + 158) / 512)


def test_fixed_shapes_are_halves_of_the_largest():
    # A row holds one completion: 32 · n + 1 tokens of prompt and completion need the 64 of a row.
    layout = Layout(tokens=10 * 64, completions=100, fixed_row=64, longest=32)
    shapes = {}
    for count in range(1, 21):
        update = packed([c for i in range(count) for c in group(i, 33, 32)], layout)
        shapes[count] = [m.tokens.shape for m in update.micro_batches]
    assert shapes[1] == [(1, 64)]
    assert shapes[2] == [(2, 64)]
    assert shapes[3] == [(3, 64)]
    assert shapes[4] == shapes[5] == [(5, 64)]
    assert shapes[6] == shapes[10] == [(10, 64)]
    assert shapes[13] == [(10, 64), (3, 64)]
    assert len({shape for each in shapes.values() for shape in each}) == 5


def test_a_prompt_that_is_longer_than_planned_gets_longer_rows():
    (m,) = packed(group(1, 100, 10), Layout(64, 4, fixed_row=64, longest=8)).micro_batches
    assert m.tokens.shape == (1, 128)
    assert m.target_at.shape == (4, 16)


@pytest.mark.parametrize(("longest", "shape"), [(20, (2, 32)), (33, (1, 64)), (100, (1, 128))])
def test_an_empty_micro_batch_has_the_largest_shape_and_only_padding(longest, shape):
    m = empty_micro_batch(Layout(tokens=64, completions=5, fixed_row=32, longest=6), longest)
    assert (m.tokens.shape, m.target_at.shape) == (shape, (5, 16))
    assert m.inputs_at.tolist() == list(range(shape[0] * shape[1]))
    assert not m.mask.any()
    assert (m.prompt_of == -1).all()


def test_rows_become_longer_where_that_leaves_less_room_and_no_longer_than_pays_for_attention():
    # Rows of 16 hold one completion of 9 tokens, and rows of 32 hold three: six take 96 positions or 64. One row of 64
    # would do, too, but each of its tokens sees more others.
    completions = [completion(prompt=1, length=9, first=100 * i) for i in range(6)]
    shapes = {}
    for tokens in (10**6, 16):
        shapes[tokens] = [m.tokens.shape for m in packed(completions, Layout(tokens, 10**6)).micro_batches]
    assert shapes == {10**6: [(2, 32)], 16: [(1, 16)] * 6}


def test_masked_completions_are_not_computed_but_dr_grpo_counts_them():
    completions = [
        completion(first=1),
        completion(first=10, valid=False),
        completion(first=20, truncated=True),
        completion(length=0),
    ]
    update = packed(completions, aggregation="dr_grpo", max_new_tokens=10, mask_truncated=True)
    (m,) = update.micro_batches
    assert m.mask.sum(axis=1).tolist() == [4]
    assert m.targets.tolist() == [4, 5, 6, 7]
    assert m.token_weights[0, 0] == pytest.approx(1 / 40)
    assert (update.completions, update.active) == (4, 1)
    assert packed(completions, aggregation="dr_grpo").active == 2  # truncated ones train unless masked


def test_an_update_without_anything_to_learn_has_no_micro_batch():
    assert packed([]).micro_batches == ()
    assert packed([completion(valid=False)]).micro_batches == ()
    assert packed([completion(valid=False)]).padding_share == 0.0


def test_skipping_completions_of_no_advantage_keeps_the_others_weights():
    completions = [completion(), completion(advantage=0.0)]
    (all_rows,), (few,) = (
        packed(completions).micro_batches,
        packed(completions, skip_zero_advantage=True).micro_batches,
    )
    assert all_rows.mask.any(axis=1).tolist() == [True, True]
    assert few.advantages[0] == 1.0
    assert few.mask.any(axis=1).tolist() == [True]
    assert few.token_weights[0].tolist() == all_rows.token_weights[0].tolist()


def test_a_completion_that_does_not_fit_together_is_named():
    with pytest.raises(
        ValueError, match="completion 1: every token needs one behaviour log-prob, got 2 tokens and 1"
    ):
        packed([completion(), Completion([1], [2, 3], [-1.0], 1.0)])
    with pytest.raises(ValueError, match="completion 0: the prompt must have a token"):
        packed([Completion([], [2], [-1.0], 1.0)])


# --- tokens of an environment ---------------------------------------------------------------------


def test_environment_tokens_are_inputs_and_count_in_no_length_and_no_denominator():
    # 4 5 | 6 7 | 8, where 6 7 come from an environment, and a completion of three: each has 3 sampled tokens.
    turns = Completion([1, 2], [4, 5, 6, 7, 8], [-0.5] * 5, 1.0, sampled=[True, True, False, False, True])
    plain = Completion([1, 2], [9, 9, 9], [-0.5] * 3, 1.0)
    for aggregation, weight in (("grpo", 1 / (3 * 2)), ("dapo", 1 / 6), ("dr_grpo", 1 / (2 * 32))):
        update = packed([turns, plain], aggregation=aggregation)
        (m,) = update.micro_batches
        # The longer one first: what is computed is five tokens, and the prompt once.
        assert m.tokens[0, :10].tolist() == [1, 2, 4, 5, 6, 7, 2, 9, 9, 0]
        assert m.targets.tolist() == [4, 5, 6, 7, 8, 9, 9, 9]
        assert m.mask[0, :6].tolist() == [True, True, False, False, True, False]
        assert m.behaviour_logprobs[0, :6].tolist() == [-0.5, -0.5, 0.0, 0.0, -0.5, 0.0]
        assert m.token_weights[0, :6].tolist() == pytest.approx([weight, weight, 0.0, 0.0, weight, 0.0])
        assert m.token_weights[1, :4].tolist() == pytest.approx([weight] * 3 + [0.0])
        assert m.mask.sum() == 6
        assert update.tokens == 2 + 5 + 2 + 3


def test_a_completion_all_sampled_is_packed_to_the_same_bits_with_and_without_a_mask():
    some = [completion(length=n) for n in (4, 7, 2)]
    masked = [
        Completion(
            c.prompt_ids,
            c.completion_ids,
            [-0.5] * len(c.completion_ids),
            1.0,
            sampled=[True] * len(c.completion_ids),
        )
        for c in some
    ]
    (a,), (b,) = packed(some).micro_batches, packed(masked).micro_batches
    for name in ("tokens", "targets", "mask", "behaviour_logprobs", "token_weights", "advantages"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"completion 0: sampled must be of 2 tokens, got 1"):
        packed([Completion([1], [2, 3], [-0.5] * 2, 1.0, sampled=[True])])


# --- ranks ----------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 100), max_size=12), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_every_micro_batch_goes_to_one_rank_and_none_has_much_more_than_its_part(sizes, ranks):
    dealt = deal(sizes, ranks)
    assert sorted(number for numbers in dealt for number in numbers) == list(range(len(sizes)))
    loads = [sum(sizes[number] for number in numbers) for numbers in dealt]
    # The rank that is busiest in the end was the least busy one when it got its last micro-batch.
    assert max(loads) <= sum(sizes) / ranks + max(sizes, default=0)


@pytest.mark.parametrize(
    ("rows", "ranks", "cut"),
    # Micro-batches have up to 4 rows, and each costs half a row more. 6 rows for two ranks: 4 + 2 take the busiest
    # 4 + ½, and 1 + 1 + 1 for each take 3 + 3 · ½.
    [
        (4, 1, [4]),
        (4, 2, [2, 2]),
        (4, 4, [1] * 4),
        (1, 4, [1]),
        (8, 2, [4, 4]),
        (6, 2, [4, 2]),
        (12, 2, [2] * 6),
    ],
)
def test_micro_batches_become_smaller_only_where_the_busiest_rank_then_has_less_to_do(rows, ranks, cut):
    # A row has room for one: 3 + 12 tokens without the last one, rounded up to 16.
    texts = [completion(length=12, first=100 * i) for i in range(rows)]
    update = packed(texts, Layout(tokens=64, completions=100, shared=False, ranks=ranks))
    assert [len(m.tokens) for m in update.micro_batches] == cut
