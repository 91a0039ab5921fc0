import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bounds import HANG_S

from grpo_actors.errors import RewardError
from grpo_actors.tasks.scoring import Scorer
from grpo_actors.tasks.task import Problem

FILE = Path(__file__).with_name("own_rewards.py")
PROBLEM = Problem(
    id="sums/7",
    messages=({"role": "user", "content": "1+1?"},),
    answer="2",
    columns={"topic": "sums", "level": 3},
)
COMPLETIONS = ["<answer>2</answer>", "skip"]


def own(function):
    return f"{FILE}:{function}"


@pytest.fixture
def scorer():
    opened = []

    def open_scorer(*names, timeout_s=HANG_S):
        opened.append(Scorer(dict.fromkeys(names, 1.0), timeout_s=timeout_s))
        return opened[-1]

    yield open_scorer
    for one in opened:
        one.close()


def test_built_in_rewards_are_reported_by_name_and_unweighted(scorer):
    scores = scorer("correctness", "xml_count").score(PROBLEM, COMPLETIONS)
    assert scores.rewards == {"correctness": [1.0, 0.0], "xml_count": [0.5, 0.0]}
    assert scores.failures == {}


def test_built_in_rewards_alone_start_no_process(scorer):
    assert scorer("correctness")._own == []


def test_own_and_built_in_rewards_score_together(scorer):
    scores = scorer(own("length"), "correctness").score(PROBLEM, COMPLETIONS)
    assert scores.rewards == {own("length"): [18.0, 4.0], "correctness": [1.0, 0.0]}


def test_an_own_reward_gets_prompts_answer_and_columns_as_lists_and_may_print(scorer):
    scores = scorer(own("echo_arguments")).score(PROBLEM, COMPLETIONS)
    assert scores.failures == {}
    assert scores.rewards[own("echo_arguments")] == [1.0, 1.0]


def test_only_the_arguments_that_a_function_names_are_passed(scorer):
    assert scorer(own("takes_two")).score(PROBLEM, COMPLETIONS).rewards[own("takes_two")] == [3.0, 3.0]


def test_a_column_cannot_take_the_place_of_an_argument_of_a_built_in_reward(scorer):
    problem = Problem("x/1", PROBLEM.messages, "2", {"answer": "3", "prompts": "none", "completions": "none"})
    assert scorer("correctness").score(problem, COMPLETIONS).rewards == {"correctness": [1.0, 0.0]}


def test_none_means_not_applicable_and_is_no_failure(scorer):
    scores = scorer(own("not_applicable")).score(PROBLEM, COMPLETIONS)
    assert scores.rewards[own("not_applicable")] == [1.0, None]
    assert scores.failures == {}


def test_a_function_is_loaded_once(scorer):
    one = scorer(own("counts_calls"))
    values = [one.score(PROBLEM, ["a"]).rewards[own("counts_calls")] for _ in range(3)]
    assert values == [[1.0], [2.0], [3.0]]


