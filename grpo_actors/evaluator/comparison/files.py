"""What an evaluation leaves behind as files: each whole, or not there at all."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from grpo_actors.atomic import whole_file
from grpo_actors.errors import ConfigError
from grpo_actors.evaluator.comparison.candidates import Candidate
from grpo_actors.evaluator.comparison.result import Sheet


def refuse_to_replace(path: Path, option: str) -> None:
    """Refuse, before anything is computed, a file that holds something: it may have taken hours to sample.

    Raises:
        ConfigError: it does; names the command line's `option`.
    """
    if path.is_file() and path.stat().st_size:
        raise ConfigError(
            f"{option}: {path} exists and is not replaced; move it away, or choose another file"
        )


@contextmanager
def chosen_file(path: Path, option: str) -> Iterator[Path]:
    """Yield an empty draft of the file that `option` names; see `atomic.whole_file`.

    Raises:
        ConfigError: it cannot be written there; names the `option`.
    """
    if not path.name or path.is_dir():
        raise ConfigError(f"{option}: must be a file, got the folder {path}")
    with ExitStack() as stack:
        draft = stack.enter_context(whole_file(path))
        with writing(path, option):
            draft.write_bytes(b"")  # now, not after hours of sampling; and a killed run may have left one
        yield draft
        with writing(path, option):
            stack.close()


def append_answers(file: Path, candidate: Candidate, sheet: Sheet) -> None:
    """One JSON line a problem: what was asked, the true answer, and every completion as it was judged.

    Raises:
        ConfigError: there is no room.
    """
    with writing(file, "--answers"), file.open("a", encoding="utf-8") as lines:
        for i, greedy in enumerate(sheet.greedy):
            problem = greedy.problem
            line = {
                "checkpoint": candidate.name,
                "update": candidate.update,
                "problem": problem.id,
                "prompt": problem.messages[-1]["content"],
                "answer": problem.answer,
                "greedy": asdict(greedy.answers[0]),
                "samples": [asdict(one) for one in sheet.sampled[i].answers] if sheet.sampled else [],
            }
            lines.write(json.dumps(line) + "\n")


@contextmanager
def writing(path: Path, option: str) -> Iterator[None]:
    """ConfigError, naming the command line's `option`, where `path` cannot be written within."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{option}: {path} cannot be written: {error.strerror or error}; choose another file"
        ) from error
