"""The samples of a run: problems with the completions of a group, from groups.jsonl or completions.jsonl.

groups.jsonl (``metrics.record_groups``) has every group with its tokens; completions.jsonl has a few groups of each update as
text. An index of the file is kept, not its content: a group is read again when it is shown.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from grpo_actors.config import Config
from grpo_actors.errors import DataError, ProtocolError
from grpo_actors.learner.group_filter import penalties_of, rewards_of
from grpo_actors.learner.recording import RecordedGroup, read_group
from grpo_actors.objective.advantages import Advantages, compute_advantages
from grpo_actors.observe.growing_file import GrowingFile
from grpo_actors.observe.records import Record, decode
from grpo_actors.observe.view import number, numbers
from grpo_actors.page.sample_filter import SampleFilter
from grpo_actors.page.tokens import Pieces
from grpo_actors.rundir.folder import COMPLETIONS_FILE, GROUPS_FILE

#: Advantages that depend on no other group of the update.
_WITHIN_GROUP = ("group", "none", "rloo")
#: Decimals of a log-prob that is shown.
_DECIMALS = 4


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion as it is shown."""

    reward: float | None
    rewards: dict[str, float | None]
    #: None: not known, because other groups of the update or lengths in tokens decide it.
    advantage: float | None
    #: In the unit of the file: tokens that the policy sampled, or characters.
    length: int
    truncated: bool
    #: Texts of the tokens, or the whole text as one piece.
    pieces: list[str]
    #: Of each piece: log-prob under the policy that sampled it; None for a piece that was not sampled. Empty: no tokens.
    logprobs: list[float | None] = field(default_factory=list)
    #: Of each piece: its log-prob when it trained, minus that one. Empty: not known, as the completion was not computed.
    log_ratios: list[float] = field(default_factory=list)
    #: Pieces that the environment wrote, and those that ended thinking, as rising bounds.
    inserted: list[int] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Group:
    """One group as it is shown."""

    update: int
    problem: str
    messages: list[dict[str, str]]
    answer: str
    worker: str
    source: str
    completions: list[Completion]

    def as_json(self) -> dict[str, Any]:
        """Return strict JSON values."""
        return asdict(self)


class Entry(NamedTuple):
    """A group in the index."""

    offset: int
    size: int
    update: int
    problem: str
    rewards: tuple[float | None, ...]
    lengths: tuple[int, ...]


class _Source(Protocol):
    """One kind of file."""

    file: Path
    unit: str

    def entry(self, line: bytes, offset: int) -> Entry | None:
        """Return the index entry of a line; None if the line is none of this file."""

    def group(self, lines: Sequence[bytes], which: int) -> Group:
        """Return one group; `lines` are all of its update."""


class Samples:
    """The samples of a run folder; belongs to one thread at a time."""

    def __init__(self, folder: Path, config: Config | None) -> None:
        """Open the better of the two files.

        Args:
            folder: The run folder.
            config: The run's settings with its reward functions; None if they are of another version: texts and rewards
                can be shown without them.
        """
        self._source = _source_of(folder, config)
        self._lines = GrowingFile(self._source.file)
        self._rewinds = self._lines.rewinds
        self.entries: list[Entry] = []

    @property
    def unit(self) -> str:
        """What lengths count: tokens or characters."""
        return self._source.unit

    @property
    def has_tokens(self) -> bool:
        """Whether groups have their tokens."""
        return isinstance(self._source, _RecordedGroups)

    def catch_up(self, limit_s: float = float("inf")) -> bool:
        """Add new lines to the index for at most `limit_s`; return whether there may be more."""
        deadline = time.monotonic() + limit_s
        while True:
            offset = self._lines.offset
            line = self._lines.read()
            if self._lines.rewinds != self._rewinds:
                self._rewinds, offset = self._lines.rewinds, 0
                self.entries.clear()
            if line is None:
                return False
            entry = self._source.entry(line, offset)
            if entry is not None:
                self.entries.append(entry)
            if time.monotonic() > deadline:
                return True

    def find(self, wanted: SampleFilter, limit: int | None = None) -> list[int]:
        """Return the positions of the groups that match, newest first."""
        found = []
        for position in range(len(self.entries) - 1, -1, -1):
            entry = self.entries[position]
            if wanted.matches(entry.update, entry.rewards, entry.lengths):
                found.append(position)
                if len(found) == limit:
                    break
        return found

    def listed(self, position: int) -> dict[str, Any]:
        """Return what a list shows of a group, as JSON values."""
        entry = self.entries[position]
        return {
            "id": position,
            "update": entry.update,
            "problem": entry.problem,
            "rewards": entry.rewards,
            "lengths": entry.lengths,
        }

    def read(self, position: int) -> Group:
        """Return the group at a position of the index.

        Raises:
            DataError: There is none, or its line is not a group.
        """
        if not 0 <= position < len(self.entries):
            raise DataError(f"{self._source.file}: has {len(self.entries)} groups, got position {position}")
        update = self.entries[position].update
        first = last = position
        while first and self.entries[first - 1].update == update:
            first -= 1
        while last + 1 < len(self.entries) and self.entries[last + 1].update == update:
            last += 1
        with self._source.file.open("rb") as file:
            lines = [self._read_line(file, entry) for entry in self.entries[first : last + 1]]
        return self._source.group(lines, position - first)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    @staticmethod
    def _read_line(file: Any, entry: Entry) -> bytes:
        file.seek(entry.offset)
        return bytes(file.read(entry.size))


