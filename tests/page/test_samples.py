"""Samples: both files, their filter, tokens and advantages."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
from recorded import TOKENIZER, RecordedRun, group, record_run, reward_of

from grpo_actors.errors import ConfigError, DataError
from grpo_actors.page.sample_filter import SampleFilter
from grpo_actors.page.samples import Samples
from grpo_actors.page.tokens import Pieces
from grpo_actors.policy.locate import EMBEDDED

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
    assert [c.truncated for c in shown.completions] == [False, False, False, True]
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
        assert samples.read(0).problem == "add-1-0"
        with pytest.raises(DataError, match="has 2 groups, got position 2"):
            samples.read(2)


def test_a_group_in_the_middle_of_an_update_has_its_own_completions(opened):
    samples = opened()
    shown = [samples.read(position) for position in range(6)]
    assert [(one.update, one.problem) for one in shown] == [
        (update, f"add-{update}-{index}") for update in (1, 2, 3) for index in (0, 1)
    ]
    first = shown[0].as_json()
    assert (first["worker"], first["answer"], first["source"]) == ("rollout-0", "5", "")
    assert first["messages"] == [{"role": "user", "content": "What is 2+3?"}]
    for position in (-1, 6):
        with pytest.raises(DataError, match=f"has 6 groups, got position {position}"):
            samples.read(position)


def test_log_probs_have_four_decimals_and_ends_of_thinking_are_pieces_that_were_not_sampled(run_dir):
    with closing(RecordedRun(run_dir)) as run:
        run.update(1)
    file = run_dir / "groups.jsonl"
    line, *_ = file.read_bytes().splitlines()
    recorded = json.loads(line)
    recorded["completions"][0]["logprobs"][0] = -0.123456
    recorded["completions"][0]["forced"] = [1, 3, 4, 6]
    file.write_bytes(json.dumps(recorded).encode() + b"\n")
    with closing(Samples(run_dir, run.config)) as samples:
        samples.catch_up()
        completion = samples.read(0).completions[0]
    assert [x is None for x in completion.logprobs[:7]] == [False, True, True, False, True, True, False]
    assert completion.logprobs[0] == -0.1235
    assert completion.forced == [1, 3, 4, 6]
    assert completion.length == samples.listed(0)["lengths"][0] == len(completion.pieces) - 4


def test_only_rewards_with_a_weight_count_and_a_completion_without_any_has_none(run_dir):
    with closing(RecordedRun(run_dir)) as run:
        run.update(1)
    functions = {"correctness": 0.0, "strict_format": 0.5}
    config = run.config.model_copy(
        update={"reward": run.config.reward.model_copy(update={"functions": functions})}
    )
    file = run_dir / "groups.jsonl"
    recorded = json.loads(file.read_bytes().splitlines()[0])
    recorded["completions"][0]["rewards"] = {"correctness": 1.0, "strict_format": None}
    file.write_bytes(json.dumps(recorded).encode() + b"\n")
    with closing(Samples(run_dir, config)) as samples:
        samples.catch_up()
        assert samples.listed(0)["rewards"] == (None, 0.5, 0.5, 0.0)


def test_lines_that_are_no_group_are_left_out(run_dir):
    with closing(RecordedRun(run_dir, groups=False)) as run:
        run.update(1)
    (run_dir / "groups.jsonl").write_text('no JSON\n[]\n{"completions": 3}\n{"completions": []}\n')
    with closing(Samples(run_dir, run.config)) as samples:
        samples.catch_up()
        assert (samples.has_tokens, samples.entries) == (True, [])
    texts = run_dir / "completions.jsonl"
    odd = b'{"seq": 9, "time": 1, "topic": "sample", "completions": %b}\n'
    texts.write_bytes(b"no record\n" + odd % b"3" + odd % b"[]" + odd % b'[7, {"text": "four"}]')
    with closing(Samples(run_dir, None)) as samples:
        samples.catch_up()
        assert samples.has_tokens is False
        [entry] = samples.entries
        assert (entry.update, entry.problem, entry.rewards, entry.lengths) == (0, "None", (None,), (4,))
        assert (samples.read(0).update, samples.read(0).completions[0].truncated) == (0, False)


def test_a_group_has_the_advantages_of_all_groups_of_its_update_and_of_no_other(run_dir):
    with closing(RecordedRun(run_dir, advantage="batch")) as run:
        for update in (1, 2, 3):
            run.update(update)
    file = run_dir / "groups.jsonl"
    groups = [json.loads(line) for line in file.read_bytes().splitlines()]
    # Two updates of three groups each; the first and the last group of each differ from the others.
    for place, changed in enumerate(groups):
        changed["update"] = 1 + place // 3
        changed["completions"][0]["rewards"]["correctness"] = (5.0, 1.0, 9.0)[place % 3]

    def advantages(shown: list[Any]) -> list[list[float | None]]:
        file.write_text("".join(f"{json.dumps(one)}\n" for one in shown))
        with closing(Samples(run_dir, run.config)) as samples:
            samples.catch_up()
            return [[c.advantage for c in samples.read(n).completions] for n in range(len(shown))]

    apart = [*advantages(groups[:3]), *advantages(groups[3:])]
    assert apart[1] != advantages(groups[1:2])[0], "the others count"
    groups[2]["completions"][0]["rewards"]["correctness"] = 7.0
    apart[:3] = advantages(groups[:3])
    assert advantages(groups) == apart


def test_an_index_is_made_in_slices(opened):
    samples = opened()
    with closing(Samples(samples._source.file.parent, samples._source._config)) as again:
        assert again.catch_up(-1.0), "one line is read in any case"
        assert len(again.entries) == 1
        assert not again.catch_up()
        assert again.entries == samples.entries


def test_an_advantage_that_lengths_in_tokens_decide_is_unknown_of_texts(opened):
    samples = opened(groups=False, overlong_tokens=5)
    assert {c.advantage for c in samples.read(0).completions} == {None}


def test_filters_include_their_bounds():
    bounds = SampleFilter(update_min=1, update_max=2, reward_min=0, reward_max=1, length_min=3, length_max=4)
    assert [bounds.allows_update(update) for update in (0, 1, 2, 3)] == [False, True, True, False]
    assert [bounds.allows(reward, 3) for reward in (-0.1, 0, 1, 1.1, None)] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert [bounds.allows(1, length) for length in (2, 3, 4, 5)] == [False, True, True, False]
    assert not SampleFilter(reward_max=1).allows(None, 3)
    assert bounds.matches(1, [5, 1], [3, 3])
    assert not bounds.matches(1, [5, 1], [3, 5])
    assert not bounds.matches(3, [1], [3])


@pytest.mark.parametrize("end", ["5", "ü€😀", "<|end|>ü"])
def test_the_texts_of_tokens_are_the_whole_text_also_if_it_ends_within_a_character(end):
    pieces = Pieces(EMBEDDED / "tokenizer.json")
    tokens = TOKENIZER.encode(f"2+3={end}").ids
    assert "".join(pieces.split(tokens)) == TOKENIZER.decode(tokens, skip_special_tokens=False)
    assert len(pieces.split(tokens)) == len(tokens)
    cut = tokens[:-1]
    assert "".join(pieces.split(cut)) == TOKENIZER.decode(cut, skip_special_tokens=False)
    assert pieces.split([]) == []


def test_the_tokenizer_is_that_of_the_newest_checkpoint_else_that_of_the_model(tmp_path):
    assert Pieces.of_run(tmp_path, "tiny")._file == EMBEDDED / "tokenizer.json"
    for name in ("", "owner/never-downloaded", str(tmp_path / "none")):
        assert Pieces.of_run(tmp_path, name) is None
    for update in ("9", "10", "11", "12.tmp"):
        folder = tmp_path / f"checkpoint-{update}"
        folder.mkdir()
        if update != "11":
            (folder / "tokenizer.json").touch()
    assert Pieces.of_run(tmp_path, "tiny")._file == tmp_path / "checkpoint-10" / "tokenizer.json"


def test_the_recorded_groups_have_these_rewards():
    assert [reward_of(c) for c in group(1, 0).completions] == pytest.approx(REWARDS)


def test_samples_of_a_run_with_unknown_settings_are_texts(run_dir):
    with closing(Samples(record_run(run_dir, updates=2), None)) as samples:
        samples.catch_up()
        # Without settings there are only texts and their rewards.
        assert (samples.unit, samples.read(0).completions[0].advantage) == ("characters", None)
