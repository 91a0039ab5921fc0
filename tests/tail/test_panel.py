"""The whole view: it fits, it shows everything, and no record breaks it."""

import re

import pytest
from rich.console import Console
from rich.text import Text
from scores import score

from grpo_actors.observe.records import FIELDS, make_record
from grpo_actors.observe.view import RunView
from grpo_actors.tail.panel import _cut, _from_both_ends, panel
from grpo_actors.tail.tables import evaluation, learning, rollout, workers

METRICS = {
    "update": 2,
    "total_updates": 110,
    "loss": 0.0123,
    "reward_mean": 0.62,
    "reward_std": 0.31,
    "rewards": {"exact": 0.55},
    "kl": 0.002,
    "clip_share": 0.012,
    "ratio_mean": 1.0002,
    "ratio_max": 1.34,
    "staleness": {"0": 6, "1": 2},
    "grad_norm": 0.43,
    "learning_rate": 1e-6,
    "completion_length_mean": 35.0,
    "completion_length_max": 64,
    "truncated_share": 0.03,
    "zero_variance_share": 0.25,
    "rollout_tokens_per_s": 12_345,
    "learner_tokens_per_s": 4_321,
    "update_s": 0.8,
    "learner_wait_share": 0.25,
    "rollout_wait_share": 0.031,
}
COMPLETIONS = [{"text": f"so it is {n} [b]", "reward": n / 8, "truncated": n == 0} for n in range(8)]
RECORDS = [
    ("start", {"run_name": "quickstart", "model_name": "tiny", "device": "GPU 0"}),
    ("metrics", {**METRICS, "update": 1}),
    ("metrics", METRICS),
    (
        "worker",
        {"worker": "rollout-0", "state": "sampling", "version": 2, "tokens_per_s": 6_000, "device": "GPU 1"},
    ),
    ("eval", {"update": 2, "score": score(0.41).model_dump(), "best": True}),
    ("sample", {"update": 2, "prompt": "3 + 4?", "answer": "7", "completions": COMPLETIONS}),
    ("headcount", {"update": 1, "before": 1, "workers": 2, "reason": "the learner waits"}),
    ("alarm", {"name": "kl", "text": "rises"}),
]


def view_of(records: list[tuple[str, dict]]) -> RunView:
    view = RunView()
    for seq, (topic, fields) in enumerate(records, start=1):
        view = view.apply(make_record(seq, 100.0 + seq, topic, fields))
    return view


def drawn(view: RunView, width: int, height: int, silent_s: float = 0.0) -> str:
    console = Console(width=width, height=height, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(panel(view, width, height, silent_s))
    return capture.get()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 50), (120, 30), (120, 60), (200, 60)])
def test_it_fits_and_shows_every_number(width, height):
    text = drawn(view_of(RECORDS), width, height)
    lines = text.splitlines()
    assert len(lines) <= height
    assert max(len(line) for line in lines) <= width
    shown = re.sub(r" +", " ", text)
    for expected in (
        "quickstart · tiny",
        "running",
        "2/110 updates",
        "! kl: rises",
        "reward 0.62 ± 0.31",
        "exact 0.55",
        "loss 0.0123",
        "KL 0.0020",
        "ratio 1.0002 max 1.34",
        "clipped 1.2 % of tokens",
        "grad norm 0.430",
        "lr 1.00e-06",
        "length 35 max 64",
        "truncated 3.0 % of completions",
        "zero var. 25 % of groups",
        "staleness 0 █████████ 75 %",
        "1 ███ 25 %",
        "rollout 12.3k tok/s, waits 3.1 %",
        "learner 4,321 tok/s, waits 25 %",
        "rollout-0 sampling v2 6,000 tok/s",
        "wanted 2: the learner",
        "accuracy, greedy",
        "0.31 to 0.51",
        "best 0.41 @2",
        "? 3 + 4? = 7",
        "0.88 so it is 7 [b]",
    ):
        assert expected in shown


def test_a_large_terminal_shows_the_rest_of_the_numbers():
    measured = {
        "logprob_gap_mean": 0.002,
        "logprob_gap_max": 0.05,
        "entropy": 0.31,
        "skipped_steps": 2,
        "groups": 8,
        "completions": 64,
        "tokens": 5_000,
        "padding_share": 0.2,
        "memory_gb": 1.5,
        "peers_memory_gb": {"a": 0.5, "b": 0.25},
        "staleness": {"0": 6, "4": 1, "7": 1},
    }
    gain = {"value": 0.1, "low": 0.05, "high": 0.15}
    worker = {"worker": "w", "state": "sampling", "groups": 12, "memory_gb": 0.5}
    records = [
        ("metrics", METRICS | measured),
        (
            "eval",
            {"update": 2, "score": score(0.41).model_dump(), "gain": gain, "completion_length_mean": 31.0},
        ),
        ("worker", worker),
    ]
    assert "none yet" in drawn(view_of(records[:1]), 200, 60)
    shown = re.sub(r" +", " ", drawn(view_of(records), 200, 60))
    assert "none yet" not in shown
    for expected in (
        *("worker gap 0.0020 max 0.050", "entropy 0.310", "skipped 2 non-finite steps", "update 0.80 s"),
        *("batch 8 groups, 64 completions", "tokens 5,000, 20 % padding"),
        *("memory learner 1.50 GB, others 0.75 GB", "4+ ███ 25 %", "gain 0.10 [0.05, 0.15]", "length 31, "),
        "12 groups 0.50 GB",
    ):
        assert expected in shown


