"""Which folder a run goes to if an earlier one is to stay."""

from itertools import count
from pathlib import Path

from grpo_actors.rundir.checkpoints import find_checkpoints
from grpo_actors.rundir.folder import CONFIG_FILE
from grpo_actors.runs.listing import listed


def unfinished_folder(folder: Path) -> tuple[Path, str]:
    """Return the first of FOLDER, FOLDER-2, FOLDER-3, … whose run is not done, and a line that says what happens there.

    Raises:
        ConfigError: the settings of a run there are unusable.
    """
    done = None
    for number in count(2):
        run = listed(folder) if (folder / CONFIG_FILE).is_file() else None
        if run is None or run.state != "done":
            break
        done, folder = folder, folder.with_name(f"{folder.name.removesuffix(f'-{number - 1}')}-{number}")
    kept = find_checkpoints(folder)
    if kept:
        return folder, f"{folder}: continues its run after update {kept[-1].update}"
    return folder, f"{folder}: a new run" + (
        f"; the one in {done} is done and stays as it is" if done else ""
    )
