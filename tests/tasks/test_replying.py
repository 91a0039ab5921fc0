import os
from pathlib import Path

import pytest
from bounds import HANG_S

from grpo_actors.errors import RewardError
from grpo_actors.tasks.own.functions import OwnFunctions
from grpo_actors.tasks.own.replying import Replier
from grpo_actors.tasks.task import Problem

FILE = Path(__file__).with_name("own_environments.py")
PROBLEM = Problem(
    "sums/7", ({"role": "user", "content": "1+1?"},), "2", {"topic": "sums", "messages": "none"}
)


def own(function):
    return f"{FILE}:{function}"


def chat(*texts):
    return [*PROBLEM.messages, *({"role": "assistant", "content": text} for text in texts)]


@pytest.fixture
def replier():
    opened = []

    def open_replier(name, timeout_s=HANG_S):
        opened.append(Replier(name, timeout_s=timeout_s))
        return opened[-1]

    yield open_replier
    for one in opened:
        one.close()


def test_the_built_in_environment_replies_as_the_user_and_starts_no_process(replier):
    calculator = replier("calculator")
    assert calculator.reply(PROBLEM, chat("<tool>12*7</tool>")) == {"role": "user", "content": "84"}
    assert calculator.reply(PROBLEM, chat("It is 84.")) is None
    assert calculator._own == []


def test_an_own_environment_gets_the_chat_the_answer_and_the_columns(replier):
    environment = replier(own("asks_twice"))
    reply = environment.reply(PROBLEM, chat("well"))
    assert reply == {"role": "user", "content": "Once more, sums 2: well"}
    assert environment.reply(PROBLEM, chat("a", "b", "c")) is None


def test_a_turn_of_another_role_is_passed_on(replier):
    assert replier(own("takes_messages_alone")).reply(PROBLEM, chat("a")) == {"role": "tool", "content": "2"}


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("returns_a_number", r"must return a text, a turn with role and content, or None, got 4"),
        ("returns_half_a_turn", r"must return a text, a turn with role and content, or None"),
        ("raises", r"raised KeyError: 'lost' \(.*own_environments\.py:\d+\)"),
        ("hangs", r"took more than 0\.5 s"),
        ("exits", r"ended its process \(exit status 3\)"),
    ],
)
def test_an_environment_that_fails_gives_the_reason_and_is_called_again_next_time(replier, name, rule):
    environment = replier(own(name), timeout_s=0.5 if name == "hangs" else HANG_S)
    for _ in range(2):
        with pytest.raises(RewardError, match=rule):
            environment.reply(PROBLEM, chat("a"))


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        (
            "calculater",
            r"data\.environment: 'calculater' is not a built-in environment; did you mean 'calculator'\?",
        ),
        ("own.py", r"data\.environment: 'own\.py' must have the form"),
        (own("wants_completions"), r"data\.environment: .* must take the argument messages, by name"),
        (
            own("asks_twize"),
            r"data\.environment: .* has no function 'asks_twize'; did you mean 'asks_twice'\?",
        ),
    ],
)
def test_an_unusable_environment_is_refused_with_its_setting(replier, name, rule):
    with pytest.raises(RewardError, match=rule) as caught:
        replier(name)
    assert "\n" not in str(caught.value)


def test_no_process_is_left_where_its_loading_is_interrupted(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, pathlib, signal, time\n"
        "pathlib.Path(__file__).with_name('pid').write_text(str(os.getpid()))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(3600)\n"
    )
    # While the error is kept, so are the objects of its frames: nothing but a kill ends the process.
    with pytest.raises(KeyboardInterrupt) as interrupted:
        OwnFunctions([f"{tmp_path / 'slow.py'}:reply"], "environment", timeout_s=HANG_S)
    assert interrupted
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