def test_text_of_any_kind_and_size_reaches_the_function(scorer):
    # Half a surrogate pair is no valid Unicode, yet a tokenizer may yield it; 2 MB fill any socket buffer.
    texts = ["\ud83d", "\0", "é" * 2_000_000, ""]
    assert scorer(own("length")).score(PROBLEM, texts).rewards[own("length")] == [1, 1, 2_000_000, 0]


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        ("raises", r"raised ValueError: no such luck \(.*own_rewards.py:\d+\)"),
        ("raises_what_cannot_be_shown", "raised .*Unshowable"),
        ("needs_more", "raised TypeError: .*'missing'"),
        ("eats_memory", "raised MemoryError"),
        ("returns_text", "must return a list .* got str"),
        ("returns_nothing", "must return a list .* got NoneType"),
        ("returns_too_few", "each of the 2 completions, got 1"),
        ("returns_too_much", r"must be finite in float32, got 1e\+300"),
        ("hangs", r"took more than 0.3 s \(reward_timeout_s\)"),
        ("hangs_deaf", "took more than 0.3 s"),
        ("hangs_in_a_regular_expression", "took more than 0.3 s"),
        ("hangs_with_a_child", "took more than 0.3 s"),
        ("exits", r"ended its process \(exit status 3\)"),
        ("exits_at_once", r"ended its process \(exit status 4\)"),
        ("segfaults", r"ended its process \(signal SIGSEGV\)"),
    ],
)
def test_a_reward_that_fails_is_none_with_a_reason_and_the_next_call_works(scorer, function, rule):
    one = scorer(own(function), own("length"), timeout_s=0.3 if "hangs" in function else HANG_S)
    for _ in range(2):
        scores = one.score(PROBLEM, COMPLETIONS)
        assert scores.rewards == {own(function): [None, None], own("length"): [18.0, 4.0]}
        [(name, failure)] = scores.failures.items()
        assert name == own(function)
        assert re.search(rule, failure.splitlines()[0])


def test_the_traceback_follows_the_reason(scorer):
    [failure] = scorer(own("raises")).score(PROBLEM, COMPLETIONS).failures.values()
    assert 'raise ValueError("no such\\nluck")' in failure


def test_a_column_that_is_not_json_is_a_failure_and_the_next_call_works(scorer):
    one = scorer(own("length"))
    problem = Problem("x/1", PROBLEM.messages, "2", {"picture": b"bytes"})
    scores = one.score(problem, COMPLETIONS)
    assert scores.rewards == {own("length"): [None, None]}
    assert "as JSON: Object of type bytes" in scores.failures[own("length")]
    assert one.score(PROBLEM, COMPLETIONS).failures == {}


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("corectness", "did you mean 'correctness'"),
        (
            "missing.py:f",
            "there is no file .*missing.py; a relative one is looked up from the current folder",
        ),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("json.no_such_part:f", "there is no module 'json.no_such_part'"),
        (own("lenght"), "has no function 'lenght'; did you mean 'length'"),
        (own("NOT_A_FUNCTION"), "must be a function, got int"),
        (
            own("takes_no_completions"),
            r"must take the argument completions or completion_ids, by name.*takes_no_completions\(prompts\)",
        ),
        (own("Judge"), "got the class Judge; name an object of it"),
        (str(FILE), 'must have the form "file.py:function"'),
        (f"{FILE}:", "must have the form"),
        (":length", "must have the form"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(name, rule):
    with pytest.raises(RewardError, match=rule) as caught:
        Scorer({own("length"): 1.0, name: 1.0}, timeout_s=5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        (
            "import no_such_package",
            "raised ModuleNotFoundError: No module named 'no_such_package' .*broken.py:1",
        ),
        ("def f(:", "raised SyntaxError"),
        ("raise SystemExit(5)", r"ended its process \(exit status 5\)"),
    ],
)
def test_a_file_that_fails_to_load_is_refused_in_one_line(tmp_path, code, rule):
    file = tmp_path / "broken.py"
    file.write_text(code)
    with pytest.raises(RewardError, match=rule) as caught:
        Scorer({f"{file}:f": 1.0}, timeout_s=5)
    assert "\n" not in str(caught.value)


def test_a_relative_file_and_a_module_are_looked_up_from_the_current_folder(tmp_path, monkeypatch, scorer):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "neighbour.py").write_text("VALUE = 5.0\n")
    (tmp_path / "mine" / "reward.py").write_text(
        "import neighbour\ndef five(completions, **columns):\n    return [neighbour.VALUE] * len(completions)\n"
    )
    shutil.copy(FILE, tmp_path / "top.py")
    monkeypatch.chdir(tmp_path)
    scores = scorer("mine/reward.py:five", "top:length").score(PROBLEM, ["abc"])
    assert scores.rewards == {"mine/reward.py:five": [5.0], "top:length": [3.0]}


