"""The task for a user's own data: any data set with columns for prompts and, if there are any, true answers.

This module turns rows into problems and holds problems out; `rows` finds and reads them. No prompt is ever in both
splits.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from hashlib import blake2b

from grpo_actors.errors import DataError
from grpo_actors.tasks.answers import FORMAT_REQUEST
from grpo_actors.tasks.chat import read_chat
from grpo_actors.tasks.lines import excerpt
from grpo_actors.tasks.rows import Location, Row, read
from grpo_actors.tasks.task import Message, Problem, Task, prompt_text

#: Column in which a row may give its problem a name, which must be unique in the data set.
ID_COLUMN = "id"
#: The column of the true answers that need not be there.
ANSWER_COLUMN = "answer"


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that this task reads."""

    prompt: str = "question"
    answer: str = ANSWER_COLUMN
    #: Whether own rewards get a prompt as text if it is one. With an environment a completion has turns, which only a
    #: chat can hold.
    texts_stay: bool = True


class DataSet(Task):
    """The problems of `path`, and for evaluation those of `eval_path` or `eval_split`, else a held-out share of `path`.

    A prompt is either a text, which follows a system prompt that requests the answer format, or a whole chat (`chat`),
    which is used unchanged. An answer is any value of JSON, or none. All columns are passed to own rewards, the answer
    also as ``answer``. Whether a problem is held out depends only on its prompt: it stays held out when the data set is
    reordered or grows, unless it is tiny. A training prompt that is also in the evaluation's data is left out, with a
    note. Raises DataError, naming row, column and reason.
    """

    default_rewards: Mapping[str, float] = {"correctness": 2.0, "soft_format": 0.5, "xml_count": 0.5}

    def __init__(
        self,
        path: str,
        eval_path: str = "",
        *,
        subset: str = "",
        split: str = "train",
        revision: str = "",
        eval_split: str = "",
        prompt_column: str = "question",
        answer_column: str = ANSWER_COLUMN,
        eval_fraction: float = 0.1,
        environment: str = "",
        holds_out: bool = True,
    ) -> None:
        if not path:
            raise DataError(
                'data.path: data.task = "dataset" needs a file, folder, function or hub id, got none'
            )
        columns = Columns(prompt_column, answer_column, texts_stay=not environment)
        where = Location(path, subset, split, revision)
        problems = read_problems(where, "data", columns)
        self.notes = repeats(problems, where)
        prompts = [fingerprint(problem) for problem in problems]
        held_out: Sequence[Problem] = []
        if eval_path or eval_split:
            of_eval = Location(eval_path or path, "" if eval_path else subset, eval_split or split, revision)
            held_out = read_problems(of_eval, "data/eval", columns)
            held_out_prompts: Collection[int] = {fingerprint(problem) for problem in held_out}
            self.notes += _overlap(prompts, held_out_prompts, where, of_eval)
        elif holds_out:
            held_out_prompts = _held_out(set(prompts), eval_fraction, where)
            held_out = [p for p, prompt in zip(problems, prompts, strict=True) if prompt in held_out_prompts]
        else:
            held_out_prompts = ()
        train = [p for p, prompt in zip(problems, prompts, strict=True) if prompt not in held_out_prompts]
        super().__init__(train, held_out)


def read_problems(where: Location, prefix: str, columns: Columns) -> list[Problem]:
    """Return the problem of every row, with ids that begin with `prefix`.

    Raises:
        DataError: There is no such data set, or a row cannot be trained on.
    """
    problems: list[Problem] = []
    rows: dict[str, int] = {}
    for number, row in read(where):
        problem = _problem(row, number, where, prefix, columns)
        if problem.id in rows:
            raise DataError(
                f"{where}, row {number}: {ID_COLUMN} must be unique, got {excerpt(row.get(ID_COLUMN, number))}, which "
                f"row {rows[problem.id]} has; rename the column if it is no id"
            )
        rows[problem.id] = number
        problems.append(problem)
    return problems


def _problem(row: Row, number: int, where: Location, prefix: str, columns: Columns) -> Problem:
    for setting, name in (("prompt_column", columns.prompt), ("answer_column", columns.answer)):
        if name not in row and name != ANSWER_COLUMN:
            raise DataError(
                f"{where}, row {number}: must have the column {name!r}, got {excerpt(list(row))}; "
                f"set data.{setting} to the right one"
            )
    prompt, answer = row[columns.prompt], row.get(columns.answer)
    given = row.get(ID_COLUMN)
    identity = answer_text(number if given is None else given)
    return Problem(
        id=f"{prefix}/{identity}",
        messages=_messages(prompt, f"{where}, row {number}, column {columns.prompt}"),
        answer=answer_text(answer),
        # The true answer also has its usual name, unless another column has it.
        columns={ANSWER_COLUMN: answer, **row},
        text_prompt=columns.texts_stay and isinstance(prompt, str),
    )


def _messages(prompt: object, where: str) -> tuple[Message, ...]:
    if isinstance(prompt, str) and prompt.strip():
        return ({"role": "system", "content": FORMAT_REQUEST}, {"role": "user", "content": prompt})
    try:
        return read_chat(prompt)
    except DataError as error:
        raise DataError(f"{where}: {error}, got {excerpt(prompt)}; mend or remove the row") from None


def answer_text(value: object) -> str:
    """Return an answer as the text that a model would write: no exponent, and true and false as in JSON; empty: none."""
    match value:
        case None:
            return ""
        case str():
            return value.strip()
        case bool():
            return json.dumps(value)
        case int() | float():
            return format(Decimal(repr(value)), "f")
    return json.dumps(value, ensure_ascii=False)


def fingerprint(problem: Problem) -> int:
    """Return a hash of the prompt with 64 bits, evenly distributed and the same on every machine."""
    return int.from_bytes(blake2b(prompt_text(problem).encode(), digest_size=8).digest(), "big")


def repeats(problems: Iterable[Problem], where: Location) -> list[str]:
    """Return a note on the problems that repeat an earlier one, prompt and answer; none if there are none."""
    first: dict[tuple[int, str], str] = {}
    repeated = [
        (problem.id, earlier)
        for problem in problems
        if (earlier := first.setdefault((fingerprint(problem), problem.answer), problem.id)) != problem.id
    ]
    if not repeated:
        return []
    example, earlier = repeated[0]
    return [f"{where}: {len(repeated)} problems repeat an earlier one, as {example} repeats {earlier}"]


def _overlap(
    prompts: Sequence[int], held_out: Collection[int], where: Location, of_eval: Location
) -> list[str]:
    shared = sum(prompt in held_out for prompt in prompts)
    if shared == len(prompts):
        raise DataError(f"{where}: must have a prompt that {of_eval} has not, got none; add other problems")
    return [f"{where}: {shared} prompts are also in {of_eval} and are not trained on"] if shared else []


def _held_out(fingerprints: set[int], fraction: float, where: Location) -> set[int]:
    """Choose the prompts to evaluate on: about `fraction` of all, with at least one in each split."""
    if len(fingerprints) < 2:
        raise DataError(
            f"{where}: must have two different prompts, one to train and one to evaluate on, "
            f"got {len(fingerprints)}; add problems or set data.eval_path"
        )
    in_order = sorted(fingerprints)
    chosen = [fingerprint for fingerprint in in_order if fingerprint < fraction * 2**64]
    return set(chosen[: len(in_order) - 1] or in_order[:1])
