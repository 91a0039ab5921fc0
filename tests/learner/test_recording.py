"""groups.jsonl: what is written reads back the same, is cut where a run continues, and is checked line by line."""

import dataclasses
import json
import os
from array import array
from types import MappingProxyType

import pytest

from grpo_actors.errors import DataError, RunError
from grpo_actors.learner.groups import SampledCompletion, SampledGroup
from grpo_actors.learner.recording import GroupsFile, Recording
from grpo_actors.rundir.folder import GROUPS_FILE
from grpo_actors.tasks.task import Problem

#: float32 values with long decimals, the smallest and the largest ones, and a zero.
LOGPROBS = array("f", [-0.1, -1 / 3, -1e-45, -3.4e38, 0.0]).tolist()


def group(lease: int) -> SampledGroup:
    columns = {"operands": [1, 2], "share": 0.1, "none": None, "large": 10**30, "text": "é \u2028 \x7f"}
    completion = SampledCompletion(
        tokens=[5, 6, 7, 8, 1],
        logprobs=LOGPROBS,
        versions=[0, 0, 1, 1, 1],
        finished=lease % 2 == 0,
        rewards={"correctness": 1.0, "own.py:brevity": 0.1, "none": None},
        inserted=[1, 2, 3, 4],
        extra={"text": "é", "whole": 1, "part": 0.1, "flag": True, "none": None},
    )
    messages = ({"role": "system", "content": "s"}, {"role": "user", "content": f"{lease}?"})
    problem = Problem(f"p{lease}", messages, "3", columns)
    return SampledGroup(lease, 0, problem, [2, 9], "w", [completion] * 2, logged={"tests passed": [0.1, 3.0]})


def written(folder, updates, after_update=0, log_ratios=MappingProxyType({})):
    """Write a file with two groups for each update; return its path."""
    file = GroupsFile(folder, after_update=after_update)
    for update in updates:
        file.write(update, 20, [group(2 * update), group(2 * update + 1)], log_ratios)
    file.sync()
    file.close()
    return folder / GROUPS_FILE


def sampled(recorded):
    """Return the group of a line, without the fields that the recording has added."""
    names = [field.name for field in dataclasses.fields(SampledGroup)]
    return SampledGroup(**{name: getattr(recorded, name) for name in names})


def test_what_is_written_reads_back_the_same_to_the_last_bit(run_dir):
    path = written(run_dir, [1, 2])
    with Recording(path) as recording:
        groups = recording.take(10)
    assert [sampled(line) for line in groups] == [group(lease) for lease in (2, 3, 4, 5)]
    assert [line.update for line in groups] == [1, 1, 2, 2]
    assert {line.planned_groups for line in groups} == {20}
    assert array("f", groups[0].completions[0].logprobs).tobytes() == array("f", LOGPROBS).tobytes()


def test_log_ratios_stand_beside_the_completions_that_were_computed_without_their_padding(run_dir):
    # Completions are numbered over all groups of the update: 0 and 1, then 2 and 3; each has five tokens.
    ratios = {1: [0.0, 0.123456, -2.0, 0.5, 0.0, 0.0, 0.0], 2: [float("nan")] * 5}
    with Recording(written(run_dir, [1], log_ratios=ratios)) as recording:
        first, second = recording.take(2)
    assert first.log_ratios == [None, [0.0, 0.1235, -2.0, 0.5, 0.0]]
    assert second.log_ratios == [None, None]  # JSON has no NaN


def test_log_ratios_of_another_length_are_refused(run_dir):
    path = written(run_dir, [1], log_ratios={0: [0.1] * 4})
    with (
        Recording(path) as recording,
        pytest.raises(DataError, match="log_ratios must have a number for each token"),
    ):
        recording.take(1)


def test_a_group_is_one_line_of_ascii(run_dir):
    data = written(run_dir, [1]).read_bytes()
    assert data.isascii()
    assert [json.loads(line)["lease"] for line in data.splitlines()] == [2, 3]


def test_a_run_folder_stands_for_its_file(run_dir):
    path = written(run_dir, [1])
    with Recording(run_dir) as recording:
        assert recording.path == path.resolve()


def test_a_continued_run_cuts_what_came_after_its_checkpoint(run_dir):
    path = written(run_dir, [1, 2])
    until_checkpoint = path.read_bytes()
    written(run_dir, [3, 4], after_update=2)
    with path.open("ab") as file:
        file.write(b'{"update": 5, "plan')  # torn by a kill
    file = GroupsFile(run_dir, after_update=2)
    file.close()
    assert path.read_bytes() == until_checkpoint
    assert file.last_update == 2


