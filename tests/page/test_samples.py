"""Samples: both files, their filter, tokens and advantages."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
from recorded import RecordedRun, group, record_run, reward_of

from grpo_actors.errors import ConfigError, DataError
from grpo_actors.page.sample_filter import SampleFilter
from grpo_actors.page.samples import Samples

EVERYTHING = SampleFilter()
#: The completions' rewards: right, right, wrong in the right form, neither.
REWARDS = (1.2, 1.2, 0.2, 0.0)


@pytest.fixture
def opened(run_dir) -> Iterator[Callable[..., Samples]]:
    """A function that records three updates and opens their samples."""
    with ExitStack() as stack:

        def record(**options: Any) -> Samples:
            with closing(RecordedRun(run_dir, **options)) as run:
                for update in (1, 2, 3):
                    run.update(update)
            samples = stack.enter_context(closing(Samples(run_dir, run.config)))
            assert not samples.catch_up()
            return samples

        yield record


def test_recorded_groups_are_listed_newest_first_with_rewards_and_sampled_lengths(opened):
    samples = opened()
    assert (samples.unit, len(samples.entries)) == ("tokens", 6)
    newest = samples.listed(samples.find(EVERYTHING)[0])
    assert (newest["update"], newest["problem"]) == (3, "add-3-1")
    assert newest["rewards"] == pytest.approx(REWARDS)
    shown = samples.read(5)
    assert [c.length for c in shown.completions] == list(newest["lengths"])


def test_a_group_has_its_tokens_with_log_probs_and_the_environments_are_marked(opened):
    shown = opened().read(0)
    turns = shown.completions[1]
    assert "".join(turns.pieces) == (
        "<answer>6</answer><|user|>Use the tags.<|end|><|assistant|><reasoning>2+3=5.</reasoning><answer>5</answer><|end|>"
    )
    start, stop = turns.inserted
    assert "".join(turns.pieces[start:stop]) == "<|user|>Use the tags.<|end|><|assistant|>"
    assert [x is None for x in turns.logprobs] == [
        start <= place < stop for place in range(len(turns.pieces))
    ]
    assert turns.length == len(turns.pieces) - (stop - start)
    # Of this completion only: the others were not computed.
    assert turns.log_ratios == [0.1 * (place % 3 == 0) for place in range(len(turns.pieces))]
    assert [len(c.log_ratios) for c in shown.completions if c is not turns] == [0, 0, 0]


def test_advantages_are_those_of_the_runs_objective(opened):
    shown = opened().read(2)
    # (R − mean) / (sample deviation + 1e-4): mean 0.65; squares 2 · 0.3025 + 0.2025 + 0.4225 = 1.23, / 3 = 0.41, root 0.6403.
    expected = [(reward - 0.65) / (0.41**0.5 + 1e-4) for reward in REWARDS]
    assert [c.advantage for c in shown.completions] == pytest.approx(expected, rel=1e-5)


def test_without_recorded_groups_the_texts_are_shown_with_the_same_rewards_and_advantages(opened):
    samples = opened(groups=False)
    assert (samples.unit, len(samples.entries)) == ("characters", 3)
    shown = samples.read(0)
    assert [c.reward for c in shown.completions] == pytest.approx(REWARDS)
    assert [c.truncated for c in shown.completions] == [False, False, False, True]
    assert shown.completions[2].pieces == ["<answer>6</answer>"]
    assert shown.completions[3].advantage == pytest.approx((0 - 0.65) / (0.41**0.5 + 1e-4), rel=1e-5)


def test_an_advantage_that_other_groups_decide_is_unknown_where_only_some_are_logged(opened):
    samples = opened(groups=False, advantage="batch")
    assert {c.advantage for c in samples.read(0).completions} == {None}


def test_a_group_matches_if_one_completion_is_within_all_bounds(opened):
    samples = opened()
    assert samples.find(SampleFilter(update_min=2, update_max=2)) == [3, 2]
    assert len(samples.find(SampleFilter(reward_min=0.1, reward_max=0.3))) == 6
    assert samples.find(SampleFilter(reward_min=0.3, reward_max=1.1)) == []
    wrong = samples.read(0).completions[2].length
    assert len(samples.find(SampleFilter(reward_max=0.3, length_max=wrong))) == 6
    # Only the wrong answers are that short.
    assert samples.find(SampleFilter(reward_min=1.0, length_max=wrong)) == []
    assert samples.find(EVERYTHING, limit=2) == [5, 4]


def test_a_completion_without_a_reward_is_shown_unless_rewards_are_bounded():
    assert EVERYTHING.allows(None, 3)
    assert not SampleFilter(reward_min=0).allows(None, 3)


def test_bounds_come_from_an_address_and_a_word_is_refused():
    assert SampleFilter.parse({"reward_min": "0.5", "length_max": "", "run": "0"}) == SampleFilter(
        reward_min=0.5
    )
    with pytest.raises(ConfigError, match="must be a number"):
        SampleFilter.parse({"update_min": "ten"})


def test_the_index_follows_a_file_that_grows_and_one_that_a_resume_cut(run_dir):
    with closing(RecordedRun(run_dir)) as run, closing(Samples(run_dir, run.config)) as samples:
        run.update(1)
        samples.catch_up()
        run.update(2)
        samples.catch_up()
        assert [entry.update for entry in samples.entries] == [1, 1, 2, 2]
        groups = run_dir / "groups.jsonl"
        groups.write_bytes(b"".join(groups.read_bytes().splitlines(keepends=True)[:2]))
        samples.catch_up()
        assert [entry.update for entry in samples.entries] == [1, 1]
        with pytest.raises(DataError, match="has 2 groups, got position 2"):
            samples.read(2)


def test_the_recorded_groups_have_these_rewards():
    assert [reward_of(c) for c in group(1, 0).completions] == pytest.approx(REWARDS)


def test_samples_of_a_run_with_unknown_settings_are_texts(run_dir):
    with closing(Samples(record_run(run_dir, updates=2), None)) as samples:
        samples.catch_up()
        # Without settings there are only texts and their rewards.
        assert (samples.unit, samples.read(0).completions[0].advantage) == ("characters", None)
