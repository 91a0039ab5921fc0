"""What ranks tell and give each other, and how one ends when another is lost."""

import os
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from rank_groups import found_by_ranks

from grpo_actors.errors import RunError
from grpo_actors.process import EXIT_CRASH, EXIT_RANK_LOST, LIFELINE
from grpo_actors.ranks import group as module
from grpo_actors.ranks.group import RankGroup, dtype_of, join, name_of, neutral
from grpo_actors.ranks.processes import _OF_GROUP, RANK


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_sum_with_the_neutral_array_has_the_same_bits(dtype):
    array = mx.array([0.0, -0.0, 1.5, -np.inf], dtype)
    total = array + neutral(array.shape, dtype)
    assert total.dtype == dtype
    kind = mx.uint32 if dtype == mx.float32 else mx.uint16
    assert total.view(kind).tolist() == array.view(kind).tolist()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.int32])
def test_a_type_is_found_again_by_its_name(dtype):
    assert dtype_of(name_of(dtype)) == dtype


def test_ranks_tell_each_other_facts_and_give_each_other_arrays_to_the_bit():
    found = found_by_ranks(Path(__file__).with_name("rank_meeting.py"), 3)
    told = {"told": [1, None]}
    assert found["messages"] == {"rank": 0, "size": 3, "answers": [[0, None], [1, told], [2, told]]}
    # 1 + 2 + 3 = 6.
    assert found["arrays"] == {"total": [6.0, 60.0], "same": [True] * 3}


# --- a rank that is lost --------------------------------------------------------------------------


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that this process makes; one that ends at once raises SystemExit instead."""
    for name in (*_OF_GROUP, LIFELINE):
        monkeypatch.delenv(name, raising=False)
    made = []
    monkeypatch.setattr(time, "sleep", made.append)
    monkeypatch.setattr(os, "_exit", sys.exit)
    return made


@pytest.fixture
def alone(pauses):
    """A group of this process alone."""
    return RankGroup(mx.distributed.init(strict=False))


def test_a_collective_that_fails_raises_after_another_ranks_end_would_have_ended_this_process(pauses, alone):
    with pytest.raises(RuntimeError, match="reset by peer"), alone.computing():
        raise RuntimeError("reset by peer")
    assert pauses == [module._SETTLE_S]


@pytest.mark.parametrize(
    ("rank", "codes"), [(0, [EXIT_CRASH, EXIT_RANK_LOST]), (2, [EXIT_CRASH, EXIT_CRASH])]
)
def test_a_rank_ends_when_its_link_breaks(alone, monkeypatch, capsys, rank, codes):
    alone.rank, found = rank, []
    for lifeline in ("", "0"):
        if lifeline:
            monkeypatch.setenv(LIFELINE, lifeline)
        with pytest.raises(SystemExit) as ended:
            alone._lost()
        found.append((ended.value.code, capsys.readouterr().err))
    # Of a supervised run, rank 0 alone says it.
    said = ["rank 2: rank 0 has ended\n", ""] if rank else 2 * ["the connection to another rank is lost\n"]
    assert found == list(zip(codes, said, strict=True))


def test_a_rank_of_this_host_has_time_to_end_rank_0_with_its_exit_code(pauses, alone):
    with pytest.raises(SystemExit):
        alone._lost()
    assert pauses == [module._EXIT_CODE_S]


@pytest.mark.usefixtures("pauses")
def test_ranks_that_cannot_meet_are_one_line_and_rank_0_ends_as_if_it_had_lost_one(monkeypatch, capsys):
    def fails(*, strict):
        assert strict, "else a rank would be alone, and not know it"
        raise RuntimeError("[ring] no route\nto host")

    monkeypatch.setattr(mx.distributed, "init", fails)
    monkeypatch.setenv(RANK, "1")
    with pytest.raises(RunError, match=r"^the ranks cannot meet: \[ring\] no route$"):
        join()
    monkeypatch.setenv(RANK, "0")
    with pytest.raises(SystemExit) as ended:
        join()
    assert (capsys.readouterr().err, ended.value.code) == (
        "the ranks cannot meet: [ring] no route\n",
        EXIT_CRASH,
    )
