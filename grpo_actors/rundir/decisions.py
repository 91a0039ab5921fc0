"""``workers.json``: what was decided about a run's own workers, and the number that a continued run begins with.

The supervisor writes it, the learner puts what is new in it among the run's records. Nothing waits for a decision, so that
a file which is replaced whole is enough between the two. Knows no process; `headcount` decides what pays.
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
    """The number of workers from now on, and in one line what led to it."""

    before: int
    workers: int
    reason: str


def keep(run_dir: Path, decision: Decision, *, update: int, kept: int) -> None:
    """One decision more, taken after `update`; `kept` workers are known to pay. `OSError`: the disk refuses."""
    told = {"time": time.time(), "update": update, **asdict(decision)}
    content = {"kept": kept, "decisions": [*_decisions(run_dir), told]}
    write_whole(run_dir / WORKERS_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def settled_on(run_dir: Path) -> int:
    """The number of workers that the run in this folder last knew to pay; 1 where it knew of none."""
    kept = _read(run_dir).get("kept")
    return max(1, kept) if isinstance(kept, int) else 1


def decisions(run_dir: Path) -> list[dict[str, Any]]:
    """All of the run, oldest first, each as the fields of a `headcount` record."""
    return [as_record(one) for one in _decisions(run_dir)]


def as_record(decision: Mapping[str, Any]) -> dict[str, Any]:
    """A decision without what else its file or its record says."""
    return {name: decision.get(name) for name in ("update", *(field.name for field in fields(Decision)))}


def _decisions(run_dir: Path) -> list[dict[str, Any]]:
    """As they are kept."""
    kept = _read(run_dir).get("decisions", [])
    return [one for one in kept if isinstance(one, dict)] if isinstance(kept, list) else []


def _read(run_dir: Path) -> dict[str, Any]:
    """What is kept there; nothing where someone else has put something else: no run ends for that."""
    try:
        kept = json.loads((run_dir / WORKERS_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
