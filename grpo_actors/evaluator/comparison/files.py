"""Write the files of an evaluation, each complete or not at all."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from grpo_actors.atomic import whole_file
from grpo_actors.errors import ConfigError
from grpo_actors.evaluator.comparison.candidates import Candidate
from grpo_actors.evaluator.comparison.result import Answers


def refuse_to_replace(path: Path, option: str) -> None:
    """Refuse, before anything is computed, a file that is not empty: its answers may have taken hours to sample.

    Raises:
        ConfigError: The file is not empty. The text names the command line's `option`.
    """
    if path.is_file() and path.stat().st_size:
        raise ConfigError(
            f"{option}: {path} exists and is not replaced; move it away, or choose another file"
        )


@contextmanager
def chosen_file(path: Path, option: str) -> Iterator[Path]:
    """Yield an empty draft of the file that `option` names; see `atomic.whole_file`.

    Raises:
        ConfigError: The file cannot be written. The text names the `option`.
    """
    if not path.name or path.is_dir():
        raise ConfigError(f"{option}: must be a file, got the folder {path}")
    with ExitStack() as stack:
        draft = stack.enter_context(whole_file(path))
        with as_config_error(path, option):
            # Fail now, not after hours of sampling. And empty a draft that a killed process left.
            draft.write_bytes(b"")
        yield draft
        with as_config_error(path, option):
            stack.close()


def append_answers(file: Path, candidate: Candidate, answers: Answers) -> None:
    """Append one JSON line per problem: the prompt, the true answer, and every completion with its judgement.

    Raises:
        ConfigError: The file cannot be written.
    """
    with as_config_error(file, "--answers"), file.open("a", encoding="utf-8") as lines:
        for i, greedy in enumerate(answers.greedy):
            problem = greedy.problem
            line = {
                "checkpoint": candidate.name,
                "update": candidate.update,
                "problem": problem.id,
                "prompt": problem.messages[-1]["content"],
                "answer": problem.answer,
                "greedy": asdict(greedy.answers[0]),
                "samples": [asdict(one) for one in answers.sampled[i].answers] if answers.sampled else [],
            }
            lines.write(json.dumps(line) + "\n")


@contextmanager
def as_config_error(path: Path, option: str) -> Iterator[None]:
    """Turn an OSError in the block into a ConfigError that names the command line's `option` and `path`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{option}: {path} cannot be written: {error.strerror or error}; choose another file"
        ) from error
