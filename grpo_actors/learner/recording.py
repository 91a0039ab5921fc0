"""groups.jsonl: every group that trained, in order, so that a replay can train on it again without a worker.

Each line is one group in JSON. It holds what was sampled, unchanged (`groups`): numbers are written with as many
digits as are needed to read the same bits back. Has no model and no socket.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from math import isfinite
from pathlib import Path
from typing import Self

from pydantic import ConfigDict, TypeAdapter, ValidationError

from grpo_actors.errors import DataError, ProtocolError
from grpo_actors.learner.groups import SampledCompletion, SampledGroup
from grpo_actors.observe.sinks import LineFile
from grpo_actors.rundir.folder import GROUPS_FILE
from grpo_actors.rundir.reading import reason_of
from grpo_actors.wire.spans import check_spans

#: The start of every line: enough to cut a file of gigabytes without parsing the groups.
_START = re.compile(rb'{"update":(\d+),')
#: Of a log-ratio, which only a reader looks at.
_DECIMALS = 4


@dataclass(frozen=True, slots=True)
class RecordedGroup(SampledGroup):
    """One line of the file: a group, and where in the run it trained."""

    #: The update in which the group trained, counted from 1.
    update: int
    #: Groups planned for the whole run, all updates together: the schedule of its learning rate ends there.
    planned_groups: int
    #: For each completion, of each token: its log-prob when it trained, before the update, minus the one with which it was
    #: sampled; 0 for a token that did not train. None: nothing of it was computed. A replay computes its own.
    log_ratios: list[list[float] | None] = field(default_factory=list)

    # For pydantic, which applies it to the inner dataclasses too.
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


_line = TypeAdapter(RecordedGroup)


class GroupsFile:
    """groups.jsonl open for writing; belongs to the thread that trains."""

    def __init__(self, folder: Path, *, after_update: int) -> None:
        """Open the file of a run that has done `after_update` updates; cut the groups of later updates."""
        #: The last update in the file; less than `after_update` if some groups were not recorded.
        self.last_update = 0
        self._after_update = after_update
        self._file = LineFile(folder / GROUPS_FILE, self._keeps, switch="metrics.record_groups")

    def write(
        self,
        update: int,
        planned_groups: int,
        groups: Sequence[SampledGroup],
        log_ratios: Mapping[int, Sequence[float]],
    ) -> None:
        """Append the groups of one update, all or none; `log_ratios` are those of `Grpo`. Raises `RunError` if the disk is full."""
        numbers = count()
        lines = (
            {
                "update": update,
                "planned_groups": planned_groups,
                **asdict(group),
                "log_ratios": list(_rounded(group, numbers, log_ratios)),
            }
            for group in groups
        )
        self._file.write(*(json.dumps(line, separators=(",", ":")).encode("ascii") for line in lines))
        self.last_update = update

    def sync(self) -> None:
        """Return once all groups are on the disk itself; call it before a checkpoint is written."""
        self._file.sync()

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._file.close()

    def _keeps(self, line: bytes) -> bool:
        start = _START.match(line)
        if start is None:
            raise ProtocolError(f"not a recorded group: {line[:40]!r}")
        update = int(start[1])
        if update > self._after_update:
            return False
        self.last_update = update
        return True


def _rounded(
    group: SampledGroup, numbers: Iterator[int], log_ratios: Mapping[int, Sequence[float]]
) -> Iterator[list[float] | None]:
    """Yield the log-ratios of each completion without its padding, for a reader's eyes; count its completions on."""
    for completion, number in zip(group.completions, numbers, strict=False):
        ratios = log_ratios.get(number)
        known = ratios is not None and all(map(isfinite, ratios))  # JSON has no other numbers
        yield [round(x, _DECIMALS) for x in ratios[: len(completion.tokens)]] if ratios and known else None


class Recording:
    """groups.jsonl open for reading, a few lines at a time: the file may be larger than the memory."""

    def __init__(self, source: Path) -> None:
        """Open a groups.jsonl, or the one in a run folder.

        Raises:
            DataError: the file cannot be read.
        """
        #: Absolute path of the file.
        self.path = (source / GROUPS_FILE if source.is_dir() else source).resolve()
        self._number = 0
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be read ({error.strerror}); a run writes it with metrics.record_groups = true"
            ) from error

    def rewind(self) -> None:
        """Go back to the first group."""
        self._file.seek(0)
        self._number = 0

    def skip(self, count: int) -> None:
        """Skip the next `count` groups. Raises `DataError` if there are fewer."""
        for _ in range(count):
            if not self._file.readline():
                raise DataError(
                    f"{self.path}: has {self._number} groups, but the checkpoint has trained on {count}; "
                    "it is not the file that was replayed"
                )
            self._number += 1

    def take(self, count: int) -> list[RecordedGroup]:
        """Return the next `count` groups, fewer at the end. Raises `DataError` naming the line that is not a group."""
        groups: list[RecordedGroup] = []
        while len(groups) < count and (line := self._file.readline()):
            self._number += 1
            groups.append(read_group(line, f"{self.path}:{self._number}"))
        return groups

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_group(line: bytes, where: str) -> RecordedGroup:
    """Read one line of the file. Raises `DataError` that says `where` the line is, if it is not a group."""
    try:
        group = _line.validate_json(line)
    except ValidationError as error:
        raise DataError(f"{where}: not a recorded group: {reason_of(error)}") from None
    for completion in group.completions:
        _check(completion, where)
    lengths = [len(completion.tokens) for completion in group.completions]
    if (
        group.log_ratios
        and [
            length if ratios is None else len(ratios)
            for ratios, length in zip(group.log_ratios, lengths, strict=False)
        ]
        != lengths
    ):
        raise DataError(f"{where}: log_ratios must have a number for each token, or null for a completion")
    if not group.prompt or not group.completions:
        raise DataError(f"{where}: a group has a prompt and completions, got none")
    return group


def _check(completion: SampledCompletion, where: str) -> None:
    if not 0 < len(completion.tokens) == len(completion.logprobs) == len(completion.versions):
        raise DataError(
            f"{where}: every token needs a log-prob and a version, got {len(completion.tokens)} tokens, "
            f"{len(completion.logprobs)} log-probs and {len(completion.versions)} versions"
        )
    try:
        check_spans("inserted", completion.inserted, len(completion.tokens))
        check_spans("forced", completion.forced, len(completion.tokens))
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
