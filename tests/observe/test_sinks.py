"""The journal on real files; the full disk is the operating system's own limit on file size."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

from grpo_actors.atomic import PRIVATE_FILE
from grpo_actors.errors import RunError
from grpo_actors.observe.sinks import Journal, read_records

SAMPLE = {
    "update": 1,
    "problem": "p1",
    "prompt": "1+1?",
    "answer": "2",
    "completions": [{"text": "2", "reward": 1.0}],
}


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_bytes().splitlines()]


def write_updates(journal: Journal, updates: range) -> None:
    for update in updates:
        journal.append("metrics", {"update": update, "loss": 0.5})
        journal.append("sample", {**SAMPLE, "update": update})


@contextmanager
def limited_to(bytes_per_file: int) -> Iterator[None]:
    """Writes beyond this size fail with an OSError, after the part that fits (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_every_record_is_in_metrics_numbered_without_a_gap(tmp_path):
    with Journal(tmp_path) as journal:
        journal.append("start", {"run_name": "r"})
        write_updates(journal, range(1, 4))
        assert journal.seq == 7  # 1 start + 3 × (metrics, sample)
    assert [record["seq"] for record in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_sample_keeps_its_texts_in_completions_under_its_number(tmp_path):
    with Journal(tmp_path, clock=lambda: 5.0, session="s") as journal:
        write_updates(journal, range(1, 2))
    begin = {"seq": 2, "time": 5.0, "session": "s", "topic": "sample"}
    assert lines(tmp_path)[1] == {**begin, "update": 1, "problem": "p1"}
    assert lines(tmp_path, "completions.jsonl") == [{**begin, **SAMPLE}]


def test_times_come_from_the_given_clock(tmp_path):
    with Journal(tmp_path, clock=count(100.0).__next__) as journal:
        times = [journal.append("log", {"level": "info", "text": "x"})["time"] for _ in range(3)]
    assert times == [100.0, 101.0, 102.0]


def test_the_published_event_is_the_line_in_the_file(tmp_path):
    published = []

    def publish(topic: str, event: bytes) -> None:
        last_line = (tmp_path / "metrics.jsonl").read_bytes().splitlines()[-1]
        published.append((topic, event == last_line))

    with Journal(tmp_path, publish=publish) as journal:
        journal.append("metrics", {"update": 1})
        journal.append("stop", {"reason": "done", "exit_code": 0})
    assert published == [("metrics", True), ("stop", True)]


def test_a_sample_is_published_whole(tmp_path):
    published = []
    with Journal(tmp_path, publish=lambda _, event: published.append(json.loads(event))) as journal:
        journal.append("sample", SAMPLE)
    assert published[0]["completions"] == SAMPLE["completions"]


def test_a_record_is_readable_as_soon_as_append_returns(tmp_path):
    journal = Journal(tmp_path)
    journal.append("metrics", {"update": 1})
    assert len(lines(tmp_path)) == 1
    journal.close()


def test_a_journal_that_is_synced_is_on_disk_and_one_that_is_closed_holds_no_file(tmp_path, monkeypatch):
    opened, synced = len(list(Path("/dev/fd").iterdir())), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    with Journal(tmp_path) as journal:
        assert len(list(Path("/dev/fd").iterdir())) == opened + 2
        journal.sync()
        files = ("metrics.jsonl", "completions.jsonl")
        assert synced == [(tmp_path / name).stat().st_ino for name in files]
    assert len(list(Path("/dev/fd").iterdir())) == opened
    for name in files:
        assert (tmp_path / name).stat().st_mode & 0o777 == PRIVATE_FILE


def test_records_are_read_up_to_a_torn_one_and_a_foreign_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert list(read_records(path)) == []
    with Journal(tmp_path) as journal:
        written = [journal.append("log", {"text": text}) for text in ("a", "b")]
    with path.open("ab") as file:
        file.write(b'{"seq":3')
    assert list(read_records(path)) == written
    with path.open("ab") as file:
        file.write(b"\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 3: a record must be one JSON object"):
        list(read_records(path))


def test_resuming_cuts_off_what_came_after_the_checkpoint(tmp_path):
    with Journal(tmp_path) as journal:
        write_updates(journal, range(1, 4))
    with Journal(tmp_path, seq=2) as journal:
        assert journal.append("metrics", {"update": 2, "loss": 0.7})["seq"] == 3
        assert journal.missing == 0
    assert [(record["seq"], record.get("update")) for record in lines(tmp_path)] == [(1, 1), (2, 1), (3, 2)]
    assert [record["seq"] for record in lines(tmp_path, "completions.jsonl")] == [2]


def test_resuming_cuts_off_a_torn_last_line(tmp_path):
    with Journal(tmp_path) as journal:
        write_updates(journal, range(1, 2))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"seq":3,"time":1.0,"topic":"met')
    with Journal(tmp_path, seq=2) as journal:
        journal.append("metrics", {"update": 2})
    assert [record["seq"] for record in lines(tmp_path)] == [1, 2, 3]


def test_a_run_from_the_start_empties_the_files(tmp_path):
    with Journal(tmp_path) as journal:
        write_updates(journal, range(1, 4))
    Journal(tmp_path).close()
    assert lines(tmp_path) == lines(tmp_path, "completions.jsonl") == []


def test_records_that_the_file_lacks_are_counted_and_the_numbering_goes_on(tmp_path):
    with Journal(tmp_path) as journal:
        write_updates(journal, range(1, 2))
    with Journal(tmp_path, seq=10) as journal:
        assert journal.missing == 8  # numbers 3 to 10
        assert journal.append("metrics", {"update": 6})["seq"] == 11


def test_a_foreign_line_is_refused_and_not_cut(tmp_path):
    with Journal(tmp_path) as journal:
        journal.append("log", {})
    written = (tmp_path / "metrics.jsonl").read_text() + "my notes\n"
    (tmp_path / "metrics.jsonl").write_text(written)
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2: .*move the file away"):
        Journal(tmp_path, seq=2)
    assert (tmp_path / "metrics.jsonl").read_text() == written


def test_numbers_that_json_cannot_represent_become_null_and_are_named(tmp_path):
    with Journal(tmp_path) as journal:
        fields = {"update": 1, "loss": float("nan"), "rewards": {"exact": float("inf")}, "staleness": {0: 4}}
        record = journal.append("metrics", fields)
    assert lines(tmp_path) == [record]
    assert record["loss"] is None
    assert record["rewards"] == {"exact": None}
    assert record["staleness"] == {"0": 4}
    assert record["nonfinite"] == ["loss", "rewards.exact"]


def test_without_log_jsonl_records_are_numbered_and_published_only(tmp_path):
    published = []
    with Journal(
        tmp_path, seq=4, log_jsonl=False, publish=lambda topic, _: published.append(topic)
    ) as journal:
        assert journal.append("sample", SAMPLE)["seq"] == 5
        journal.sync()
    assert published == ["sample"]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_error_that_loses_neither_number_nor_line(tmp_path):
    published = []
    with Journal(tmp_path, publish=lambda topic, _: published.append(topic)) as journal:
        journal.append("log", {"level": "info", "text": "x" * 100})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        with (
            limited_to(size + 50),
            pytest.raises(RunError, match=r"metrics\.jsonl cannot be written .*free some space"),
        ):
            journal.append("log", {"level": "info", "text": "y" * 100})
        assert journal.seq == 1
        assert (tmp_path / "metrics.jsonl").stat().st_size == size
        assert journal.append("log", {"level": "info", "text": "z"})["seq"] == 2
    assert [record["seq"] for record in lines(tmp_path)] == [1, 2]
    assert published == ["log", "log"]


def test_a_disk_that_fills_between_the_two_files_of_a_sample_leaves_neither(tmp_path):
    with Journal(tmp_path) as journal:
        for _ in range(20):
            journal.append("log", {"level": "info", "text": "x" * 100})
        metrics_size = (tmp_path / "metrics.jsonl").stat().st_size
        # The texts fit into completions.jsonl, but the numbered line does not fit into metrics.jsonl.
        with limited_to(metrics_size + 10), pytest.raises(RunError, match=r"metrics\.jsonl"):
            journal.append("sample", SAMPLE)
        assert lines(tmp_path, "completions.jsonl") == []
        assert journal.append("sample", SAMPLE)["seq"] == 21
    assert [record["seq"] for record in lines(tmp_path, "completions.jsonl")] == [21]


def test_a_folder_that_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be opened \(No such file"):
        Journal(tmp_path / "gone")


def test_a_file_that_cannot_be_opened_leaves_the_other_one_closed(tmp_path):
    (tmp_path / "completions.jsonl").mkdir()
    opened = len(list(Path("/dev/fd").iterdir()))
    with pytest.raises(RunError, match=r"completions\.jsonl cannot be opened .*metrics\.log_jsonl = false"):
        Journal(tmp_path)
    assert len(list(Path("/dev/fd").iterdir())) == opened


def test_each_life_of_a_writer_has_a_name_of_its_own(tmp_path):
    names = []
    for _ in range(2):
        with Journal(tmp_path, log_jsonl=False) as journal:
            names.append(journal.append("log", {})["session"])
            assert journal.append("log", {})["session"] == names[-1]
    assert names[0] != names[1]
    assert [len(name) for name in names] == [8, 8]


def test_a_topic_that_is_not_in_the_schema_is_refused(tmp_path):
    with Journal(tmp_path) as journal, pytest.raises(ValueError, match="no such topic: 'metric'"):
        journal.append("metric", {})
