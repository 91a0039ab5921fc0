import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_actors.objective.micro_batches import Completion, pack


def completion(prompt=3, length=4, first=1, **more):
    ids = list(range(first, first + prompt + length))
    return Completion(ids[:prompt], ids[prompt:], [-0.5] * length, more.pop("advantage", 1.0), **more)


def packed(completions, rows=4, aggregation="dapo", max_new_tokens=32, **more):
    return pack(completions, rows=rows, aggregation=aggregation, max_new_tokens=max_new_tokens, **more)


def row_lengths(update):
    """Tokens that train in each row of each micro-batch: 0 for padding."""
    return [m.mask.sum(axis=1).tolist() for m in update.micro_batches]


def test_two_completions_of_one_prompt_are_laid_out_as_documented():
    # Prompt 1 2 3, completions 4 5 6 7 and 8 9; token 3 predicts their first. P = 1, L = 32, N = 4, C = 16.
    two = [Completion([1, 2, 3], ids, [-0.5] * len(ids), 1.0) for ids in ([8, 9], [4, 5, 6, 7])]
    (m,) = packed(two).micro_batches
    assert (m.prompts.shape, m.inputs.shape) == ((1, 32), (4, 16))
    assert m.targets.shape == m.mask.shape == m.behaviour_logprobs.shape == m.token_weights.shape == (4, 16)
    assert m.prompts[0, :3].tolist() == [1, 2, 0]
    assert m.prompt_lengths.tolist() == [2]
    assert m.prompt_of.tolist() == [0, 0, 0, 0]
    assert m.inputs[:2, :5].tolist() == [[3, 4, 5, 6, 0], [3, 8, 0, 0, 0]]
    assert m.targets[:2, :5].tolist() == [[4, 5, 6, 7, 0], [8, 9, 0, 0, 0]]
    assert m.mask.sum(axis=1).tolist() == [4, 2, 0, 0]
    assert m.behaviour_logprobs[0, :5].tolist() == [-0.5] * 4 + [0.0]
    assert m.token_weights[0, :5].tolist() == pytest.approx([1 / 6] * 4 + [0.0])
    assert (m.prompts.dtype, m.targets.dtype, m.token_weights.dtype) == (np.int32, np.int32, np.float32)


lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), max_size=20)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(lengths=lengths, rows=st.integers(1, 9), groups=st.integers(1, 5))
def test_every_token_that_trains_is_packed_once_where_it_is_predicted(lengths, rows, groups):
    # Every `groups`-th completion has the same prompt.
    completions = [
        Completion([7 + i % groups] * lengths[i % groups][0], range(100 * i, 100 * i + c), [-0.5] * c, 1.0)
        for i, (_, c) in enumerate(lengths)
    ]
    update = packed(completions, rows=rows)
    seen = []
    for m in update.micro_batches:
        assert m.prompts.shape[1] % 32 == 0
        assert m.targets.shape[1] % 16 == 0
        assert len(m.inputs) <= rows
        texts = [m.prompts[p, :n].tolist() for p, n in enumerate(m.prompt_lengths)]
        used = m.mask.any(axis=1)
        held = m.targets[used, 0] // 100  # the first token names the completion
        for row, i in zip(np.flatnonzero(used), held, strict=True):
            active = m.mask[row]
            seen.append(int(i))
            c = completions[i]
            assert m.targets[row][active].tolist() == list(c.completion_ids)
            # Each input predicts the token after it.
            assert [*texts[m.prompt_of[row]], *m.inputs[row][active]] == [*c.prompt_ids, *c.completion_ids][
                :-1
            ]
        assert len({tuple(texts[p]) for p in m.prompt_of[used]}) == len(
            {tuple(completions[i].prompt_ids[:-1]) for i in held}
        )
    assert sorted(seen) == [i for i, (_, c) in enumerate(lengths) if c]
    assert sum(m.mask.sum() for m in update.micro_batches) == sum(c for _, c in lengths)
    total = sum(m.token_weights.sum() for m in update.micro_batches)
    assert total == pytest.approx(1.0 if seen else 0.0, rel=1e-5)


