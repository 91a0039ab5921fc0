"""Read and write ``workers.json``: the decisions about a run's own workers, and how many a continued run starts with.

The supervisor writes the file. The learner copies new decisions into the run's records. Nothing waits for a decision,
so a file that is replaced atomically is enough between the two. `supervisor.headcount` makes the decisions.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from grpo_actors.atomic import write_whole
from grpo_actors.rundir.folder import WORKERS_FILE


@dataclass(frozen=True, slots=True)
class Decision:
    """A change of the number of workers, or that it is final (`before` equals `workers`), and the reason in one line."""

    before: int
    #: Number of workers from now on.
    workers: int
    reason: str


def append_decision(run_dir: Path, decision: Decision, *, update: int, kept: int) -> None:
    """Add a decision to the file.

    Args:
        run_dir: The run folder.
        decision: The decision.
        update: Number of updates done when it was taken.
        kept: Number of workers that are known to pay, without the one on trial.

    Raises:
        OSError: The file cannot be written.
    """
    entry = {"time": time.time(), "update": update, **asdict(decision)}
    content = {"kept": kept, "decisions": [*_entries(run_dir), entry]}
    write_whole(run_dir / WORKERS_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def kept_workers(run_dir: Path) -> int:
    """Return the last number of workers that were known to pay in this run; 1 if the file has none."""
    kept = _read(run_dir).get("kept")
    return max(1, kept) if isinstance(kept, int) else 1


def decisions(run_dir: Path) -> list[dict[str, Any]]:
    """Return all decisions of the run, oldest first, each with the fields of a `headcount` record."""
    return [as_record(entry) for entry in _entries(run_dir)]


def as_record(decision: Mapping[str, Any]) -> dict[str, Any]:
    """Return only the fields of a `headcount` record; drop the others that the file or the record has."""
    return {name: decision.get(name) for name in ("update", *(field.name for field in fields(Decision)))}


def _entries(run_dir: Path) -> list[dict[str, Any]]:
    entries = _read(run_dir).get("decisions", [])
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _read(run_dir: Path) -> dict[str, Any]:
    """Return the file's content; empty if it is missing or is not what this module writes: no run stops for that."""
    try:
        content = json.loads((run_dir / WORKERS_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
