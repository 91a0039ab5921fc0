"""Functions of a program, served to the scorers of other processes: here to scorers of this one, over the same socket."""

import asyncio
import os
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bounds import HANG_S

from grpo_actors.errors import RewardError
from grpo_actors.tasks.own.caller import ADDRESS
from grpo_actors.tasks.own.frames import receive, send
from grpo_actors.tasks.own.serving import Serving
from grpo_actors.tasks.scoring import Scorer
from grpo_actors.tasks.task import Problem

PROBLEM = Problem("sums/7", ({"role": "user", "content": "1+1?"},), "2", {"topic": "sums"}, text_prompt=True)
COMPLETIONS = ["two", "skip"]
released = threading.Event()


class Judge:
    """An object with state and a bound method."""

    def __init__(self):
        self.seen = []

    def length(self, completions, topic, log_metric, **columns):
        assert topic == ["sums"] * len(completions)
        log_metric("calls", len(self.seen))
        self.seen.append(completions)
        return [None if text == "skip" else len(text) for text in completions]


def constant(completions, **columns):
    return [1.0] * len(completions)


def text(completions):
    return "high"


async def slowly(prompts, completions):
    return [float(len(prompts[0]))] * len(completions)


def raises(completions, **columns):
    raise ValueError("no such\nluck")


def leaves(completions, **columns):
    raise SystemExit(3)


async def is_cancelled(completions, **columns):
    raise asyncio.CancelledError


def hangs(completions, **columns):
    released.wait(HANG_S)
    return [0.0] * len(completions)


JUDGE = Judge()
FUNCTIONS = {
    "length": JUDGE.length,
    "slowly": slowly,
    "constant": constant,
    "raises": raises,
    "leaves": leaves,
    "is_cancelled": is_cancelled,
    "text": text,
    "hangs": hangs,
}


@pytest.fixture
def serving(monkeypatch):
    with Serving(FUNCTIONS) as one:
        monkeypatch.setenv(ADDRESS, one.address)
        yield one


def scorer_of(*names, timeout_s=HANG_S):
    return Scorer({f"caller:{name}": 1.0 for name in names}, timeout_s=timeout_s)


def test_closures_methods_and_async_functions_are_called_as_those_of_files(serving):
    with scorer_of("length", "slowly", "constant") as scorer:
        scores = scorer.score(PROBLEM, COMPLETIONS)
    assert scores.rewards == {
        "caller:length": [3.0, None],
        "caller:slowly": [4.0, 4.0],  # the prompt is the text 1+1?
        "caller:constant": [1.0, 1.0],
    }
    assert scores.failures == {}
    assert scores.logs.metrics == {"calls": [0.0]}
    assert JUDGE.seen == [COMPLETIONS]  # here, in this process


def test_the_functions_of_a_program_have_one_connection_and_no_process(serving):
    with scorer_of("length", "constant") as scorer:
        assert len(scorer._own) == 1
        assert scorer.needs() == {"caller:length": ["topic"]}


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("raises", r"raised ValueError: no such luck \(.*test_serving.py:\d+\)"),
        ("leaves", "raised SystemExit: 3"),
        ("is_cancelled", "raised asyncio.exceptions.CancelledError"),
        ("text", "must return a list .* got str"),
    ],
)
def test_a_function_that_fails_has_a_reason_and_the_next_call_works(serving, name, rule):
    with scorer_of(name, "constant") as scorer:
        for _ in range(2):
            scores = scorer.score(PROBLEM, COMPLETIONS)
            assert scores.rewards[f"caller:{name}"] == [None, None]
            assert scores.rewards["caller:constant"] == [1.0, 1.0]
            assert re.search(rule, scores.failures[f"caller:{name}"].splitlines()[0])


def test_a_function_that_hangs_fails_and_so_do_those_that_wait_for_it_until_it_returns(serving):
    released.clear()
    with scorer_of("hangs", timeout_s=0.2) as one, scorer_of("constant", timeout_s=0.2) as other:
        [failure] = one.score(PROBLEM, COMPLETIONS).failures.values()
        assert failure == (
            "took more than 0.2 s (reward_timeout_s); it goes on in the program that started the run, where no other call "
            "gets its turn before"
        )
        [failure] = other.score(PROBLEM, COMPLETIONS).failures.values()
        assert re.match(
            "did not get its turn: an earlier call has taken .* only one call runs there", failure
        )
        released.set()
        while other.score(PROBLEM, COMPLETIONS).failures:  # until the function has returned
            pass


def test_calls_of_several_processes_run_one_at_a_time_in_one_thread(monkeypatch):
    running, threads = [], set()

    def alone(completions, **columns):
        running.append(1)
        assert running == [1]
        threads.add(threading.get_ident())
        running.pop()
        return [1.0] * len(completions)

    with Serving({"alone": alone}) as serving:
        monkeypatch.setenv(ADDRESS, serving.address)

        def score_often(_):
            with scorer_of("alone") as scorer:
                return [scorer.score(PROBLEM, COMPLETIONS).failures for _ in range(20)]

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(score_often, range(4))) == [[{}] * 20] * 4
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


def test_a_name_that_was_not_given_is_refused_with_the_nearest_one(serving):
    with pytest.raises(RewardError, match=r"given no function 'lenght'; did you mean 'length'\?"):
        scorer_of("lenght")


def test_without_the_program_one_line_names_the_cure():
    with pytest.raises(RewardError) as error:
        scorer_of("length")
    assert str(error.value) == (
        "reward.functions: caller:length lives in the notebook or script that started the run with train(); to go on, pass "
        "length to train() or evaluate() there again, or write it to a file and set reward.functions to file.py:length"
    )


def test_a_program_that_has_closed_is_reported_and_leaves_nothing_behind(serving):
    folder = Path(serving.address.partition("@")[2]).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    with scorer_of("constant") as scorer:
        serving.close()
        [failure] = scorer.score(PROBLEM, COMPLETIONS).failures.values()
        assert failure == "the program that started the run has ended, or has closed the run"
        [failure] = scorer.score(PROBLEM, COMPLETIONS).failures.values()
        assert "the program that started the run cannot be reached (No such file or directory)" in failure
    assert not folder.exists()


def test_a_call_that_waits_for_its_turn_is_not_made_after_the_program_has_closed(serving):
    released.clear()
    begun = list(JUDGE.seen)
    with (
        scorer_of("hangs", timeout_s=0.2) as one,
        scorer_of("length") as other,
        ThreadPoolExecutor(1) as pool,
    ):
        one.score(PROBLEM, COMPLETIONS)
        waiting = pool.submit(other.score, PROBLEM, COMPLETIONS)
        serving.close()
        [failure] = waiting.result(HANG_S).failures.values()
        released.set()
    for thread in threading.enumerate():
        if thread.name == "grpo-actors_call":
            thread.join(HANG_S)
    assert failure
    assert JUDGE.seen == begun


@pytest.mark.parametrize("token", ["guessed", "gu\u00e4\ud800ssed"])
def test_nobody_is_answered_without_the_token(serving, token):
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(os.environ[ADDRESS].partition("@")[2])
        send(stranger, {"token": token})
        with pytest.raises(EOFError):
            receive(stranger)


def test_a_temporary_folder_whose_path_is_too_long_for_a_socket_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with pytest.raises(RewardError, match=r"no socket can be made at .*; set TMPDIR to a shorter path"):
        Serving({})
    assert list(folder.iterdir()) == []
