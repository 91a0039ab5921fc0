"""What a run has gained so far: the scores of its base model and of its best checkpoint."""

from pathlib import Path

from grpo_actors.rundir.checkpoints import best, find_checkpoints
from grpo_actors.rundir.folder import BASE_EVALUATION_FILE, EVALUATION_FILE
from grpo_actors.rundir.scores import read_score
from grpo_actors.score import verdict


def gained(run_dir: Path) -> str:
    """Return a line on what the training gained: ``accuracy, …: 0.387 [0.33, 0.45] (base model) → 0.890 […] (best, …)``.

    Raises:
        RunError: a file of scores is unusable.
    """
    marked, kept = best(run_dir), find_checkpoints(run_dir)
    if marked is None:
        return "not evaluated"
    if not marked.update and not any((checkpoint.path / EVALUATION_FILE).is_file() for checkpoint in kept):
        return f"not evaluated but for the base model: {marked.score.measure} {marked.score}"
    if not marked.update:
        return f"{marked.score.measure}: no checkpoint beat the base model, {marked.score}"
    of_base, of_best = (
        read_score(file)
        for file in (run_dir / BASE_EVALUATION_FILE, run_dir / marked.checkpoint / EVALUATION_FILE)
    )
    alike = of_base is not None and of_base.report.score.measure == marked.score.measure
    known = str(of_base.report.score) if of_base is not None and alike else "?"
    return (
        f"{marked.score.measure}: {known} (base model) → {marked.score} (best, update {marked.update})"
        f"{'' if of_best is None else verdict(of_best.report.gain)}"
    )


def kept_checkpoint(run_dir: Path) -> str:
    """Return a line on the folder of the best checkpoint, else of the last one: ``best checkpoint: …``.

    Raises:
        RunError: best.json is unusable.
    """
    marked, kept = best(run_dir), find_checkpoints(run_dir)
    if marked is not None and marked.update:
        return f"best checkpoint: {run_dir / marked.checkpoint}"
    return f"last checkpoint: {kept[-1].path if kept else 'none'}"
