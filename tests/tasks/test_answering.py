"""What a process answers about a user's functions: loaded, called, and failed in one line."""

import asyncio
import sys
import types

import pytest

from grpo_actors.errors import RewardError
from grpo_actors.tasks.own import answering
from grpo_actors.tasks.own.answering import MAX_TRACEBACK_CHARACTERS, EventLoop, Functions, failure
from grpo_actors.tasks.own.functions import place_of
from grpo_actors.tasks.own.kinds import KINDS, completion_count, is_own
from grpo_actors.tasks.own.loading import checked, load, signature_of

REWARD, ENVIRONMENT = KINDS["reward"], KINDS["environment"]


def takes_prompts(prompts): ...


def takes_completions(completions): ...


def takes_answers(completion_ids, *more, answer=1): ...


def takes_any(**columns): ...


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder; what is loaded from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def caught(code: str, name: str = "/own/mine.py") -> dict[str, str]:
    """The reply for what this code raises."""
    try:
        exec(compile(code, name, "exec"), {})  # noqa: S102 - written here
    except BaseException as error:  # noqa: BLE001
        return failure(error)
    raise AssertionError


def test_a_failure_is_the_error_and_its_place_in_one_line_and_a_traceback_of_the_users_code():
    reply = caught("def f():\n    raise ValueError('no\\nluck')\nf()")
    assert reply["failure"] == "raised ValueError: no luck (/own/mine.py:2)"
    assert reply["traceback"].startswith("Traceback (most recent call last):\n")
    assert reply["traceback"].count("/own/mine.py") == 2
    assert answering.__file__ not in reply["traceback"]


def test_an_error_in_the_rules_of_a_function_needs_no_traceback_and_one_that_was_not_raised_has_no_place():
    assert failure(RewardError("must be a list")) == {"failure": "must be a list", "traceback": ""}
    assert failure(ValueError("x"))["failure"] == "raised ValueError: x"


def test_an_error_of_syntax_is_named_by_its_message_and_notes_are_not():
    assert caught("def f(:")["failure"].startswith("raised SyntaxError: invalid syntax")
    noted = caught("error = KeyError('k')\nerror.add_note('a note')\nraise error")
    assert noted["failure"] == "raised KeyError: 'k' (/own/mine.py:3)"
    assert "a note" in noted["traceback"]


def test_a_long_message_is_cut_and_a_long_traceback_keeps_its_end():
    reply = caught(f"raise ValueError({'x' * (MAX_TRACEBACK_CHARACTERS + 1000)!r} + 'END')")
    message = f"ValueError: {'x' * MAX_TRACEBACK_CHARACTERS}"[:500]
    assert reply["failure"] == f"raised {message} (/own/mine.py:1)"
    assert len(reply["traceback"]) == MAX_TRACEBACK_CHARACTERS
    assert reply["traceback"].endswith("xEND\n")


def test_a_call_that_fails_within_this_package_shows_the_users_frames_only():
    functions = Functions(lambda *_: {}.__getitem__, EventLoop())
    functions.answer({"load": "x", "kind": "reward", "timeout_s": 1.0})
    reply = functions.answer({"call": 0, "arguments": {}})
    assert reply["failure"].startswith("raised TypeError: ")
    assert "answering.py" not in reply["traceback"]


def test_async_functions_share_one_loop_which_is_closed_at_the_end():
    async def loop_of() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    loop = EventLoop()
    first, second = loop.run(loop_of()), loop.run(loop_of())
    assert first is second
    assert not first.is_closed()
    loop.close()
    assert first.is_closed()
    EventLoop().close()


def test_a_function_is_loaded_with_its_limit_and_called_with_what_it_may_log():
    def reward(completions, trainer_state, log_extra, log_metric, level=2, **columns):
        log_extra("step", [trainer_state.global_step] * 2)
        log_metric("level", level)
        return [1, None]

    asked = []

    def find(spec, kind):
        asked.append((spec, kind))
        return reward

    functions = Functions(find, EventLoop())
    loaded = functions.answer({"load": "mine.py:reward", "kind": "reward", "timeout_s": 7.0})
    assert loaded == {
        "accepts": None,
        "requires": ["completions", "trainer_state", "log_extra", "log_metric"],
    }
    assert asked == [("mine.py:reward", REWARD)]
    assert functions.timeout_s == 7.0
    arguments = {
        "completions": ["a", "b"],
        "trainer_state": {"global_step": 3},
        "log_extra": None,
        "log_metric": None,
    }
    assert functions.answer({"call": 0, "arguments": arguments}) == {
        "result": [1.0, None],
        "extra": {"step": [3, 3]},
        "metrics": {"level": [2.0]},
    }