def _source_of(folder: Path, config: Config | None) -> _Source:
    if config is not None and (folder / GROUPS_FILE).is_file():
        pieces = Pieces.of_run(folder, config.model.model_name)
        if pieces is not None:
            return _RecordedGroups(folder / GROUPS_FILE, config, pieces)
    return _LoggedSamples(folder / COMPLETIONS_FILE, config)


class _RecordedGroups:
    """groups.jsonl: every group, with its tokens."""

    unit = "tokens"

    def __init__(self, file: Path, config: Config, pieces: Pieces) -> None:
        self.file = file
        self._config = config
        self._pieces = pieces

    def entry(self, line: bytes, offset: int) -> Entry | None:
        # Not `read_group`, which checks each token: an index of gigabytes must be quick.
        try:
            group = json.loads(line)
            rewards = tuple(self._reward(c["rewards"]) for c in group["completions"])
            lengths = tuple(len(c["tokens"]) - _inserted(c) for c in group["completions"])
            return Entry(
                offset, len(line), int(group["update"]), str(group["problem"]["id"]), rewards, lengths
            )
        except (ValueError, LookupError, TypeError):
            return None

    def group(self, lines: Sequence[bytes], which: int) -> Group:
        groups = [read_group(line, str(self.file)) for line in lines]
        advantages = compute_advantages(
            self._config.objective.advantage,
            [rewards_of(group, self._config) for group in groups],
            list(self._config.reward.functions.values()),
            penalties=[penalties_of(group, self._config) for group in groups],
        )
        return self._shown(groups[which], advantages[which])

    def _shown(self, group: RecordedGroup, advantages: Advantages) -> Group:
        completions = []
        for index, completion in enumerate(group.completions):
            sampled = completion.sampled
            logprobs = [
                round(x, _DECIMALS) if kept else None
                for x, kept in zip(completion.logprobs, sampled, strict=True)
            ]
            completions.append(
                Completion(
                    reward=self._reward(completion.rewards),
                    rewards=completion.rewards,
                    advantage=float(advantages.values[index]),
                    length=sum(sampled),
                    truncated=not completion.finished,
                    pieces=self._pieces.split(completion.tokens),
                    logprobs=logprobs,
                    log_ratios=(group.log_ratios[index] or []) if group.log_ratios else [],
                    inserted=completion.inserted,
                    forced=completion.forced,
                )
            )
        problem = group.problem
        messages = [dict(message) for message in problem.messages]
        return Group(
            group.update, problem.id, messages, problem.answer, group.worker, problem.source, completions
        )

    def _reward(self, rewards: dict[str, float | None]) -> float | None:
        """Return the weighted sum; None if no function with a weight gave a value."""
        weights = self._config.reward.functions
        values = [
            weights[name] * value
            for name, value in rewards.items()
            if value is not None and weights.get(name)
        ]
        return sum(values) if values else None


def _inserted(completion: dict[str, Any]) -> int:
    """Return the number of tokens that the policy did not sample."""
    bounds = completion["inserted"] + completion["forced"]
    return int(sum(bounds[1::2]) - sum(bounds[::2]))


class _LoggedSamples:
    """completions.jsonl: the first groups of each update, as text."""

    unit = "characters"

    def __init__(self, file: Path, config: Config | None) -> None:
        self.file = file
        self._config = config

    def entry(self, line: bytes, offset: int) -> Entry | None:
        try:
            sample = decode(line)
        except ProtocolError:
            return None
        completions = _completions(sample)
        rewards = tuple(number(completion, "reward") for completion in completions)
        lengths = tuple(len(str(completion.get("text"))) for completion in completions)
        update = int(number(sample, "update") or 0)
        return (
            Entry(offset, len(line), update, str(sample.get("problem")), rewards, lengths)
            if completions
            else None
        )

    def group(self, lines: Sequence[bytes], which: int) -> Group:
        sample = decode(lines[which])
        completions = _completions(sample)
        shown = [
            Completion(
                reward=number(completion, "reward"),
                rewards=dict(numbers(completion, "rewards")),
                advantage=advantage,
                length=len(str(completion.get("text"))),
                truncated=completion.get("truncated") is True,
                pieces=[str(completion.get("text"))],
            )
            for completion, advantage in zip(completions, self._advantages(completions), strict=True)
        ]
        messages = [{"role": "user", "content": str(sample.get("prompt"))}]
        update, problem = int(number(sample, "update") or 0), str(sample.get("problem"))
        return Group(update, problem, messages, str(sample.get("answer")), "", "", shown)

    def _advantages(self, completions: Sequence[Record]) -> list[float | None]:
        config = self._config
        if (
            config is None
            or config.objective.overlong_tokens
            or config.objective.advantage not in _WITHIN_GROUP
        ):
            return [None] * len(completions)
        names = list(config.reward.functions)
        values = [
            [numbers(completion, "rewards").get(name, np.nan) for name in names] for completion in completions
        ]
        weights = list(config.reward.functions.values())
        [advantages] = compute_advantages(config.objective.advantage, [np.array(values)], weights)
        return [float(value) for value in advantages.values]


def _completions(sample: Record) -> list[Record]:
    completions = sample.get("completions")
    return [c for c in completions if isinstance(c, dict)] if isinstance(completions, list) else []
