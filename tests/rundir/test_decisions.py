"""The file of the decisions about a run's workers."""

import json

import pytest

from grpo_actors.rundir.decisions import Decision, append_decision, decisions, kept_workers


def test_decisions_are_read_as_they_were_taken(tmp_path):
    append_decision(tmp_path, Decision(1, 2, "sampling is slower"), update=3, kept=1)
    assert kept_workers(tmp_path) == 1
    append_decision(tmp_path, Decision(2, 2, "40 % → 60 %"), update=7, kept=2)
    assert kept_workers(tmp_path) == 2
    assert decisions(tmp_path) == [
        {"update": 3, "before": 1, "workers": 2, "reason": "sampling is slower"},
        {"update": 7, "before": 2, "workers": 2, "reason": "40 % → 60 %"},
    ]
    text = (tmp_path / "workers.json").read_text()
    assert text.startswith('{\n  "kept": 2,\n')
    assert "40 % → 60 %" in text


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (None, 1),
        ("{", 1),
        ([], 1),
        ({}, 1),
        ({"kept": 0, "decisions": {}}, 1),
        ({"kept": "3", "decisions": [7]}, 1),
        ({"kept": 3}, 3),
    ],
    ids=str,
)
def test_a_file_that_is_not_as_written_has_no_decisions(tmp_path, content, kept):
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "workers.json").write_text(text)
    assert (kept_workers(tmp_path), decisions(tmp_path)) == (kept, [])
