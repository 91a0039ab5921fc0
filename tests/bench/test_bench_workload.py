"""The lengths of prompts and completions in a workload."""

from statistics import fmean, median

import pytest

from grpo_actors.bench.workload import Shape, completion_lengths, workload
from grpo_actors.errors import ConfigError


@pytest.mark.parametrize("count", [20, 64, 1000])
def test_ragged_completions_have_the_documented_median_and_share_at_the_limit(count):
    lengths = completion_lengths(count, 1000, "log-normal")
    assert len(lengths) == count
    assert median(lengths) == pytest.approx(450, rel=0.03)
    assert sum(length == 1000 for length in lengths) == pytest.approx(count / 5, abs=1)
    assert min(lengths) >= 1


@pytest.mark.parametrize("limit", [256, 1024])
def test_recorded_completions_have_the_mean_and_the_share_at_the_limit_of_the_real_run(limit):
    lengths = completion_lengths(1000, limit, "recorded")
    assert fmean(lengths) == pytest.approx(limit * 130 / 256, rel=0.005)
    assert sum(length == limit for length in lengths) == pytest.approx(80, abs=1)


def test_lengths_of_a_file_keep_its_distribution_and_are_cut_at_the_limit(tmp_path):
    (tmp_path / "lengths.json").write_text("[30, 10, 20, 900]")
    # Quantiles at 1/8, 3/8, 5/8 and 7/8 of the three steps between 10, 20, 30 and 900: 3/8, 9/8, 15/8 and 21/8 steps.
    lengths = completion_lengths(4, 256, str(tmp_path / "lengths.json"))
    assert lengths == [14, 21, 29, 256]


@pytest.mark.parametrize("content", ["{}", "[]", "[0]", "[1.5]", "["])
def test_a_file_without_lengths_is_refused(tmp_path, content):
    (tmp_path / "lengths.json").write_text(content)
    with pytest.raises(ConfigError, match="--lengths"):
        completion_lengths(4, 256, str(tmp_path / "lengths.json"))


def test_every_call_makes_the_same_work():
    shape = Shape(groups=4, generations=3, prompt_tokens=10, tokens=7, lengths="log-normal")
    assert workload(shape, 50) == workload(shape, 50)


def test_work_without_ragged_lengths_has_exactly_the_requested_tokens():
    work = workload(Shape(groups=4, generations=3, prompt_tokens=10, tokens=7), 50)
    assert [len(prompt) for prompt in work.prompts] == [10] * 4
    assert work.lengths == [[7] * 3] * 4
    assert work.tokens == 4 * 3 * 7
    assert all(0 <= token < 50 for prompt in work.prompts for token in prompt)


def test_ragged_prompts_lie_between_half_and_all_of_the_tokens():
    work = workload(Shape(groups=5, generations=2, prompt_tokens=40, tokens=7, lengths="log-normal"), 50)
    # Five even steps from 20 to 40.
    assert sorted(len(prompt) for prompt in work.prompts) == [20, 25, 30, 35, 40]


def test_there_are_never_more_places_than_completions():
    shape = Shape(groups=2, generations=2, prompt_tokens=4, tokens=4, places=9)
    assert workload(shape, 50).places == 4