def test_the_groups_of_a_checkpoint_are_on_the_disk_before_it_is_written(run_dir, monkeypatch):
    synced = []
    file = GroupsFile(run_dir, after_update=0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    file.sync()
    file.close()
    assert synced == [(run_dir / GROUPS_FILE).stat().st_ino]


def test_a_new_run_empties_the_file(run_dir):
    written(run_dir, [1, 2])
    assert written(run_dir, []).read_bytes() == b""


def test_updates_that_were_not_recorded_show_in_last_update(run_dir):
    written(run_dir, [1, 2])
    file = GroupsFile(run_dir, after_update=7)
    file.close()
    assert file.last_update == 2


def test_a_line_that_is_no_group_is_not_cut_but_refused(run_dir):
    path = written(run_dir, [1])
    path.write_text("mine\n")
    with pytest.raises(RunError, match="line 1: not a recorded group"):
        GroupsFile(run_dir, after_update=1)
    assert path.read_text() == "mine\n"


def test_groups_are_taken_in_order_and_may_be_skipped(run_dir):
    with Recording(written(run_dir, [1, 2, 3])) as recording:
        assert [line.lease for line in recording.take(2)] == [2, 3]
        recording.skip(1)
        assert [line.lease for line in recording.take(5)] == [5, 6, 7]
        recording.rewind()
        assert recording.take(1)[0].lease == 2
        recording.rewind()
        with pytest.raises(DataError, match="has 6 groups, but the checkpoint has trained on 9"):
            recording.skip(9)


def test_a_missing_file_gives_one_line_with_the_setting_that_writes_it(run_dir):
    with pytest.raises(DataError, match=r"groups.jsonl: cannot be read .* metrics.record_groups = true"):
        Recording(run_dir)


def edited(line, *place_and_value):
    """Return the JSON line with the value at a place replaced."""
    *place, last, value = place_and_value
    document = json.loads(line)
    inner = document
    for key in place:
        inner = inner[key]
    inner[last] = value
    return json.dumps(document)


def edited_completion(line, **fields):
    """Return the JSON line with fields of its second completion replaced."""
    document = json.loads(line)
    document["completions"][1] |= {"inserted": []} | fields
    return json.dumps(document)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda line: line[:40], "not a recorded group: Invalid JSON"),
        (lambda _: "[1]", "not a recorded group"),
        (
            lambda line: edited(line, "completions", 0, "tokens", 1, "x"),
            r"completions.0.tokens.1: .* integer",
        ),
        (lambda line: edited(line, "completions", 0, "logprobs", 0, float("nan")), "finite"),
        (lambda line: edited(line, "completions", 0, "extra", 1), r"completions.0.extra: "),
        (
            lambda line: edited(line, "completions", 1, "tokens", [1]),
            "got 1 tokens, 5 log-probs and 5 versions",
        ),
        (
            lambda line: edited_completion(line, tokens=[], logprobs=[], versions=[]),
            "got 0 tokens, 0 log-probs and 0 versions",
        ),
        (lambda line: edited(line, "completions", 1, "forced", [3, 9]), "forced must be rising pairs"),
        # One element for each completion, of which there are two.
        (lambda line: edited(line, "log_ratios", [None]), "log_ratios must have a number for each token"),
        (lambda line: edited(line, "prompt", []), "a group has a prompt and completions"),
        (lambda line: edited(line, "lease", "2"), "lease: "),
    ],
)
def test_a_broken_line_is_named(run_dir, spoil, what):
    path = written(run_dir, [1, 2])
    lines = path.read_text().splitlines()
    lines[2] = spoil(lines[2])
    path.write_text("\n".join(lines) + "\n")
    with Recording(path) as recording:
        recording.take(2)
        with pytest.raises(DataError, match=what) as caught:
            recording.take(1)
    assert str(caught.value).startswith(f"{path.resolve()}:3: ")
    assert "\n" not in str(caught.value)


def test_a_completion_may_be_one_token(run_dir):
    path = written(run_dir, [1])
    line = path.read_text().splitlines()[0]
    path.write_text(edited_completion(line, tokens=[1], logprobs=[-0.5], versions=[1]))
    with Recording(path) as recording:
        [read] = recording.take(1)
    assert [len(completion.tokens) for completion in read.completions] == [5, 1]


def test_a_recording_without_turns_reads_as_one_turn_and_bad_bounds_are_refused(run_dir):
    path = written(run_dir, [1])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for each in lines[0]["completions"]:  # as it was written before there were turns
        del each["inserted"]
    lines[1]["completions"][0]["inserted"] = [3, 9]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Recording(path) as recording:
        [first] = recording.take(1)
        assert first.completions[0].sampled == [True] * 5
        assert first.completions[0].turns == 1
        with pytest.raises(DataError, match=r"groups\.jsonl:2: inserted must be rising pairs of bounds"):
            recording.take(1)
