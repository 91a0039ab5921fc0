"""A conversation in a terminal: turns, their history, a few commands.

Ctrl-C ends an answer, and what was said of it stays in the history; at the prompt it leaves, as Ctrl-D does.
"""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from grpo_actors.errors import DataError, ModelError
from grpo_actors.generate.prompts import is_encodable, with_system
from grpo_actors.generate.speaker import Speaker
from grpo_actors.generate.streaming import for_terminal
from grpo_actors.process import StopRequest
from grpo_actors.tasks.task import Message

HELP = """\
/clear         begin anew; the system prompt stays
/system TEXT   set the system prompt; without TEXT: have none
/save FILE     write the conversation, one JSON message a line
/help          this
/quit          leave; so do Ctrl-D, and Ctrl-C at the prompt. During an answer Ctrl-C ends the answer.
A line that is to begin with a slash begins with a space."""


class Chat:
    """The history, and what each line of the user's does to it."""

    def __init__(self, speaker: Speaker, system: str) -> None:
        self._speaker = speaker
        self._system = system
        #: User and assistant in turn, all of them, whatever of it still fits the context.
        self._turns: list[Message] = []
        #: Answers so far: the number of the next one's draws. The same question twice gets two answers.
        self._asked = 0
        #: Files that this chat has written, and may write again.
        self._saved: set[Path] = set()
        self._commands: dict[str, Callable[[str], None]] = {
            "/clear": self._clear,
            "/system": self._set_system,
            "/save": self._save,
            "/help": lambda _: print(HELP),
        }

    def run(self) -> None:
        """Until the user leaves."""
        import readline  # noqa: F401, PLC0415 - input() then edits lines and remembers them

        print(f"{self._speaker.policy.name}. /help lists the commands.")
        while True:
            try:
                line = input("> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line.strip() == "/quit":
                return
            if not is_encodable(line):
                print("(that was no UTF-8)")
            elif line.startswith("/"):
                self._obey(line)
            elif line.strip():
                self._reply(line.strip())

    def _reply(self, text: str) -> None:
        asked: Message = {"role": "user", "content": text}
        try:
            ids, left_out = self._fitting([*self._turns, asked])
        except (DataError, ModelError) as error:  # too long, or the template refuses the system prompt
            print(f"({error})")
            return
        if left_out:
            print(
                f"(the first {left_out} messages no longer fit the context of {self._speaker.context} tokens)"
            )
        with _interruptible() as stop:
            sample = self._speaker.answer(ids, self._asked, _show, stop.__bool__)
        self._asked += 1
        print()
        if not sample.finished:
            print("(ended)" if stop else f"(cut after --max-tokens {self._speaker.params.max_new_tokens})")
        answered = self._speaker.policy.decode(sample.tokens)
        self._turns += [asked, {"role": "assistant", "content": answered}]

    def _fitting(self, turns: list[Message]) -> tuple[list[int], int]:
        """Tokens of the conversation, without as many of its first turns as it takes, and how many those were.

        Raises:
            DataError: the last turn alone is too long.
        """
        for first in range(0, len(turns) - 1, 2):
            ids = self._speaker.encode(with_system(tuple(turns[first:]), self._system))
            if self._speaker.excess(len(ids)) <= 0:
                return ids, first
        alone = with_system((turns[-1],), self._system)
        return self._speaker.encode_fitting(alone, "not asked"), len(turns) - 1

    # --- commands ---------------------------------------------------------------------------------

    def _obey(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        command = self._commands.get(name)
        if command is None:
            print(f"({name}: no such command; /help lists them)")
        else:
            command(argument.strip())

    def _clear(self, _: str) -> None:
        self._turns.clear()
        print("(a new conversation)")

    def _set_system(self, text: str) -> None:
        self._system = text
        print(f"(system prompt: {text})" if text else "(no system prompt)")

    def _save(self, name: str) -> None:
        path = Path(name).expanduser()
        system: list[Message] = [{"role": "system", "content": self._system}] if self._system else []
        lines = [json.dumps(message, ensure_ascii=False) + "\n" for message in [*system, *self._turns]]
        try:
            with path.open("w" if path in self._saved else "x", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:
            print(f"(/save {name}: {error.strerror}; name a new file)")
            return
        self._saved.add(path)
        print(f"({len(lines)} messages in {path})")


def _show(text: str) -> None:
    print(for_terminal(text), end="", flush=True)


@contextmanager
def _interruptible() -> Iterator[StopRequest]:
    """Within the block a first Ctrl-C only sets what is yielded; one more raises KeyboardInterrupt."""
    stop = StopRequest()

    def heed(number: int, frame: FrameType | None) -> None:
        del number, frame
        if stop:
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, heed)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