def test_completions_are_dealt_by_length_longest_first_and_the_same_each_time():
    completions = [completion(3, n) for n in (5, 60, 7, 58, 6, 61)]
    update = packed(completions, rows=3, row_multiple=3)
    assert row_lengths(update) == [[61, 60, 58], [7, 6, 5]]
    assert [m.inputs.shape for m in update.micro_batches] == [(3, 64), (3, 16)]
    # Positions: a prompt of 32 in each, and 3 · 64 + 3 · 16. Tokens: 2 · 2 of prompts and 197 of completions.
    assert update.padding_share == pytest.approx(1 - (2 * 2 + 197) / (2 * 32 + 240))
    assert update.tokens == 6 * 3 + 197


def group(first, prompt, *lengths):
    """Completions of a prompt that no other group has."""
    return [Completion([first] * prompt, [1] * n, [-0.5] * n, 1.0) for n in lengths]


def test_a_group_stays_together_where_its_prompt_is_long():
    # Together: 2 · (64 + 2 · 64) = 384 positions. By length: both prompts twice, 2 · 2 · 64 + 2 · 64 + 2 · 16 = 416.
    completions = group(1, 65, 64, 16) + group(2, 65, 63, 15)
    update = packed(completions, rows=2)
    assert row_lengths(update) == [[64, 16], [63, 15]]
    assert [m.prompts.shape for m in update.micro_batches] == [(1, 64)] * 2


def test_completions_of_one_length_stay_together_where_that_saves_more():
    # Together: 2 · (32 + 2 · 64) = 320 positions. By length: 2 · 2 · 32 + 2 · 64 + 2 · 16 = 288.
    completions = group(1, 33, 64, 16) + group(2, 33, 63, 15)
    update = packed(completions, rows=2)
    assert row_lengths(update) == [[64, 63], [16, 15]]
    assert [m.prompts.shape for m in update.micro_batches] == [(2, 32)] * 2


def test_without_shared_prompts_each_completion_is_counted_with_its_own():
    completions = group(1, 65, 64, 16) + group(2, 65, 63, 15)
    update = packed(completions, rows=2, shared_prompts=False)
    assert row_lengths(update) == [[64, 63], [16, 15]]
    # 2 · (64 + 64) + 2 · (64 + 16) positions hold 4 · 64 tokens of prompts and 158 of completions.
    assert update.padding_share == pytest.approx(1 - (256 + 158) / 416)


@pytest.mark.parametrize(("row_multiple", "last"), [(1, 1), (4, 4), (8, 8), (16, 8)])
def test_the_last_micro_batch_is_filled_up_with_masked_rows(row_multiple, last):
    update = packed([completion() for _ in range(9)], rows=8, row_multiple=row_multiple)
    assert [len(m.inputs) for m in update.micro_batches] == [8, last]
    assert row_lengths(update) == [[4] * 8, [4] + [0] * (last - 1)]


def test_masked_completions_are_not_computed_but_dr_grpo_counts_them():
    completions = [
        completion(first=1),
        completion(first=10, valid=False),
        completion(first=20, truncated=True),
        completion(length=0),
    ]
    update = packed(completions, aggregation="dr_grpo", max_new_tokens=10, mask_truncated=True)
    (m,) = update.micro_batches
    assert m.mask.sum(axis=1).tolist() == [4, 0, 0, 0]
    assert m.targets[0, :4].tolist() == [4, 5, 6, 7]
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
    assert few.advantages[0] == 1.0
    assert few.mask.any(axis=1).tolist() == [True, False, False, False]
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
        # The longer one first: what is computed is five tokens.
        assert m.inputs[0, :6].tolist() == [2, 4, 5, 6, 7, 0]
        assert m.targets[0, :6].tolist() == [4, 5, 6, 7, 8, 0]
        assert m.targets[1, :4].tolist() == [9, 9, 9, 0]
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
    for name in ("inputs", "targets", "mask", "behaviour_logprobs", "token_weights", "advantages"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"completion 0: sampled must be of 2 tokens, got 1"):
        packed([Completion([1], [2, 3], [-0.5] * 2, 1.0, sampled=[True])])
