"""What a run trains on: a digest of its problems, which a resume compares, and their system prompt.

Where they are read from does not matter.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from pydantic import TypeAdapter

from grpo_actors.atomic import whole_file
from grpo_actors.errors import RunError
from grpo_actors.rundir.checkpoints import find_checkpoints, write_json
from grpo_actors.rundir.folder import DATA_FILE
from grpo_actors.rundir.reading import read_json
from grpo_actors.score import Form
from grpo_actors.tasks.task import Problem, Task

#: Problems whose system prompts are compared.
COMPARED_PROBLEMS = 1000


class TrainingData(Form):
    """The content of data.json."""

    #: Number of training problems.
    problems: int
    #: Digest of their order, ids and contents.
    digest: str
    #: The system prompt that the problems have in common; empty: none.
    system_prompt: str = ""

    def __str__(self) -> str:
        return f"{self.problems:,} problems with the digest {self.digest}"


_form = TypeAdapter(TrainingData)


def check_data(run_dir: Path, task: Task) -> TrainingData:
    """Return what the task trains on; check that it is what the run in the folder has trained on, if it has begun.

    Raises:
        RunError: It is not; one line with the two digests.
    """
    problems = task.problems("train")
    found = TrainingData(
        problems=len(problems), digest=task.digest(), system_prompt=common_system_prompt(problems)
    )
    before = read_data(run_dir)
    if before is None or not find_checkpoints(run_dir):
        return found
    if (before.problems, before.digest) != (found.problems, found.digest):
        raise RunError(
            f"run.output_dir: {run_dir} has trained on other data: {before}, got {found}; "
            "restore the data, or choose another run.output_dir"
        )
    return found


def read_data(run_dir: Path) -> TrainingData | None:
    """Return what the run in the folder trains on; None if it has not noted it.

    Raises:
        RunError: The file is unusable.
    """
    file = run_dir / DATA_FILE
    return (
        read_json(file, _form, "remove it to continue with the data of the settings")
        if file.is_file()
        else None
    )


def common_system_prompt(problems: Sequence[Problem]) -> str:
    """Return the system prompt of the first problems if they all have the same one; else an empty text."""
    first = (problem.messages[0] for problem in islice(problems, COMPARED_PROBLEMS))
    prompts = {message["content"] if message["role"] == "system" else "" for message in first}
    return prompts.pop() if len(prompts) == 1 else ""


def claim_data(run_dir: Path, task: Task) -> None:
    """Check the data as `check_data`, and keep what this run trains on in its folder."""
    content = check_data(run_dir, task)
    with whole_file(run_dir / DATA_FILE) as draft:
        write_json(draft, content.model_dump())