def test_what_a_function_takes_by_name_and_needs():
    def takes(position, /, needed, *more, given=1, also, **columns): ...

    assert signature_of(takes).accepts is None
    assert signature_of(takes).requires == ["needed", "also"]
    assert signature_of(takes_answers).accepts == ["completion_ids", "answer"]

    assert (signature_of(dict.update).accepts, signature_of(dict.update).requires) == (None, [])


@pytest.mark.parametrize(
    ("function", "kind", "rule"),
    [
        (int, REWARD, "must be a function or an object, got the class f; name an object of it"),
        (3, REWARD, "must be a function, got int"),
        (
            takes_prompts,
            REWARD,
            r"take the argument completions or completion_ids, by name, got f\(prompts\); write",
        ),
        (takes_prompts, REWARD, r"; write \(prompts, completions, answer, \*\*columns\)$"),
        (takes_completions, ENVIRONMENT, r"must take the argument messages, by name"),
    ],
)
def test_what_cannot_be_called_as_its_kind_is_refused(function, kind, rule):
    with pytest.raises(RewardError, match=rule):
        checked(function, "f", kind)


def test_one_of_the_arguments_is_enough_or_any_name():
    for function in (takes_completions, takes_answers, takes_any, {}.update):
        assert checked(function, "f", REWARD) is function


def test_functions_of_one_file_share_it_and_it_may_import_its_neighbours(folder):
    (folder / "near_by.py").write_text("VALUE = 5\n")
    (folder / "mine_too.py").write_text(
        "from near_by import VALUE\ndef f(completions): return VALUE\ndef g(completions): ...\n"
    )
    f, g = (load(f"mine_too.py:{name}", REWARD) for name in "fg")
    assert f([]) == 5
    assert f.__globals__ is g.__globals__
    assert f.__module__ == "mine_too"
    assert load(f"{folder}/mine_too.py:f", REWARD) is f
    with pytest.raises(RewardError, match=r"mine_too\.py has no function 'h'"):
        load("mine_too.py:h", REWARD)


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("json.py", "own_json"),
        ("v1.2.py", "own_v1_2"),
        ("pytest.py", "own_pytest"),
        ("fresh_one.py", "fresh_one"),
    ],
)
def test_a_file_does_not_take_the_name_of_another_module(folder, file, module):
    (folder / file).write_text("def f(completions): ...\n")
    before = sys.modules.get(module)
    assert load(f"{file}:f", REWARD).__module__ == module
    assert before is None
    assert isinstance(sys.modules[module], types.ModuleType)


def test_a_file_that_fails_is_loaded_anew_next_time(folder):
    file = folder / "half_done.py"
    file.write_text("VALUE = 1\nraise KeyError('k')\n")
    with pytest.raises(KeyError):
        load("half_done.py:f", REWARD)
    assert "half_done" not in sys.modules
    file.unlink()
    with pytest.raises(
        RewardError, match=r"there is no file .*half_done\.py; a relative one is looked up from the"
    ):
        load("half_done.py:f", REWARD)


def test_a_module_that_is_missing_is_told_from_one_whose_import_is(folder):
    (folder / "needs_more.py").write_text("import no_such_package\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        load("needs_more:f", REWARD)
    for name in ("no_such_package", "no_such_package.part"):
        with pytest.raises(
            RewardError, match=rf"there is no module '{name}'; for a file write its path, such as {name}\.py:"
        ):
            load(f"{name}:f", REWARD)


def test_the_number_of_completions_is_that_of_their_texts_or_tokens():
    assert completion_count({"completion_ids": [[1], [2]]}) == 2
    assert completion_count({"completions": ["a"], "completion_ids": [[1]]}) == 1
    assert completion_count({"messages": []}) == 0


def test_a_name_with_a_colon_or_of_a_file_is_an_own_function():
    assert [is_own(name) for name in ("a:b", "a.py", "a.py:b", "correctness")] == [True, True, True, False]


def test_functions_of_one_folder_have_one_place(folder):
    assert place_of("a.py:f") == place_of("./b.py:f") == place_of("module:f") == folder
    assert place_of("~/a.py:f") != folder
    assert place_of(f"{folder}/sub/a.py:f") == folder / "sub"
    assert place_of("caller:f") == "caller" == place_of("caller:g")