def test_files_of_two_folders_have_neighbours_of_their_own(scorer, tmp_path):
    names = []
    for folder, number in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "util.py").write_text(f"X = {number}\n")
        file = tmp_path / folder / "reward.py"
        file.write_text("from util import X\ndef value(completions): return [X] * len(completions)\n")
        names.append(f"{file}:value")
    assert scorer(*names).score(PROBLEM, ["a"]).rewards == {names[0]: [1.0], names[1]: [2.0]}


def test_files_named_like_the_standard_library_do_not_replace_it(scorer, tmp_path, monkeypatch):
    """Neither does the reward's own file, nor do they in a process that the reward starts."""
    monkeypatch.chdir(tmp_path)
    for name in ("json", "queue", "random"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)\n")
    (tmp_path / "neighbour.py").write_text("VALUE = 5.0\n")
    (tmp_path / "statistics.py").write_text(
        "import json, multiprocessing, random, statistics\n"
        "from neighbour import VALUE\n"
        "def value(completions):\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        [mean] = pool.map(statistics.mean, [[VALUE]])\n"
        "    return [mean] * len(completions)\n"
    )
    scores = scorer("statistics.py:value", timeout_s=60).score(PROBLEM, ["a"])
    assert scores.failures == {}
    assert scores.rewards == {"statistics.py:value": [5.0]}


def test_two_rewards_of_one_file_share_its_state(scorer, tmp_path):
    file = tmp_path / "shared.py"
    file.write_text(
        "seen = []\n"
        "def first(completions): seen.append(1); return [len(seen)] * len(completions)\n"
        "def second(completions): seen.append(1); return [len(seen)] * len(completions)\n"
    )
    scores = scorer(f"{file}:first", f"{file}:second").score(PROBLEM, ["a"])
    assert scores.rewards == {f"{file}:first": [1.0], f"{file}:second": [2.0]}


@pytest.mark.skipif(
    sys.platform != "linux", reason="Linux alone ranks processes for the time when memory runs out"
)
def test_when_memory_runs_out_the_reward_goes_before_the_training(scorer):
    name = own("returns_its_rank_for_the_out_of_memory_killer")
    assert scorer(name).score(PROBLEM, ["a"]).rewards[name] == [1000.0]


def test_a_call_that_is_interrupted_leaves_no_stale_answer_to_the_next(scorer):
    one = scorer(own("hangs"), own("length"))

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            one.score(PROBLEM, COMPLETIONS)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert one._own[0].call(1, {"completions": [[{"content": "abc"}]], "prompts": [], "answer": []}) == [3.0]


def test_closing_ends_the_process_even_in_the_middle_of_what_it_started(scorer):
    one = scorer(own("hangs_with_a_child"), timeout_s=0.2)
    one.score(PROBLEM, COMPLETIONS)
    child = one._own[0]._place._process
    one.close()
    assert child.returncode == -signal.SIGKILL
    one.close()  # twice is harmless


# A regular expression that holds the interpreter's lock ends by the kernel's timer.
@pytest.mark.parametrize("function", ["says_so", "hangs", "hangs_deaf", "hangs_in_a_regular_expression"])
def test_the_process_dies_with_a_parent_that_is_killed(function):
    script = (
        "import threading, time\n"
        "from grpo_actors.tasks.scoring import Scorer\n"
        f"own = Scorer({{{own(function)!r}: 1.0}}, timeout_s=0.5)._own[0]\n"
        "own._send({'call': 0, 'arguments': {'completions': []}}, time.monotonic() + 5)\n"
        "threading.Event().wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=FILE.parents[2], stderr=subprocess.PIPE)
    with parent:
        assert parent.stderr.readline() == b"called\n"
        parent.kill()
        start = time.monotonic()
        # The child holds the parent's standard error too: its end comes when both are gone.
        assert parent.stderr.read() == b""
    assert time.monotonic() - start < HANG_S
