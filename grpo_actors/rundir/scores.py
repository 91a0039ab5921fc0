"""The file that keeps the score of a checkpoint or of the base model, so that it is computed once."""

from pathlib import Path

from pydantic import TypeAdapter

from grpo_actors.atomic import whole_file
from grpo_actors.rundir.checkpoints import write_json
from grpo_actors.rundir.reading import read_json
from grpo_actors.score import Form, Report


class SavedScore(Form):
    """The content of the file."""

    report: Report
    #: The value of each problem, in their order, of which the score is the mean; None if the metric does not apply.
    #: A paired comparison needs them.
    values: list[float | None]


_saved = TypeAdapter(SavedScore)


def read_score(path: Path) -> SavedScore | None:
    """Return the score in a file; None if there is no such file.

    Raises:
        RunError: The file is no score.
    """
    if not path.exists():
        return None
    return read_json(path, _saved, "remove it, and the evaluator scores again")


def write_score(path: Path, saved: SavedScore) -> None:
    """Write the score to a file, whole or not at all."""
    with whole_file(path) as draft:
        write_json(draft, saved.model_dump())
