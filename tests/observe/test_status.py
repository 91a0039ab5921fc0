"""The supervisor's output, in a log and on a terminal."""

import io
import json
import re
import sys
import threading
from itertools import count

import pytest
from scores import score

from grpo_actors.observe.json_events import JsonEvents
from grpo_actors.observe.records import Record, make_record
from grpo_actors.observe.status import PLAIN_PERIOD_S, REDRAW_PERIOD_S, StatusLine, permanent_note
from grpo_actors.observe.view import RunView


class Terminal(io.StringIO):
    """A stream that calls itself a terminal."""

    def isatty(self) -> bool:
        return True


def metrics(update: int, total: int | None = 100) -> Record:
    fields = {"update": update, "total_updates": total, "reward_mean": 0.62}
    return make_record(update, 100.0 + update, "metrics", fields)


def lines_of(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_a_log_gets_a_status_line_only_every_few_seconds():
    stream = io.StringIO()
    # Each reading of the clock is a second later than the one before.
    with StatusLine(100, stream, clock=count(0.0).__next__) as status:
        for update in range(1, 12):
            status.show(metrics(update))
    assert PLAIN_PERIOD_S == 5.0
    assert [line.split("  ")[0] for line in lines_of(stream)] == [
        "update 1/100",
        "update 6/100",
        "update 11/100",
    ]


def test_a_log_gets_the_last_update_in_any_case():
    stream = io.StringIO()
    with StatusLine(None, stream, clock=lambda: 0.0) as status:
        for update in range(1, 4):
            status.show(metrics(update, total=3))
    assert [line.split("  ")[0] for line in lines_of(stream)] == ["update 1/3", "update 3/3"]


def test_only_multiples_of_every_updates_and_the_last_are_shown():
    stream = io.StringIO()
    # Five seconds between two readings of the clock: the period suppresses nothing.
    with StatusLine(5, stream, every_updates=2, clock=count(0.0, PLAIN_PERIOD_S).__next__) as status:
        for update in range(1, 6):
            status.show(metrics(update, total=5))
    assert [line.split("  ")[0] for line in lines_of(stream)] == ["update 2/5", "update 4/5", "update 5/5"]


def test_evaluations_alarms_losses_and_the_end_are_printed_at_once():
    stream = io.StringIO()
    with StatusLine(100, stream) as status:
        status.show(
            make_record(1, 1.0, "eval", {"update": 10, "score": score(0.41).model_dump(), "best": True})
        )
        status.show(make_record(2, 2.0, "alarm", {"name": "kl", "text": "rises"}))
        status.show(
            make_record(
                3, 3.0, "worker", {"worker": "rollout-1", "state": "lost", "why": "its process ended"}
            )
        )
        joined = {"worker": "rollout-1", "state": "joined", "device": "GPU 1"}
        status.show(make_record(4, 4.0, "worker", joined))
        status.show(make_record(4, 4.0, "worker", {"worker": "rollout-1", "state": "sampling"}))
        status.show(make_record(4, 4.0, "worker", {"worker": "rollout-1", "state": "left"}))
        status.show(make_record(4, 4.0, "checkpoint", {"path": "r/checkpoint-3", "bytes": 2e6, "write_s": 1}))
        status.show(make_record(5, 5.0, "log", {"level": "warning", "text": "one line left out"}))
        status.show(make_record(6, 6.0, "log", {"level": "debug", "text": "x"}))
        told = {"update": 14, "before": 1, "workers": 2, "reason": "the learner waits"}
        status.show(make_record(7, 7.0, "headcount", told))
        status.show(make_record(8, 8.0, "headcount", {**told, "before": 2, "reason": "as it is"}))
        status.show(make_record(9, 9.0, "stop", {"reason": "done", "exit_code": 0}))
    assert lines_of(stream) == [
        "eval @10  accuracy 0.41 [0.31, 0.51], greedy on 10 problems  best so far",
        "alarm: kl: rises",
        "worker rollout-1 lost: its process ended",
        "worker rollout-1 joined on GPU 1",
        "worker rollout-1 left",
        "checkpoint-3 is written, 2.0 MB",
        "warning: one line left out",
        "rollout workers: 1 → 2 (the learner waits)",
        "rollout workers: 2, settled (as it is)",
        "run ended: done",
    ]


#: Before: 4 of 9 updates, and a worker that has joined.
RUNNING = RunView(metrics={"update": 4, "total_updates": 9}, workers={"w": {"state": "joined"}})


@pytest.mark.parametrize(
    ("topic", "fields", "note"),
    [
        ("eval", {"update": 3, "best": True}, ("eval @3  score –, greedy  best so far", "green")),
        ("eval", {"update": 3, "best": False}, ("eval @3  score –, greedy", "cyan")),
        ("alarm", {"name": "kl", "text": "rises"}, ("alarm: kl: rises", "bold red")),
        ("log", {"level": "info", "text": "x"}, ("x", "dim")),
        ("log", {"level": "warning", "text": "x"}, ("warning: x", "yellow")),
        ("log", {"level": "debug", "text": "x"}, None),
        ("log", {"text": "x"}, None),
        ("worker", {"worker": "w", "state": "lost", "why": "y"}, ("worker w lost: y", "yellow")),
        ("worker", {"worker": "v", "state": "joined", "device": "GPU 1"}, ("worker v joined on GPU 1", "dim")),
        ("worker", {"worker": "v", "state": "joined", "device": ""}, ("worker v joined", "dim")),
        ("worker", {"worker": "w", "state": "joined"}, None),
        ("worker", {"worker": "v", "state": "sampling"}, None),
        ("worker", {"worker": "evaluator", "role": "evaluator", "state": "joined"}, None),
        ("worker", {"worker": "w", "state": "left", "device": "GPU 1"}, ("worker w left", "dim")),
        ("checkpoint", {"path": "r/checkpoint-3", "bytes": 2e6}, None),
        ("headcount", {"before": 1, "workers": 2, "reason": "r"}, ("rollout workers: 1 → 2 (r)", "")),
        ("stop", {"reason": "done"}, ("run ended: done", "bold")),
        ("metrics", {"update": 3}, None),
    ],
)  # fmt: skip
def test_a_record_that_says_something_new_is_a_permanent_line(topic, fields, note):
    assert permanent_note(make_record(1, 1.0, topic, fields), RUNNING) == note


def test_a_worker_without_a_reason_is_not_reported_as_lost_and_none_leaves_a_run_that_is_over():
    lost = {"seq": 1, "time": 1.0, "topic": "worker", "worker": "w", "state": "lost"}
    assert permanent_note(lost, RUNNING) is None
    left = lost | {"state": "left"}
    for update, note in ((8, ("worker w left", "dim")), (9, None), (10, None)):
        before = RunView(metrics={"update": update, "total_updates": 9})
        assert permanent_note(left, before) == note
    assert permanent_note(left, RunView(metrics={"update": 9})) == ("worker w left", "dim"), "no plan, no end"


def test_a_terminal_is_redrawn_at_most_ten_times_a_second_and_at_the_end(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    stream, now = Terminal(), 0.0
    with StatusLine(None, stream, clock=lambda: now) as status:
        for update, now in ((1, 0.0), (2, REDRAW_PERIOD_S / 2), (3, REDRAW_PERIOD_S), (4, REDRAW_PERIOD_S)):  # noqa: B007
            status.show(metrics(update, total=4))
        shown = stream.getvalue()
    assert [number for number in range(1, 5) if f"update {number}/4" in shown] == [1, 3, 4]


@pytest.mark.parametrize("width", [100, 34])
def test_bar_and_times_are_one_line_in_which_the_bar_takes_what_is_left(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with StatusLine(4, stream, clock=lambda: 0.0) as status:
        status.show(metrics(2, total=4))
        shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", stream.getvalue())
    bar = next(line for line in re.split(r"[\r\n]+", shown) if "━" in line)
    assert bar.rstrip().endswith(" 50 %  0:00, – left")
    # With one blank between the two, and one at the end.
    assert "━  50 %" in bar
    assert bar.count("━") + bar.count("╸") + bar.count("╺") == width - len(" 50 %  0:00, – left") - 2
    assert len(bar) <= width
    [line] = [line for line in re.split(r"[\r\n]+", shown) if line.strip() and line != bar]
    assert line.startswith("update 2/4")


def test_what_a_narrow_terminal_has_no_room_for_is_cut(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with StatusLine(4, stream, clock=lambda: 0.0) as status:
        status.show(metrics(2, total=4))
    assert "update 2/4  reward …" in stream.getvalue()


def test_without_a_plan_there_is_no_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with StatusLine(None, stream, clock=lambda: 0.0) as status:
        status.show(metrics(2, total=None))
    assert "━" not in stream.getvalue()
    assert "update 2" in stream.getvalue()


def test_a_terminal_shows_bar_line_and_notes_without_reading_markup(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with StatusLine(100, stream, clock=count(0.0).__next__) as status:
        for update in range(1, 26):
            status.show(metrics(update))
        status.show(make_record(26, 126.0, "alarm", {"name": "kl", "text": "[bold]rises[/bold] \x1b[2J"}))
    shown = stream.getvalue()
    assert "update 25/100  reward 0.62" in shown
    assert "25 %" in shown
    # 24 updates in 24 s: one a second, 75 left.
    assert "1:15 left" in shown
    assert "[bold]rises[/bold]" in shown
    assert "\x1b[2J" not in shown


def test_closing_twice_or_before_the_first_update_is_fine():
    for stream in (Terminal(), io.StringIO()):
        status = StatusLine(100, stream)
        status.close()
        status.close()


def test_a_preparation_is_one_line_that_is_redrawn_and_leaves_nothing_behind():
    stream = Terminal()
    with StatusLine(100, stream) as status:
        status.show_preparation("compiling: 1 of 40")
        status.show_preparation("compiling: 2 of 40")
        status.show_preparation("")
        status.print_line("compiled 40")
    text = stream.getvalue()
    assert text.count("compiling: ") == 2
    # The line is erased after its second state, before anything else is printed.
    assert "\x1b[2K" in text[text.index("2 of 40") : text.index("compiled 40")]


def test_a_log_gets_a_preparation_only_every_few_seconds():
    stream = io.StringIO()
    # Each reading of the clock is a second later than the one before.
    with StatusLine(100, stream, clock=count(0.0).__next__) as status:
        for done in range(8):
            status.show_preparation(f"{done} of 40")
        status.show_preparation("")
    assert lines_of(stream) == ["0 of 40", "5 of 40"]


def test_a_log_gets_each_phase_once_with_the_time_until_the_first_update():
    stream = io.StringIO()
    # Each reading of the clock is a minute later than the one before; the display reads it once when it is opened.
    with StatusLine(100, stream, clock=count(0.0, 60.0).__next__) as status:
        status.begin("checking", in_log=False)
        status.begin("loading")
        status.begin("loading")
        status.tick()
        status.begin("waiting")
        status.show(metrics(1))
        status.begin("loading")
    assert [line.split("  ")[0] for line in lines_of(stream)] == [
        "[1:00] loading",
        "[2:00] waiting",
        "update 1/100",
    ]


@pytest.mark.parametrize("width", [20, 200])
def test_a_terminal_redraws_the_phase_in_one_line_and_puts_the_end_in_a_box(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with StatusLine(100, stream, clock=count(100.0, 0.5).__next__) as status:
        status.begin("loading a model with a name that is long", in_log=False)
        status.tick()
        assert "0:01  loading a" in stream.getvalue(), "at once"
        # One line: to draw it anew, the cursor never goes up.
        assert "\x1b[1A" not in stream.getvalue()
        assert "loading a" in stream.getvalue()
        status.print_closing(["0.4 → 0.9"], {"chat": "grpo chat run that has a long name"})
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", stream.getvalue()).strip().splitlines()
    (fact,) = [line for line in shown if line.startswith("│")]
    assert (fact[-1], fact[1:-1].strip()) == ("│", "0.4 → 0.9")
    assert len(fact) <= 20, "as wide as its words"
    # Below the box, in one line at any width: it is to be copied.
    assert shown[-1] == "  chat:  grpo chat run that has a long name"


def test_a_phase_is_drawn_anew_ten_times_a_second():
    stream, now = Terminal(), 0.0
    with StatusLine(100, stream, clock=lambda: now) as status:
        status.begin("loading")
        for now, drawn in ((REDRAW_PERIOD_S / 2, 1), (REDRAW_PERIOD_S, 2), (REDRAW_PERIOD_S, 2)):  # noqa: B007
            status.tick()
            assert stream.getvalue().count("loading") == drawn


def test_a_terminal_that_is_closed_shows_the_newest_update_but_no_phase_and_its_cursor(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with StatusLine(100, stream, clock=lambda: 0.0) as status:
        for update in (1, 2):
            status.show(metrics(update))
        assert "update 2/" not in stream.getvalue(), "too soon after the first"
        assert status.view.update == 2
    assert "update 2/100" in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[?25h")
    stream = Terminal()
    with StatusLine(100, stream, clock=lambda: 0.0) as status:
        status.begin("loading")
    assert "\x1b[2K" in stream.getvalue().partition("loading")[2]


def test_a_display_starts_no_thread_and_leaves_standard_output_alone(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    threads, outputs = threading.active_count(), (sys.stdout, sys.stderr)
    with StatusLine(100, Terminal()) as status:
        status.show(metrics(1))
        assert threading.active_count() == threads
        assert (sys.stdout, sys.stderr) == outputs


def test_a_log_has_each_line_at_once():
    written = io.BytesIO()
    with StatusLine(100, io.TextIOWrapper(written, encoding="utf-8"), clock=lambda: 0.0) as status:
        for line, show in (
            (b"preparing", lambda: status.show_preparation("preparing")),
            (b"[0:00] loading", lambda: status.begin("loading")),
            (b"note", lambda: status.print_line("note")),
            (b"update 100/100", lambda: status.show(metrics(100))),
            (b"0.9", lambda: status.print_closing(["0.9"], {})),
        ):
            show()
            assert written.getvalue().splitlines()[-1].startswith(line)


def test_a_log_gets_the_end_in_plain_lines():
    stream = io.StringIO()
    with StatusLine(100, stream) as status:
        status.print_closing(["0.4 → 0.9"], {"chat with it": "grpo chat run", "score": "grpo eval run"})
    assert lines_of(stream) == [
        "0.4 → 0.9",
        "  chat with it:  grpo chat run",
        "  score:         grpo eval run",
    ]


def test_json_is_one_object_per_event():
    stream = io.BytesIO()
    with JsonEvents(stream) as events:
        events.begin("loading")
        events.begin("loading")
        events.show(metrics(1))
        events.begin("loading")
        events.print_line("a note", "yellow")
        events.print_closing(["0.9"], {"chat": "grpo chat run"})
    written = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["topic"] for event in written] == ["phase", "metrics", "note", "closing"]
    assert [written[0]["text"], written[2]["text"]] == ["loading", "a note"]
    assert written[1] == metrics(1)
    assert (written[3]["facts"], written[3]["commands"]) == (["0.9"], {"chat": "grpo chat run"})
    assert events.view.update == 1


def test_a_program_gets_each_event_at_once():
    written = io.BytesIO()
    with JsonEvents(io.BufferedWriter(written)) as events:
        for topic, tell in (
            ("phase", lambda: events.begin("loading")),
            ("metrics", lambda: events.show(metrics(1))),
            ("closing", lambda: events.print_closing(["0.9"], {})),
        ):
            tell()
            assert json.loads(written.getvalue().splitlines()[-1])["topic"] == topic


def test_a_program_is_told_of_each_phase_before_the_first_update_once_and_of_no_empty_one():
    stream = io.BytesIO()
    with JsonEvents(stream) as events:
        events.show_preparation("compiling")
        events.show_preparation("")
        for phase in ("loading", "", "loading", "waiting"):
            events.begin(phase)
    assert [json.loads(line)["text"] for line in stream.getvalue().splitlines()] == [
        *("compiling", "loading", "loading", "waiting")
    ]
