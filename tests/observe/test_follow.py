"""Files and events merged; the source is a list, the files are real."""

from collections import deque
from itertools import count
from pathlib import Path

from grpo_actors.observe.follow import Follower, HistoryReader
from grpo_actors.observe.records import Record, encode, make_record
from grpo_actors.observe.sinks import Journal


class ListedEvents:
    """A source that returns the events put into it, then None."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[str, bytes]] = deque()

    def put(self, topic: str, event: bytes) -> None:
        self.waiting.append((topic, event))

    def receive(self, timeout_s: float | None) -> tuple[str, bytes] | None:
        return self.waiting.popleft() if self.waiting else None


def everything(follower: Follower) -> list[Record]:
    records = []
    while (record := follower.receive(0.0)) is not None:
        records.append(record)
    return records


def numbers(records: list[Record]) -> list[int]:
    return [record["seq"] for record in records]


def test_an_event_is_waited_for_only_as_long_as_was_asked():
    waits = []

    class Silent(ListedEvents):
        def receive(self, timeout_s):
            waits.append(timeout_s)
            return super().receive(timeout_s)

    source = Silent()
    follower = Follower(source, None)
    assert follower.receive(0.0) is None
    source.put("log", b"{")  # no record: the time that is left is waited for
    assert follower.receive(600.0) is None
    assert waits[0] == 0.0
    assert len(waits) == 3
    assert 0 < waits[2] <= waits[1] <= 600.0


def event(seq: int, time: float) -> bytes:
    return encode(make_record(seq, time, "log", {"text": str(seq)}))


def test_history_and_events_give_each_record_once(tmp_path):
    source = ListedEvents()
    with Journal(tmp_path, publish=source.put) as journal, Follower(source, tmp_path) as follower:
        for _ in range(3):
            journal.append("log", {})
        assert numbers(everything(follower)) == [1, 2, 3]
        journal.append("log", {})
        assert numbers(everything(follower)) == [4]
        assert everything(follower) == []


def test_events_that_were_lost_are_filled_from_the_file(tmp_path):
    source = ListedEvents()
    with Journal(tmp_path, publish=source.put) as journal, Follower(source, tmp_path) as follower:
        for _ in range(9):
            journal.append("log", {})
        source.waiting = deque(list(source.waiting)[5:6])
        assert numbers(everything(follower)) == list(range(1, 10))
        assert follower.lost == 0


def test_the_last_record_is_found_even_if_its_event_never_comes(tmp_path):
    with Journal(tmp_path) as journal, Follower(ListedEvents(), tmp_path) as follower:
        journal.append("stop", {"reason": "done", "exit_code": 0})
        assert [record["topic"] for record in everything(follower)] == ["stop"]


def test_a_record_that_is_written_while_an_event_is_waited_for_is_found(tmp_path):
    with Journal(tmp_path) as journal:

        class Late(ListedEvents):
            def receive(self, timeout_s):
                journal.append("log", {})
                return super().receive(timeout_s)

        with Follower(Late(), tmp_path) as follower:
            assert [follower.receive(0.0)["seq"] for _ in range(2)] == [1, 2]


def test_without_files_losses_are_counted_from_the_first_event_on():
    source = ListedEvents()
    for seq in (7, 8, 12, 13):
        source.put("log", event(seq, float(seq)))
    follower = Follower(source, None)
    assert numbers(everything(follower)) == [7, 8, 12, 13]
    assert follower.lost == 3  # 9, 10 and 11


def test_a_run_without_files_is_followed_by_its_events(tmp_path):
    source = ListedEvents()
    with (
        Journal(tmp_path, log_jsonl=False, publish=source.put) as journal,
        Follower(source, tmp_path) as follower,
    ):
        journal.append("start", {})
        journal.append("sample", {"completions": [{"text": "x"}]})
        assert [record["topic"] for record in everything(follower)] == ["start", "sample"]


def test_a_sample_comes_with_its_texts_from_the_file(tmp_path):
    completions = [{"text": "x", "reward": 1.0}]
    with Journal(tmp_path) as journal, Follower(None, tmp_path) as follower:
        for update in range(3):
            journal.append("metrics", {"update": update})
            journal.append("sample", {"update": update, "completions": completions})
        records = everything(follower)
    assert numbers(records) == [1, 2, 3, 4, 5, 6]
    assert [record["completions"] for record in records if record["topic"] == "sample"] == [completions] * 3


def test_a_sample_whose_texts_were_removed_is_still_returned(tmp_path):
    with Journal(tmp_path) as journal:
        journal.append("sample", {"update": 1, "problem": "p", "completions": []})
        journal.append("metrics", {"update": 1})
    (tmp_path / "completions.jsonl").unlink()
    with Follower(None, tmp_path) as follower:
        assert numbers(everything(follower)) == [1, 2]


def test_a_resumed_run_is_followed_back_to_its_checkpoint_and_on(tmp_path):
    source, clock = ListedEvents(), count(100.0)
    with Follower(source, tmp_path) as follower:
        with Journal(tmp_path, publish=source.put, clock=clock.__next__) as journal:
            for _ in range(6):
                journal.append("log", {})
        assert numbers(everything(follower)) == [1, 2, 3, 4, 5, 6]
        with Journal(tmp_path, seq=4, publish=source.put, clock=clock.__next__) as journal:
            for topic in ("start", "log", "log"):
                journal.append(topic, {})
        # The event of the new start is lost; the next event makes the follower read it from the file.
        source.waiting.popleft()
        assert numbers(everything(follower)) == [5, 6, 7]


def test_a_resumed_run_is_noticed_by_its_shorter_file_alone(tmp_path):
    clock = count(100.0)
    with Follower(None, tmp_path) as follower:
        with Journal(tmp_path, clock=clock.__next__) as journal:
            for _ in range(6):
                journal.append("log", {})
        assert len(everything(follower)) == 6
        with Journal(tmp_path, seq=2, clock=clock.__next__) as journal:
            journal.append("start", {})
        assert [(record["seq"], record["topic"]) for record in everything(follower)] == [(3, "start")]


def test_a_clock_that_is_set_back_repeats_nothing(tmp_path):
    source, clock = ListedEvents(), iter([5000.0, 5001.0, 1400.0, 1401.0, 1402.0])
    with (
        Journal(tmp_path, publish=source.put, clock=clock.__next__) as journal,
        Follower(source, tmp_path) as follower,
    ):
        for _ in range(5):
            journal.append("log", {})
        assert numbers(everything(follower)) == [1, 2, 3, 4, 5]


def test_a_run_that_is_resumed_after_its_clock_was_set_back_is_followed_on(tmp_path):
    source = ListedEvents()
    with Follower(source, tmp_path) as follower:
        with Journal(tmp_path, publish=source.put, clock=count(5000.0).__next__) as journal:
            for _ in range(6):
                journal.append("log", {})
        assert numbers(everything(follower)) == [1, 2, 3, 4, 5, 6]
        with Journal(tmp_path, seq=4, publish=source.put, clock=count(1400.0).__next__) as journal:
            for topic in ("start", "log"):
                journal.append(topic, {})
        assert numbers(everything(follower)) == [5, 6]
        assert everything(follower) == []


def test_an_event_of_an_earlier_session_that_comes_late_is_dropped():
    source = ListedEvents()
    for session, seq in (("a", 1), ("a", 2), ("b", 1), ("a", 3), ("b", 2)):
        source.put("log", encode(make_record(seq, 0.0, "log", {}, session)))
    follower = Follower(source, None)
    records = everything(follower)
    assert follower.lost == 0, "a session begins with any number"
    assert [(record["session"], record["seq"]) for record in records] == [
        ("a", 1),
        ("a", 2),
        ("b", 1),
        ("b", 2),
    ]


def test_an_event_that_is_not_a_record_is_dropped_and_counted():
    source = ListedEvents()
    source.put("log", b"{")
    source.put("log", event(1, 1.0))
    follower = Follower(source, None)
    assert numbers(everything(follower)) == [1]
    assert follower.malformed == 1


def test_a_line_that_is_still_being_written_is_left_for_later(tmp_path):
    line = event(1, 1.0)
    reader = HistoryReader(tmp_path)
    assert reader.read() is None  # no file yet
    with (tmp_path / "metrics.jsonl").open("wb", buffering=0) as file:
        file.write(line[:10])
        assert reader.read() is None
        file.write(line[10:] + b"\n")
        record = reader.read()
    assert record is not None
    assert record["seq"] == 1
    reader.close()


def test_a_file_that_was_truncated_and_has_already_grown_longer_is_read_again(tmp_path):
    clock = count(100.0)
    with Follower(None, tmp_path) as follower:
        with Journal(tmp_path, clock=clock.__next__) as journal:
            for update in range(1, 4):
                journal.append("sample", {"update": update, "completions": [{"text": "old"}]})
        assert numbers(everything(follower)) == [1, 2, 3]
        with Journal(tmp_path, seq=1, clock=clock.__next__) as journal:
            for update in range(2, 9):
                journal.append(
                    "sample", {"update": update, "completions": [{"text": f"new {update}" * update}]}
                )
        records = everything(follower)
    assert numbers(records) == [2, 3, 4, 5, 6, 7, 8]
    assert [record["completions"][0]["text"] for record in records] == [f"new {n}" * n for n in range(2, 9)]


def test_a_gap_or_a_foreign_line_in_the_file_is_skipped(tmp_path):
    with Follower(None, tmp_path) as follower, (tmp_path / "metrics.jsonl").open("wb", buffering=0) as file:
        file.write(event(1, 1.0) + b"\n")
        assert numbers(everything(follower)) == [1]
        file.write(b"a note by hand\n" + event(5, 5.0) + b"\n")
        assert numbers(everything(follower)) == [5]
        file.write(event(6, 6.0) + b"\n")
        assert numbers(everything(follower)) == [6]


def test_a_follower_that_is_closed_holds_no_file(tmp_path):
    opened = len(list(Path("/dev/fd").iterdir()))
    with Journal(tmp_path) as journal:
        journal.append("sample", {"update": 1, "completions": [{"text": "x"}]})
    with Follower(None, tmp_path) as follower:
        assert numbers(everything(follower)) == [1]
        assert len(list(Path("/dev/fd").iterdir())) == opened + 2, "the records and their texts"
    assert len(list(Path("/dev/fd").iterdir())) == opened
