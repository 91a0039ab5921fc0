"""GSM8K: grade-school word problems (Cobbe et al. 2021, arXiv:2110.14168), 7,473 to train and 1,319 to test.

This module has the data set's layout on disk and on the hub, its prompt and its rewards. Evaluation is always on
the test split, never on training problems.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_actors.errors import DataError
from grpo_actors.tasks.answers import FORMAT_REQUEST, gsm8k_answer
from grpo_actors.tasks.lines import excerpt, read_rows
from grpo_actors.tasks.task import Message, Problem, Task, shared_prompts

HUB_ID, HUB_CONFIG = "openai/gsm8k", "main"


#: (question, answer) pairs, shown as turns of the chat before a problem. None of them is in the data set. A small
#: base model that was not trained to write tags writes none without an example.
EXAMPLES: Sequence[tuple[str, str]] = (
    (
        "Tom has 3 bags with 4 apples each and 2 more apples. How many apples does he have?",
        "<reasoning>\nThe bags hold 3*4=12 apples. With 2 more he has 12+2=14.\n</reasoning>\n<answer>\n14\n</answer>",
    ),
    (
        "A book costs $12 and a pen costs $3. How much do 2 books and 5 pens cost together?",
        (
            "<reasoning>\nThe books cost 2*12=24. The pens cost 5*3=15. Together 24+15=39.\n</reasoning>\n"
            "<answer>\n39\n</answer>"
        ),
    ),
    (
        "Ann reads 20 pages a day. How many days does she need for a book of 100 pages?",
        "<reasoning>\nShe needs 100/20=5 days.\n</reasoning>\n<answer>\n5\n</answer>",
    ),
)


class Gsm8k(Task):
    """The problems of a local copy, or of the hub if `path` is empty.

    `path` is a folder with ``train.jsonl`` and ``test.jsonl``, or a file of training problems. `eval_path` names the
    file to evaluate on: required for a file, optional for a folder. `num_shots` of `EXAMPLES` come before each
    problem. Raises DataError if the data cannot be read or a row is not a row of GSM8K.
    """

    default_rewards: Mapping[str, float] = {
        "correctness": 2.0,
        "integer": 0.5,
        "strict_format": 0.5,
        "soft_format": 0.5,
        "xml_count": 0.5,
    }

    def __init__(self, path: str = "", eval_path: str = "", *, num_shots: int = 0) -> None:
        train, test = _local_rows(Path(path).expanduser(), eval_path) if path else _hub_rows(eval_path)
        problems, held_out = _problems("train", train, num_shots), _problems("test", test, num_shots)
        if shared := shared_prompts(problems, held_out):
            self.notes = [
                f"{shared} training prompts are also held out for evaluation: its scores are too high"
            ]
        super().__init__(problems, held_out)


#: A row with its location for errors, such as ``train.jsonl:17``.
_Row = tuple[str, Mapping[str, Any]]


def _local_rows(path: Path, eval_path: str) -> tuple[Iterable[_Row], Iterable[_Row]]:
    if path.is_dir():
        train = path / "train.jsonl"
        test = Path(eval_path).expanduser() if eval_path else path / "test.jsonl"
    elif eval_path:
        train, test = path, Path(eval_path).expanduser()
    else:
        raise DataError(
            f"data.path: must be a folder with train.jsonl and test.jsonl, got {path}; "
            "for a file of training problems also set data.eval_path to one of test problems"
        )
    return _file_rows(train), _file_rows(test)


def _file_rows(path: Path) -> Iterable[_Row]:
    return ((f"{path}:{number}", row) for number, row in read_rows(path))


def _hub_rows(eval_path: str) -> tuple[Iterable[_Row], Iterable[_Row]]:
    if eval_path:
        raise DataError(
            f"data.eval_path: may not be set without data.path, got {eval_path}; set both or neither"
        )
    try:
        from datasets import load_dataset  # noqa: PLC0415 - takes seconds, and only the hub needs it

        splits = load_dataset(HUB_ID, HUB_CONFIG)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{HUB_ID} could not be loaded from the hub ({type(error).__name__}: {reason:.200}); "
            "without a network set data.path to a folder with its train.jsonl and test.jsonl"
        ) from error
    return _split_rows("train", splits["train"]), _split_rows("test", splits["test"])


def _split_rows(split: str, rows: Iterable[Mapping[str, Any]]) -> Iterable[_Row]:
    return ((f"{HUB_ID} {split}:{number}", row) for number, row in enumerate(rows, start=1))


def _problems(split: str, rows: Iterable[_Row], num_shots: int) -> list[Problem]:
    before: list[Message] = [{"role": "system", "content": FORMAT_REQUEST}]
    for question, answer in EXAMPLES[:num_shots]:
        before += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    problems = [
        _problem(f"gsm8k/{split}/{index}", row, where, before) for index, (where, row) in enumerate(rows)
    ]
    if not problems:
        raise DataError(f"data.path: the {split} split must have a problem, got an empty file")
    return problems


def _problem(problem_id: str, row: Mapping[str, Any], where: str, before: Sequence[Message]) -> Problem:
    question, solution = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not isinstance(solution, str):
        raise DataError(
            f"{where}: must have the texts question and answer, got the columns {excerpt(list(row))}; "
            'for data of your own set data.task = "dataset"'
        )
    answer = gsm8k_answer(solution)
    if not answer:
        raise DataError(
            f"{where}: answer must end in #### and the number, got {excerpt(solution[-60:])}; "
            'for answers without a solution set data.task = "dataset"'
        )
    return Problem(
        id=problem_id,
        messages=(*before, {"role": "user", "content": question}),
        answer=answer,
        columns={"question": question, "solution": solution},
        mathematics=True,
    )
