"""The score of a checkpoint or of the base model: its form, and the file that keeps it so that it is computed once."""

from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from grpo_actors.atomic import whole_file
from grpo_actors.rundir.checkpoints import write_json
from grpo_actors.rundir.reading import STRICT, read_json


@dataclass(frozen=True, slots=True)
class Score:
    """The result of one policy on the held-out problems."""

    #: Number of problems.
    samples: int
    #: Share of greedy completions that are right, and its 95 % interval.
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    #: Share of completions sampled at the evaluator's temperature that are right; None if not requested.
    sampled_accuracy: float | None
    #: Unweighted mean of each reward function over the greedy completions to which it applies.
    rewards: dict[str, float]
    completion_length_mean: float
    truncated_share: float
    seconds: float

    __pydantic_config__ = STRICT

    @property
    def decisive(self) -> float:
        """The accuracy by which checkpoints are compared: of sampled completions, if there are any."""
        return self.accuracy if self.sampled_accuracy is None else self.sampled_accuracy


_score = TypeAdapter(Score)


def read_score(path: Path) -> Score | None:
    """Return the score in a file; None if there is no such file.

    Raises:
        RunError: The file is no score.
    """
    if not path.exists():
        return None
    return read_json(path, _score, "remove it, and the evaluator scores again")


def write_score(path: Path, score: Score) -> None:
    """Write the score to a file, whole or not at all."""
    with whole_file(path) as draft:
        write_json(draft, asdict(score))
