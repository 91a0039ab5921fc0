"""A chat: its output in a real terminal, and the conversation that is kept."""

import json
import signal
import sys
from pathlib import Path

import pytest
from bounds import HANG_S
from terminals import Terminal

from grpo_actors.generate.chat import HELP, Chat
from grpo_actors.generate.generator import Generator
from grpo_actors.policy.decoding.sampling import SamplingParams, sample_groups

ROOT = Path(__file__).parents[2]

TOOL = [sys.executable, "-m", "grpo_actors.generate"]


def chat(*arguments):
    environment = {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    return Terminal([*TOOL, *arguments], environment=environment)


def expected(policy, messages, turn, max_tokens=60, temperature=0.7):
    """Return the model's answer to a conversation, sampled in another way than a chat does."""
    params = SamplingParams(max_tokens, temperature=temperature)
    seeds = [Generator(policy, params, 0).seeds(turn, 1)]
    [[sample]] = sample_groups(policy, [policy.chat.encode(messages)], seeds, params)
    return policy.decode(sample.tokens)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def messages(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_chat_in_a_terminal(tiny, tmp_path):
    first, second = "What is 12 + 34?", "And 5 more?"
    with chat("--max-tokens", "60") as terminal:
        assert "/help lists the commands" in terminal.read_until("\n> ")
        one = terminal.ask(first)
        assert one == expected(tiny, [user(first)], 0)
        two = terminal.ask(second)
        assert two == expected(tiny, [user(first), assistant(one), user(second)], 1)
        assert terminal.ask(f"/save {tmp_path / 'chat.jsonl'}").startswith("(4 messages in ")
        assert terminal.ask("/clear") == "(a new conversation)"
        assert terminal.ask(first) == expected(tiny, [user(first)], 2), "nothing is left of the turns before"
        assert "no such command" in terminal.ask("/nonsense")
        # Arrow up: the line before.
        assert "no such command" in terminal.ask("\x1b[A")
        terminal.type("\x04")
        assert terminal.process.wait(HANG_S) == 0
    assert messages(tmp_path / "chat.jsonl") == [user(first), assistant(one), user(second), assistant(two)]


def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_chat(tiny, tmp_path):
    # At this temperature an answer goes on for hundreds of tokens.
    with chat("--temperature", "50", "--max-tokens", "900") as terminal:
        terminal.read_until("\n> ")
        terminal.type("hi\n")
        terminal.read_until("\n")
        terminal.read()  # it has begun
        terminal.type("\x03")
        assert terminal.read_until("\n> ").endswith("\n(ended)\n> ")
        assert terminal.ask(f"/save {tmp_path / 'chat.jsonl'}").startswith("(2 messages in ")
        # Enter as well: a signal between the prompt's display and CPython's wait for a key shows at the next key only.
        terminal.type("\x03\n")
        assert terminal.process.wait(HANG_S) == 0
    [_, answer] = messages(tmp_path / "chat.jsonl")
    whole = expected(tiny, [user("hi")], 0, max_tokens=900, temperature=50)
    said = answer["content"].rstrip("\ufffd")  # the end of a character may be missing
    assert whole.startswith(said)
    assert 0 < len(said) < len(whole)


# --- line by line ---------------------------------------------------------------------------------


@pytest.fixture
def talk(tiny, monkeypatch, capsys):
    """Run a chat over some lines and return its output."""

    def run(*said, max_context=0, system=""):
        params = SamplingParams(20, temperature=0.7)
        typed = iter(said)

        def type_line(prompt):
            del prompt
            for line in typed:
                return line
            raise EOFError

        monkeypatch.setattr("builtins.input", type_line)
        Chat(Generator(tiny, params, 0, max_context), system).run()
        return capsys.readouterr().out

    return run


def test_lines_without_a_question_get_no_answer(tiny, talk):
    banner = f"{tiny.name}. /help lists the commands.\n"
    assert talk("/help", "  ", "\udcff", "/quit", "hi") == f"{banner}{HELP}\n(the line must be UTF-8)\n"
    assert talk() == f"{banner}\n", "Ctrl-D leaves the cursor in a new line"


def test_a_question_may_begin_with_a_slash_after_a_space_and_leaves_ctrl_c_as_it_was(tiny, talk, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    talk("/system é", " /help ", f"/save {tmp_path / 'chat'}")
    assert signal.getsignal(signal.SIGINT) is before
    system = {"role": "system", "content": "é"}
    answered = expected(tiny, [system, user("/help")], 0, max_tokens=20)
    assert messages(tmp_path / "chat") == [system, user("/help"), assistant(answered)]
    assert "é" in (tmp_path / "chat").read_text()


def test_the_system_prompt_is_set_kept_over_clear_and_unset(tiny, talk, tmp_path):
    files = [tmp_path / name for name in "abc"]
    talk(
        *(f"/save {files[0]}", "/system be brief", "hi", f"/save {files[1]}"),
        *("/clear", "/system", "hi", f"/save {files[2]}"),
        system="rhyme",
    )
    system = {"role": "system", "content": "be brief"}
    assert messages(files[0]) == [{"role": "system", "content": "rhyme"}]
    answered = expected(tiny, [system, user("hi")], 0, max_tokens=20)
    assert messages(files[1]) == [system, user("hi"), assistant(answered)]
    assert messages(files[2]) == [user("hi"), assistant(expected(tiny, [user("hi")], 1, max_tokens=20))]


def test_turns_that_no_longer_fit_are_left_out_and_reported(tiny, talk, tmp_path):
    # A turn "1 + 1" with its answer of at most 20 tokens: the third question does not fit together with both turns before it.
    longest = len(tiny.chat.encode([user("1 + 1")])) + 20
    out = talk("1 + 1", "1 + 1", "1 + 1", f"/save {tmp_path / 'all'}", max_context=longest + 10)
    assert "messages no longer fit the context" in out
    kept = messages(tmp_path / "all")
    assert len(kept) == 6, "what is left out of a prompt stays in the conversation"
    last = [user("1 + 1")] if "first 4 messages" in out else kept[2:5]
    assert kept[5]["content"] == expected(tiny, last, 2, max_tokens=20)


def test_turns_that_fit_to_the_token_are_kept(tiny, talk):
    said = [user("1 + 1"), assistant(expected(tiny, [user("1 + 1")], 0, max_tokens=20)), user("1 + 1")]
    whole = len(tiny.chat.encode(said)) + 20
    assert "no longer fit" not in talk("1 + 1", "1 + 1", max_context=whole)
    out = talk("1 + 1", "1 + 1", max_context=whole - 1)
    assert f"(the first 2 messages no longer fit the context of {whole - 1} tokens)" in out


def test_a_question_that_does_not_fit_is_reported_and_the_chat_continues(talk):
    out = talk("1 + 1 " * 50, "/nope", max_context=100)
    assert "(not asked: prompt and answer may have 100 tokens, got " in out
    assert "(/nope: no such command; /help lists them)" in out


def test_only_files_that_the_chat_has_written_are_overwritten(talk, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    own = tmp_path / "own"
    out = talk(f"/save {precious}", f"/save {own}", "hi", f"/save {own}", "/save")
    assert precious.read_text() == "precious"
    assert f"(/save {precious}: File exists; name a new file)" in out
    assert len(messages(own)) == 2
    assert "(/save : " in out
