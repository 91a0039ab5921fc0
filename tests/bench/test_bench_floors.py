"""The floors' arithmetic, on a model and a machine of round numbers."""

import pytest

from grpo_actors.bench.floors import ModelSize, Rates, publication_floor_s, rollout_floor, update_floor_s

SIZE = ModelSize(weight_bytes=1000, multiplying=500, cache_bytes=8, attention_width=10, dtype="float32")
#: Products so fast that only bytes count, and the reverse.
MEMORY_BOUND = Rates(copy_bytes_per_s=100.0, flops_per_s=1e12)
COMPUTE_BOUND = Rates(copy_bytes_per_s=1e12, flops_per_s=1000.0)


def test_each_decoding_step_reads_the_weights_and_each_rows_past():
    # Two completions of 2 and 3 tokens after a prompt of 4: three steps. Tokens seen: 5 + 6 and 5 + 6 + 7.
    floor = rollout_floor(SIZE, MEMORY_BOUND, [4], [[2, 3]], places=2)
    assert floor.steps == 3
    assert floor.decode_s == pytest.approx((3 * 1000 + 29 * 8) / 100)


def test_slow_products_set_the_floor():
    floor = rollout_floor(SIZE, COMPUTE_BOUND, [4], [[2, 3]], places=2)
    # 5 tokens through 500 parameters, 2 operations each; attention: 4 operations a token seen and unit of width.
    assert floor.decode_s == pytest.approx((2 * 500 * 5 + 4 * 10 * 29) / 1000)
    # The prompt counts once, not once for each completion; a causal pass over 4 tokens: 2 · 10 · 4².
    assert floor.prefill_s == pytest.approx((2 * 500 * 4 + 2 * 10 * 16) / 1000)


def test_fewer_places_mean_more_steps():
    # Ten tokens in all. Two places need at least five steps, one place ten, and four places the longest's four.
    lengths = [[1, 2, 3, 4]]
    steps = [rollout_floor(SIZE, MEMORY_BOUND, [4], lengths, places).steps for places in (2, 1, 4)]
    assert steps == [5, 10, 4]


def test_an_update_costs_three_forward_passes_and_two_under_an_adapter():
    # Sequences of 2 and 4 tokens; attention forward 2 · 10 · (2² + 4²) = 400, three times with its gradient.
    assert update_floor_s(SIZE, COMPUTE_BOUND, [2, 4], adapter=False) == pytest.approx(
        (6 * 500 * 6 + 1200) / 1000
    )
    assert update_floor_s(SIZE, COMPUTE_BOUND, [2, 4], adapter=True) == pytest.approx(
        (4 * 500 * 6 + 1200) / 1000
    )


def test_a_version_is_copied_out_once_and_into_each_worker_with_two_more_copies_over_a_socket():
    # A copy of 50 bytes reads and writes 100 bytes in all, which takes a second.
    assert publication_floor_s(50, 100.0, fetchers=1, chunks=False) == pytest.approx(2)
    assert publication_floor_s(50, 100.0, fetchers=3, chunks=False) == pytest.approx(4)
    assert publication_floor_s(50, 100.0, fetchers=2, chunks=True) == pytest.approx(5)
