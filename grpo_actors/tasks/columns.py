"""Check before a run that the data has the columns that its functions need."""

from collections.abc import Mapping, Sequence

from grpo_actors.errors import RewardError
from grpo_actors.tasks.task import Problem, Task


def check_columns(needs: Mapping[str, Sequence[str]], task: Task, setting: str) -> None:
    """Check that the problems to train on and those to evaluate on have the columns that functions need.

    Args:
        needs: Function -> columns without which it cannot be called.
        task: The problems. A column that only some of them have is enough.
        setting: Setting that names the functions, for the error.

    Raises:
        RewardError: A column is missing; the message has the columns that there are.
    """
    for problems, data in (
        (task.problems("train"), "the training data"),
        (task.problems("eval"), "the evaluation data"),
    ):
        if not problems:
            continue
        columns = _columns(problems, needs)
        for name, needed in needs.items():
            missing = [repr(column) for column in needed if column not in columns]
            if missing:
                raise RewardError(
                    f"{setting}: {name!r} needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
                    f"{data} has {', '.join(sorted(columns)) or 'none'}; add it, or give the argument a default"
                )


def _columns(problems: Sequence[Problem], needs: Mapping[str, Sequence[str]]) -> set[str]:
    """Return the columns of the first problem, or of all if it lacks one of those needed."""
    columns = set(problems[0].columns)
    if all(columns.issuperset(needed) for needed in needs.values()):
        return columns
    return columns.union(*(problem.columns for problem in problems))
