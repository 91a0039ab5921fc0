"""A run as JSON Lines on standard output: its records as in metrics.jsonl, and what is said besides them."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import BinaryIO, Self

from grpo_actors.observe.records import Record, encode
from grpo_actors.observe.view import RunView


class JsonEvents:
    """The supervisor's display for programs: one JSON object per line, at once. Called like `StatusLine`.

    What is no record has a ``time`` and one of the topics ``phase``, ``note`` and ``closing``.
    """

    def __init__(self, stream: BinaryIO | None = None) -> None:
        self._stream = stream or sys.stdout.buffer
        self.view = RunView()
        self._phase = ""

    def show(self, record: Record) -> None:
        """Write a record."""
        self.view = self.view.apply(record)
        self._write(encode(record))

    def begin(self, phase: str, *, in_log: bool = True) -> None:
        """Write what the run does from now on."""
        del in_log
        if phase and phase != self._phase and self.view.metrics is None:
            self._say("phase", text=phase)
        self._phase = phase

    def tick(self) -> None:
        """Do nothing: a program has a clock."""

    def show_preparation(self, text: str) -> None:
        """Write what the run does before its actors start; nothing for an empty text."""
        if text:
            self._say("phase", text=text)

    def print_line(self, text: str, style: str = "") -> None:
        """Write a line for the user."""
        del style
        self._say("note", text=text)

    def print_closing(self, facts: Sequence[str], commands: Mapping[str, str]) -> None:
        """Write what came out, and what may be done next."""
        self._say("closing", facts=list(facts), commands=dict(commands))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _say(self, topic: str, **fields: object) -> None:
        self._write(json.dumps({"time": time.time(), "topic": topic, **fields}).encode("ascii"))

    def _write(self, line: bytes) -> None:
        self._stream.write(line + b"\n")
        self._stream.flush()