def rendered(table, width: int) -> list[str]:
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


def line_of(lines: list[str], label: str) -> str:
    [line] = [line for line in lines if line.strip().startswith(label)]
    return line


def test_curves_fill_the_width_that_labels_and_numbers_leave():
    series = [
        ("metrics", {**METRICS, "update": n, "reward_mean": n / 100, "loss": n / 100}) for n in range(1, 101)
    ]
    scores = [("eval", {"update": n, "score": score(n / 100).model_dump()}) for n in range(1, 101)]
    view = view_of([*series, *scores])
    for block, labels in ((learning, ("reward", "loss")), (rollout, ("length",))):
        lines = rendered(block(view, 60), 60)
        # 12 columns each of the label and the number, and three gaps.
        curves = [re.search("[▁▂▃▄▅▆▇█]+$", line_of(lines, label)) for label in labels]
        assert [len(curve.group()) for curve in curves if curve] == [60 - 12 - 12 - 3] * len(labels)
    large = view.apply(
        make_record(999, 999.0, "metrics", {**METRICS, "update": 101, "reward_mean": 123.4, "reward_std": 5})
    )
    line = line_of(rendered(learning(large, 60), 60), "reward")
    # The number has one column more than its 12, the curve one less.
    assert re.search(r"123\.40 ± 5\.00 [▁▂▃▄▅▆▇█]{32}$", line)
    curve = re.search("[▁▂▃▄▅▆▇█]+$", line_of(rendered(evaluation(view, 60), 60), "@100"))
    assert curve is not None
    assert len(curve.group()) == 60 - 12 - 8


def test_each_staleness_has_a_bar_and_from_four_versions_on_they_share_one():
    groups = {"0": 97, "3": 1, "4": 1, "11": 1, "2": 0, "odd": 5}
    lines = rendered(rollout(view_of([("metrics", {**METRICS, "staleness": groups})]), 60), 60)
    first = lines.index(line_of(lines, "staleness"))
    assert [re.sub(" +", " ", line.strip()) for line in lines[first : first + 4]] == [
        # 12 columns are all groups, and no bar is empty.
        *("staleness 0 ████████████ 97 %", "3 █ 1.0 %", "4+ █ 2.0 %"),
        "rollout 12.3k tok/s, waits 3.1 %",
    ]
    lines = rendered(rollout(view_of([("metrics", {**METRICS, "staleness": {}})]), 60), 60)
    assert re.sub(" +", " ", line_of(lines, "staleness")) == "staleness –"


def test_of_many_rewards_the_first_are_shown_and_steps_only_if_some_were_skipped():
    rewards = {f"r{n}": n for n in range(7)}
    lines = rendered(
        learning(view_of([("metrics", {**METRICS, "rewards": rewards, "skipped_steps": 0})]), 60), 60
    )
    assert [line.split() for line in lines if line.startswith("  r")] == [
        [f"r{n}", f"{n}.00"] for n in range(6)
    ]
    assert not any("skipped" in line for line in lines)


def test_the_device_of_the_learner_is_not_that_of_the_workers():
    lines = rendered(rollout(view_of(RECORDS), 60), 60)
    assert line_of(lines, "learner").endswith("waits 25 %, GPU 0")
    assert line_of(lines, "rollout   ").endswith("waits 3.1 %")


@pytest.mark.parametrize("many", [8, 9])
def test_a_line_of_a_worker_has_more_where_there_is_room(many):
    fields = {"state": "sampling", "version": 2, "tokens_per_s": 5, "groups": 3, "memory_gb": 0.5}
    view = view_of([("worker", {"worker": f"a-rather-long-name-{n}", **fields}) for n in range(many)])
    narrow, wide = (rendered(workers(view, width), 80) for width in (47, 48))
    assert narrow[1].split() == ["a-rather-lon", "sampling", "v2", "5", "tok/s"]
    assert wide[1].split() == ["a-rather-lon", "sampling", "v2", "5", "tok/s", "3", "groups", "0.50", "GB"]
    assert [line.strip() for line in wide[9:]] == (["and 1 more"] if many == 9 else [])


@pytest.mark.parametrize(("width", "beside"), [(109, False), (110, True)])
def test_a_wide_terminal_has_three_blocks_in_a_row(width, beside):
    lines = drawn(view_of(RECORDS), width, 50).splitlines()
    [first] = [line for line in lines if "rollout and speed" in line]
    assert "learning" in first
    assert ("evaluation" in first) == beside
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize(("height", "blank"), [(31, False), (32, True)])
def test_a_tall_terminal_has_blank_lines_between_the_parts(height, blank):
    records = [record for record in RECORDS if record[0] != "alarm"]
    lines = drawn(view_of(records), 120, height).splitlines()
    assert (lines[2].strip() == "") == blank


