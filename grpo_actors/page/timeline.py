"""The timeline of the actors: who worked and who waited for whom, as spans of time.

Pure: it reads records. The learner's spans are exact. Of the workers a run records, for each update, which part of their
time they had nothing to sample; their wait is drawn at the end of the update.
"""

from collections import deque
from typing import Literal, NamedTuple

from grpo_actors.observe.records import Record
from grpo_actors.observe.view import GONE, mapping, number

Doing = Literal["trains", "samples", "waits", "evaluates", "writes"]

LEARNER, EVALUATOR, CHECKPOINTS = "learner", "evaluator", "checkpoints"
#: Spans kept, of all actors together: the newest 100 updates of a learner with eight workers.
SPANS_KEPT = 2_000
#: Updates shown.
UPDATES_SHOWN = 100


class Span(NamedTuple):
    """What one actor did for a while; Unix seconds."""

    actor: str
    doing: Doing
    begin: float
    end: float
    #: What it waits for, or the update or checkpoint that it works on.
    what: str


class Timeline:
    """The newest spans of a run."""

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=SPANS_KEPT)
        #: Begin of the newest updates.
        self._begins: deque[float] = deque(maxlen=UPDATES_SHOWN)
        self._present: dict[str, float] = {}

    def apply(self, record: Record) -> None:
        """Add the spans that follow from a record."""
        match record["topic"]:
            case "start":
                self._present.clear()
            case "worker":
                self._note_worker(record)
            case "metrics":
                self._note_update(record)
            case "eval":
                seconds = number(record, "seconds") or 0.0
                self._add(
                    EVALUATOR,
                    "evaluates",
                    record["time"] - seconds,
                    record["time"],
                    str(record.get("checkpoint")),
                )
            case "checkpoint":
                self._note_checkpoint(record)

    def spans(self) -> list[Span]:
        """Return the spans of the newest `UPDATES_SHOWN` updates, oldest first."""
        first = self._begins[0] if self._begins else float("-inf")
        return [span for span in self._spans if span.end > first]

    def actors(self) -> list[str]:
        """Return the actors with a span, in the order of the lanes from above."""
        present = {span.actor for span in self.spans()}
        workers = sorted(present - {LEARNER, EVALUATOR, CHECKPOINTS})
        return [actor for actor in (LEARNER, *workers, EVALUATOR, CHECKPOINTS) if actor in present]

    def _add(self, actor: str, doing: Doing, begin: float, end: float, what: str) -> None:
        if end > begin:
            self._spans.append(Span(actor, doing, begin, end, what))

    def _note_worker(self, record: Record) -> None:
        if record.get("role") == "evaluator":
            return
        name = str(record.get("worker"))
        if record.get("state") in GONE:
            self._present.pop(name, None)
        else:
            self._present.setdefault(name, record["time"])

    def _note_update(self, record: Record) -> None:
        end, update = record["time"], f"update {number(record, 'update') or 0:.0f}"
        length, wait = number(record, "update_s") or 0.0, number(record, "wait_s") or 0.0
        begin = end - length
        self._begins.append(begin)
        self._add(LEARNER, "waits", begin, begin + wait, "for groups of the workers")
        self._add(LEARNER, "trains", begin + wait, end, update)
        share = number(record, "rollout_wait_share") or 0.0
        for worker, since in self._present.items():
            joined = max(begin, since)
            idle = end - share * max(end - joined, 0.0)
            self._add(worker, "samples", joined, idle, f"groups, during {update}")
            self._add(worker, "waits", idle, end, f"for the learner, {share:.0%} of {update}")

    def _note_checkpoint(self, record: Record) -> None:
        end, write = record["time"], number(record, "write_s") or 0.0
        what = f"checkpoint-{number(record, 'update') or 0:.0f}"
        self._add(CHECKPOINTS, "writes", end - write, end, what)


def memory_of(record: Record) -> dict[str, float]:
    """Return the peak memory in GB by actor, from a ``metrics`` record."""
    peers = mapping(record, "peers_memory_gb")
    named = {LEARNER: number(record, "memory_gb")} | {str(name): number(peers, name) for name in peers}
    return {name: value for name, value in named.items() if value is not None}
