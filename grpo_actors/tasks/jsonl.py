"""The task for a user's own data: a JSON Lines file with columns for prompts and answers.

This module turns rows into problems and holds problems out; `lines` reads the file format. No prompt is ever in both
splits.
"""

import json
import logging
from collections.abc import Mapping
from decimal import Decimal
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from grpo_actors.errors import DataError
from grpo_actors.tasks.answers import FORMAT_REQUEST
from grpo_actors.tasks.lines import excerpt, read_rows
from grpo_actors.tasks.task import Message, Problem, Task

_log = logging.getLogger(__name__)

#: Column in which a row may give its problem a name, which must be unique in the file.
ID_COLUMN = "id"

ROLES = ("system", "user", "assistant")


class Jsonl(Task):
    """The problems of `path`, and for evaluation those of `eval_path` or a held-out share of `path`.

    A prompt is either a text, which follows a system prompt that requests the answer format, or a whole chat
    (``[{"role": …, "content": …}, …]``, the user last), which is used unchanged. An answer is a text, a number or
    a truth value. All columns are passed to own rewards, the answer also as ``answer``. Whether a problem is held out depends only on its
    prompt: it stays held out when the file is reordered or grows, unless the file is tiny. A training prompt that is
    also in `eval_path` is left out, with a warning. Raises DataError, naming file and line.
    """

    default_rewards: Mapping[str, float] = {"correctness": 2.0, "soft_format": 0.5, "xml_count": 0.5}

    def __init__(
        self,
        path: str,
        eval_path: str = "",
        *,
        prompt_column: str = "question",
        answer_column: str = "answer",
        eval_fraction: float = 0.1,
        environment: str = "",
    ) -> None:
        if not path:
            raise DataError('data.path: data.task = "jsonl" needs a file, got none; name a .jsonl file')
        # With an environment a completion has turns, which only a chat can hold.
        columns = _Columns(prompt_column, answer_column, texts_stay=not environment)
        problems = _read_problems(Path(path).expanduser(), "jsonl", columns)
        prompts = [_fingerprint(problem) for problem in problems]
        if eval_path:
            held_out = _read_problems(Path(eval_path).expanduser(), "jsonl/eval", columns)
            held_out_prompts = {_fingerprint(problem) for problem in held_out}
            shared = sum(prompt in held_out_prompts for prompt in prompts)
            _report_overlap(shared, len(prompts), path, eval_path)
        else:
            held_out_prompts = _held_out(set(prompts), eval_fraction, path)
            held_out = [
                each for each, prompt in zip(problems, prompts, strict=True) if prompt in held_out_prompts
            ]
        train = [
            each for each, prompt in zip(problems, prompts, strict=True) if prompt not in held_out_prompts
        ]
        super().__init__(train, held_out)


def _report_overlap(shared: int, count: int, path: str, eval_path: str) -> None:
    if shared == count:
        raise DataError(f"{path}: must have a prompt that {eval_path} has not, got none; add other problems")
    if shared:
        _log.warning("%s: %d prompts are also in %s and are not trained on", path, shared, eval_path)


def _held_out(fingerprints: set[int], fraction: float, path: str) -> set[int]:
    """Choose the prompts to evaluate on: about `fraction` of all, with at least one in each split."""
    if len(fingerprints) < 2:
        raise DataError(
            f"{path}: must have two different prompts, one to train and one to evaluate on, "
            f"got {len(fingerprints)}; add problems or set data.eval_path"
        )
    in_order = sorted(fingerprints)
    chosen = [fingerprint for fingerprint in in_order if fingerprint < fraction * 2**64]
    return set(chosen[: len(in_order) - 1] or in_order[:1])


def _fingerprint(problem: Problem) -> int:
    """Return a hash of the prompt with 64 bits, evenly distributed and the same on every machine."""
    text = json.dumps(problem.messages, sort_keys=True)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


class _Columns(NamedTuple):
    """The columns of the file that this task reads."""

    prompt: str
    answer: str
    #: Whether own rewards get a prompt as text if it is one.
    texts_stay: bool


def _read_problems(path: Path, prefix: str, columns: _Columns) -> list[Problem]:
    problems: list[Problem] = []
    lines: dict[str, int] = {}
    for number, row in read_rows(path):
        where = f"{path}:{number}"
        prompt = _column(row, columns.prompt, "prompt_column", where)
        answer = _column(row, columns.answer, "answer_column", where)
        problem = Problem(
            id=f"{prefix}/{_scalar(row.get(ID_COLUMN, number), ID_COLUMN, where)}",
            messages=_messages(prompt, columns.prompt, where),
            answer=_scalar(answer, columns.answer, where),
            # The true answer also has its usual name, unless another column has it.
            columns={"answer": answer, **row},
            text_prompt=columns.texts_stay and isinstance(prompt, str),
        )
        if problem.id in lines:
            raise DataError(
                f"{where}: {ID_COLUMN} must be unique, got {excerpt(row.get(ID_COLUMN, number))}, which line "
                f"{lines[problem.id]} has; rename the column if it is no id"
            )
        lines[problem.id] = number
        problems.append(problem)
    if not problems:
        raise DataError(f"{path}: must have a problem, got an empty file; check data.path")
    return problems


def _column(row: Mapping[str, Any], name: str, setting: str, where: str) -> Any:
    if name not in row:
        raise DataError(
            f"{where}: must have the column {name!r}, got {excerpt(list(row))}; set data.{setting} to the right one"
        )
    return row[name]


def _messages(prompt: object, column: str, where: str) -> tuple[Message, ...]:
    if isinstance(prompt, str) and prompt.strip():
        return ({"role": "system", "content": FORMAT_REQUEST}, {"role": "user", "content": prompt})
    if isinstance(prompt, list) and is_chat(prompt):
        return tuple(prompt)
    raise DataError(
        f"{where}: {column} must be a text or a chat that ends with the user "
        f'([{{"role": "user", "content": "…"}}]), got {excerpt(prompt)}; mend the line'
    )


def is_chat(value: object) -> bool:
    """Return whether the value is a list of messages that ends with a message of the user."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(map(_is_message, value))
        and value[-1]["role"] == "user"
    )


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and message["role"] in ROLES
        and isinstance(message["content"], str)
    )


def _scalar(value: object, column: str, where: str) -> str:
    """Return a scalar as the text that a model would write: no exponent, and true and false as in JSON."""
    match value:
        case str() if value.strip():
            return value.strip()
        case bool():
            return json.dumps(value)
        case int() | float():
            return format(Decimal(repr(value)), "f")
    raise DataError(
        f"{where}: {column} must be a text, a number, true or false, got {excerpt(value)}; mend the line"
    )
