"""What a run trains on: a digest of its problems, which a resume compares. Where they are read from does not matter."""

from pathlib import Path

from pydantic import TypeAdapter

from grpo_actors.atomic import whole_file
from grpo_actors.errors import RunError
from grpo_actors.rundir.checkpoints import find_checkpoints, write_json
from grpo_actors.rundir.folder import DATA_FILE
from grpo_actors.rundir.reading import read_json
from grpo_actors.score import Form
from grpo_actors.tasks.task import Task


class TrainingData(Form):
    """The content of data.json."""

    #: Number of training problems.
    problems: int
    #: Digest of their order, ids and contents.
    digest: str

    def __str__(self) -> str:
        return f"{self.problems:,} problems with the digest {self.digest}"


_form = TypeAdapter(TrainingData)


def check_data(run_dir: Path, task: Task) -> TrainingData:
    """Return what the task trains on; check that it is what the run in the folder has trained on, if it has begun.

    Raises:
        RunError: It is not; one line with the two digests.
    """
    found = TrainingData(problems=len(task.problems("train")), digest=task.digest())
    file = run_dir / DATA_FILE
    if not file.is_file() or not find_checkpoints(run_dir):
        return found
    before = read_json(file, _form, "remove it to continue with the data of the settings")
    if before != found:
        raise RunError(
            f"run.output_dir: {run_dir} has trained on other data: {before}, got {found}; "
            "restore the data, or choose another run.output_dir"
        )
    return found


def claim_data(run_dir: Path, task: Task) -> None:
    """Check the data as `check_data`, and keep what this run trains on in its folder."""
    content = check_data(run_dir, task)
    with whole_file(run_dir / DATA_FILE) as draft:
        write_json(draft, content.model_dump())
