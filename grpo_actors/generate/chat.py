"""Run a chat in a terminal: turns, their history, and a few commands.

During an answer Ctrl-C ends the answer, whose text so far stays in the history. At the prompt Ctrl-C leaves the chat,
as Ctrl-D does.
"""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from grpo_actors.errors import DataError, ModelError
from grpo_actors.generate.generator import Generator
from grpo_actors.generate.prompts import is_encodable, with_system
from grpo_actors.generate.streaming import for_terminal
from grpo_actors.process import StopRequest
from grpo_actors.tasks.task import Message

HELP = """\
/clear         start a new conversation; the system prompt stays
/system TEXT   set the system prompt; without TEXT: remove it
/save FILE     write the conversation, one JSON message per line
/help          show this help
/quit          leave; so do Ctrl-D, and Ctrl-C at the prompt. During an answer Ctrl-C ends the answer.
To send a line that begins with a slash, put a space before it."""


class Chat:
    """A conversation: its history and its commands."""

    def __init__(self, generator: Generator, system: str) -> None:
        self._generator = generator
        self._system = system
        #: All turns, user and assistant alternating, including those that no longer fit the context.
        self._turns: list[Message] = []
        #: Number of answers so far, the seed index of the next one: the same question twice gets two answers.
        self._asked = 0
        #: Files that this chat has written and may overwrite.
        self._saved: set[Path] = set()
        self._commands: dict[str, Callable[[str], None]] = {
            "/clear": self._clear,
            "/system": self._set_system,
            "/save": self._save,
            "/help": lambda _: print(HELP),
        }

    def run(self) -> None:
        """Run the chat until the user leaves."""
        import readline  # noqa: F401, PLC0415 - gives input() line editing and history

        print(f"{self._generator.policy.name}. /help lists the commands.")
        while True:
            try:
                line = input("> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line.strip() == "/quit":
                return
            if not is_encodable(line):
                print("(the line must be UTF-8)")
            elif line.startswith("/"):
                self._run_command(line)
            elif line.strip():
                self._reply(line.strip())

    def _reply(self, text: str) -> None:
        question: Message = {"role": "user", "content": text}
        try:
            ids, left_out = self._fitting([*self._turns, question])
        except (DataError, ModelError) as error:  # too long, or the template has no system prompt
            print(f"({error})")
            return
        if left_out:
            print(
                f"(the first {left_out} messages no longer fit the context of {self._generator.context} tokens)"
            )
        with _interruptible() as stop:
            sample = self._generator.answer(ids, self._asked, _show, stop.__bool__)
        self._asked += 1
        print()
        if not sample.finished:
            print("(ended)" if stop else f"(cut after --max-tokens {self._generator.params.max_new_tokens})")
        answer = self._generator.policy.decode(sample.tokens)
        self._turns += [question, {"role": "assistant", "content": answer}]

    def _fitting(self, turns: list[Message]) -> tuple[list[int], int]:
        """Return the tokens of the conversation, and how many of its first messages had to be left out to fit.

        Raises:
            DataError: the last message alone is too long.
        """
        for first in range(0, len(turns) - 1, 2):
            ids = self._generator.encode(with_system(tuple(turns[first:]), self._system))
            if self._generator.excess(len(ids)) <= 0:
                return ids, first
        alone = with_system((turns[-1],), self._system)
        return self._generator.encode_fitting(alone, "not asked"), len(turns) - 1

    # --- commands ---------------------------------------------------------------------------------

    def _run_command(self, line: str) -> None:
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
    """Within the block, the first Ctrl-C sets the yielded request; a second one raises KeyboardInterrupt."""
    stop = StopRequest()

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        if stop:
            raise KeyboardInterrupt
        stop.set()

    former = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, former)