def test_a_silence_of_ten_seconds_is_normal_and_the_newest_two_alarms_are_shown():
    alarms = [("alarm", {"name": name, "text": "x"}) for name in "abc"]
    view = view_of([*RECORDS, *alarms])
    text = drawn(view, 120, 50, silent_s=10.0)
    assert "running" in text
    assert [f"! {name}: x" in text for name in "abc"] == [False, True, True]
    assert "silent for 0:11" in drawn(view, 120, 50, silent_s=11.0)


def test_the_header_names_the_run_the_policy_and_the_time_left():
    lines = drawn(RunView(), 80, 24).splitlines()
    assert lines[0].startswith("run ")
    assert lines[1].strip() == "0 updates  –"
    text = drawn(view_of([*RECORDS, ("policy", {"version": 7})]), 80, 24).splitlines()
    assert text[0].startswith("quickstart · tiny · policy v7")
    # 108 updates are left, one a second. The bar takes what is left of the line, with two blanks between.
    facts = "2/110 updates  1.0 up/s  1:48 left"
    assert text[1].rstrip().endswith(f"  {facts}")
    assert len(text[1].rstrip()) == 80


def test_of_completions_that_do_not_fit_the_best_and_the_worst_are_shown():
    assert [_from_both_ends(list(range(8)), kept) for kept in (0, 1, 2, 3, 7, 8, 9)] == [
        *([], [0], [0, 7], [0, 1, 7], [0, 1, 2, 3, 5, 6, 7], list(range(8)), list(range(8)))
    ]


@pytest.mark.parametrize(
    ("measured", "shown"),
    [
        ({}, None),
        (
            {"groups_passed_over": {"no_signal": 2, "too_easy": 1}, "problems_skipped": 12},
            "selection 3 passed over, 12 skipped",
        ),
        ({"groups_passed_over": {}}, "selection 0 passed over"),
        ({"problems_skipped": 3}, "selection 3 skipped"),
    ],
)
def test_a_selection_is_shown_where_there_is_one(measured, shown):
    view = view_of([*RECORDS, ("metrics", {**METRICS, **measured})])
    assert len(drawn(view, 80, 24).splitlines()) <= 24
    text = re.sub(r" +", " ", drawn(view, 80, 50))
    assert ("selection" in text) == (shown is not None)
    assert shown is None or shown in text


def test_a_small_terminal_shows_the_best_and_the_worst_completion():
    text = drawn(view_of(RECORDS), 80, 24)
    assert "so it is 7" in text
    assert "so it is 0 [b] [cut]" in text
    assert "so it is 4" not in text


def test_the_header_shows_silence_and_how_the_run_ended():
    assert "waiting for the first event" in drawn(RunView(), 80, 24)
    assert "silent for 1:00" in drawn(view_of(RECORDS), 80, 24, silent_s=60.0)
    ended = view_of([*RECORDS, ("stop", {"reason": "out of memory", "exit_code": 1})])
    assert "run ended: out of memory (exit code 1)" in drawn(ended, 80, 24)


@pytest.mark.parametrize("value", [None, "\x1b[2J[/b]", [], {}, [{}], {"1": "x"}, True, -1, 1e300])
def test_no_value_of_any_field_breaks_it(value):
    records = [(topic, {**dict.fromkeys(fields, value), "update": 1}) for topic, fields in FIELDS.items()]
    for width in (40, 80, 120):
        assert "\x1b" not in drawn(view_of([*RECORDS, *records, *records]), width, 50)


def test_only_some_of_many_workers_are_shown_and_active_ones_come_first():
    gone = [("worker", {"worker": f"a{n}", "state": "lost"}) for n in range(8)]
    text = drawn(view_of([*gone, ("worker", {"worker": "z", "state": "sampling"})]), 80, 40)
    assert "z " in text
    assert "and 1 more" in text


def test_a_worker_in_quarantine_is_shown_with_the_reason():
    fields = {"worker": "w", "state": "quarantined", "why": "log-probs 2 nats off the learner's, 0.1 at most"}
    text = drawn(view_of([*RECORDS, ("worker", fields)]), 160, 40)
    assert re.search(r"w +quarantined log-probs 2 nats off", text)


def test_each_process_names_its_device():
    text = drawn(view_of(RECORDS), 160, 50)
    (learner,) = [line for line in text.splitlines() if "4.3k tok/s" in line or "4,321 tok/s" in line]
    assert "GPU 0" in learner
    (worker,) = [line for line in text.splitlines() if "rollout-0" in line]
    assert "GPU 1" in worker


@pytest.mark.parametrize(("lines", "kept"), [(1, 40), (2, 75), (3, 115)])
def test_a_text_is_cut_to_its_lines_of_which_several_may_be_an_eighth_shorter_together(lines, kept):
    assert len(_cut(Text("x" * 200), 40, lines)) == kept
    assert len(_cut(Text("x" * 30), 40, lines)) == 30
