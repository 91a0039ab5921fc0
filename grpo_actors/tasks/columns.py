"""Check before a run that the data has the columns that its functions need."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from grpo_actors.errors import RewardError
from grpo_actors.tasks.task import Problem, Task


def check_columns(
    needs: Mapping[str, Sequence[str]],
    task: Task,
    setting: str,
    *,
    applies: Callable[[str, str], bool],
) -> None:
    """Check that the problems to train on and those to evaluate on have the columns that functions need.

    Args:
        needs: Function -> columns without which it cannot be called.
        task: The problems. A column that only some of them have is enough.
        setting: Setting that names the functions, for the error.
        applies: Tells of a function and a source ("" without a mixture) whether the function gets its problems.

    Raises:
        RewardError: A column is missing; the message has the columns that there are.
    """
    for source, problems, data in _data(task):
        needed_here = {name: needed for name, needed in needs.items() if applies(name, source)}
        if not problems:
            continue
        columns = _columns(problems, needed_here)
        for name, needed in needed_here.items():
            missing = [repr(column) for column in needed if column not in columns]
            if missing:
                raise RewardError(
                    f"{setting}: {name!r} needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
                    f"{data} has {', '.join(sorted(columns)) or 'none'}; add it, or give the argument a default"
                )


def _data(task: Task) -> Iterator[tuple[str, Sequence[Problem], str]]:
    """Yield source, problems and a name for them, for all problems to train and to evaluate on."""
    for sources, kind in ((task.train_sources(), "training"), (task.eval_sources(), "evaluation")):
        for source, problems in sources.items():
            yield source, problems, f"the {kind} data" + (f" of {source}" if source else "")


def _columns(problems: Sequence[Problem], needs: Mapping[str, Sequence[str]]) -> set[str]:
    """Return the columns of the first problem, or of all if it lacks one of those needed."""
    columns = set(problems[0].columns)
    if all(columns.issuperset(needed) for needed in needs.values()):
        return columns
    return columns.union(*(problem.columns for problem in problems))
