"""A checkpoint with all the files that it must have, and no model in them: for tests of what reads its state."""

from pathlib import Path
from typing import Any

from grpo_actors.rundir.checkpoints import seal, write_json

#: The state of a run that has just begun.
STATE = {
    "run_id": "run",
    "cursor": {"position": 0, "set_aside": []},
    "records": 0,
    "recording": "",
    "success_rates": {},
    "skipped_steps": 0,
}


def write_checkpoint_files(run_dir: Path, update: int, **state: Any) -> Path:
    """Write checkpoint-`update` with this state; return its folder."""
    draft, final = run_dir / "draft", run_dir / f"checkpoint-{update}"
    draft.mkdir()
    write_json(draft / "state.json", {"update": update} | STATE | state)
    for name in ("model.safetensors", "optimizer.safetensors"):
        (draft / name).write_text(name)
    seal(draft, final)
    return final
