"""``workers.json``: what was decided about a run's own workers, and the number that a continued run begins with.

The supervisor writes it, the learner puts what is new in it among the run's records. Nothing waits for a decision, so that
a file which is replaced whole is enough between the two. Knows no process; what pays, `headcount` decides.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo_actors.atomic import write_whole
from grpo_actors.observe.records import FIELDS, Record
from grpo_actors.processes.headcount import Decision
from grpo_actors.processes.preflight import WORKERS_FILE


def keep(run_dir: Path, decision: Decision, *, update: int, kept: int) -> None:
    """One decision more, taken after `update`; `kept` workers are known to pay. `OSError`: the disk refuses."""
    told = {"time": time.time(), "update": update, **asdict(decision)}
    content = {"kept": kept, "decisions": [*_decisions(run_dir), told]}
    write_whole(run_dir / WORKERS_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def settled_on(run_dir: Path) -> int:
    """The number of workers that the run in this folder last knew to pay; 1 where it knew of none."""
    kept = _read(run_dir).get("kept")
    return max(1, kept) if isinstance(kept, int) else 1


def decisions(run_dir: Path) -> list[Record]:
    """All of the run, oldest first, each as the fields of a `headcount` record."""
    return [as_told(one) for one in _decisions(run_dir)]


def as_told(decision: Record) -> Record:
    """A decision without what else its file or its record says."""
    return {name: decision.get(name) for name in FIELDS["headcount"]}


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
