"""Turn what was seen of one run (its records, the memory of its processes, its end) into figures. Pure functions.

A figure that the run did not reach, or that nothing recorded, is left out. So the report of a failed run is shorter.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median, quantiles
from typing import Any

from grpo_actors.bench.figures import number
from grpo_actors.bench.watching import MemorySample
from grpo_actors.observe.records import Record
from grpo_actors.observe.text import aligned, share

#: From this share of its time on, an update counts as one during which an evaluation ran.
OVERLAP_SHARE = 0.5
GB = 1e9


@dataclass(frozen=True, slots=True)
class Interrupt:
    """The first signal that asked the run to stop."""

    #: Unix seconds.
    time: float
    #: Updates done when the run had ended, and whether it left a checkpoint of the last one.
    update: int
    has_checkpoint: bool


@dataclass(frozen=True, slots=True)
class Job:
    """Everything seen of one run; times are Unix seconds, as in records."""

    started_at: float
    ended_at: float
    exit_code: int
    #: In order, of all topics.
    records: Sequence[Record]
    memory: Sequence[MemorySample] = ()
    #: CUDA kernels that were compiled and kept on the disk during the run.
    kernels: int = 0
    interrupt: Interrupt | None = None

    def of(self, topic: str) -> list[Record]:
        """Return the records of one topic."""
        return [record for record in self.records if record["topic"] == topic]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    #: The quantity with its unit.
    what: str
    value: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Update:
    """The time of one update; `at_s` and all `…_at_s` are seconds since the launch."""

    update: int
    at_s: float
    update_s: float
    wait_s: float
    #: Share of the update's time during which an evaluation ran.
    evaluating: float
    learner_tokens_per_s: float | None
    rollout_tokens_per_s: float | None
    padding_share: float | None
    completion_length_mean: float | None
    truncated_share: float | None
    learner_peak_gb: float | None


@dataclass(frozen=True, slots=True)
class Scored:
    """One evaluation."""

    update: int
    start_at_s: float
    end_at_s: float
    samples: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float


@dataclass(frozen=True, slots=True)
class Saved:
    """One checkpoint."""

    update: int
    bytes: int
    #: From the end of its update until it was whole.
    sealed_s: float
    #: How long the learner did nothing else; None if the record does not say it and no update followed.
    learner_waited_s: float | None
    #: The update during which it may still have been written.
    next_update_s: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one run."""

    rows: list[Row]
    updates: list[Update]
    evaluations: list[Scored]
    checkpoints: list[Saved]
    memory: list[dict[str, Any]] = field(default_factory=list)

    def as_table(self) -> str:
        """Return one line for each row."""
        cells = [(row.what, number(row.value)) for row in self.rows]
        lines = aligned([("what", "value"), *cells])
        return "\n".join(
            f"{line}  {note}".rstrip()
            for line, note in zip(lines, ["", *(row.note for row in self.rows)], strict=True)
        )

    def as_json(self) -> dict[str, Any]:
        """Return the report as one JSON object: the rows by name, and all that they were computed from."""
        return {
            "figures": {row.what: {"value": row.value, "note": row.note} for row in self.rows},
            "updates": [asdict(update) for update in self.updates],
            "evaluations": [asdict(scored) for scored in self.evaluations],
            "checkpoints": [asdict(saved) for saved in self.checkpoints],
            "memory": self.memory,
        }


def report(job: Job) -> Report:
    """Compute the figures of a run."""
    evaluations = _evaluations(job)
    updates = _updates(job, evaluations)
    checkpoints = _checkpoints(job)
    rows = [
        *_start_rows(job),
        *_update_rows(job, updates),
        *_evaluation_rows(evaluations),
        *_checkpoint_rows(checkpoints),
        *_end_rows(job),
        *_memory_rows(job, updates),
        Row("kernels compiled", job.kernels),
    ]
    memory = [asdict(sample) | {"at_s": sample.time - job.started_at} for sample in job.memory]
    return Report(rows, updates, evaluations, checkpoints, memory)


# --- what the records say -------------------------------------------------------------------------


def _evaluations(job: Job) -> list[Scored]:
    """Return the evaluations; one ended when its record was written, and began as long before as it took."""
    return [
        Scored(
            record["update"],
            record["time"] - record["seconds"] - job.started_at,
            record["time"] - job.started_at,
            record["score"]["measure"]["problems"],
            *(record[name] for name in ("accuracy", "accuracy_low", "accuracy_high")),
        )
        for record in job.of("eval")
    ]


def _updates(job: Job, evaluations: Sequence[Scored]) -> list[Update]:
    updates = []
    for record in job.of("metrics"):
        end_s, took_s = record["time"] - job.started_at, record["update_s"]
        shared_s = sum(
            max(0.0, min(end_s, each.end_at_s) - max(end_s - took_s, each.start_at_s)) for each in evaluations
        )
        updates.append(
            Update(
                record["update"],
                end_s,
                took_s,
                record["wait_s"],
                min(1.0, shared_s / took_s) if took_s else 0.0,
                *(
                    record.get(name)
                    for name in (
                        "learner_tokens_per_s",
                        "rollout_tokens_per_s",
                        "padding_share",
                        "completion_length_mean",
                        "truncated_share",
                        "memory_gb",
                    )
                ),
            )
        )
    return updates


def _checkpoints(job: Job) -> list[Saved]:
    ends = {record["update"]: record for record in job.of("metrics")}
    saved = []
    for record in job.of("checkpoint"):
        due, after = ends.get(record["update"]), ends.get(record["update"] + 1)
        if due is None:
            continue  # from before a resume
        # Without a figure in the record: between the end of an update and the start of the next one, the learner does
        # nothing else.
        gap_s = None if after is None else max(0.0, after["time"] - after["update_s"] - due["time"])
        waited_s = record.get("wait_s")
        saved.append(
            Saved(
                record["update"],
                record["bytes"],
                record["time"] - due["time"],
                gap_s if waited_s is None else waited_s,
                None if after is None else after["update_s"],
            )
        )
    return saved


# --- rows -----------------------------------------------------------------------------------------


def _start_rows(job: Job) -> Iterator[Row]:
    since = job.started_at
    for what, records in (
        ("launch to loaded learner s", job.of("start")),
        ("launch to first worker s", [r for r in job.of("worker") if r.get("role") == "rollout"]),
        ("launch to first update s", job.of("metrics")),
        ("launch to base score s", [r for r in job.of("eval") if r["update"] == 0]),
    ):
        if records:
            yield Row(what, records[0]["time"] - since)
    stops = job.of("stop")
    how = f"exit code {job.exit_code}" + (f", {stops[-1]['reason']}" if stops else "")
    yield Row("whole command s", job.ended_at - since, how)


def _update_rows(job: Job, updates: Sequence[Update]) -> Iterator[Row]:
    planned = next((record["total_updates"] for record in job.of("start")), None)
    yield Row("updates", len(updates), f"of {planned}" if planned else "")
    later = updates[1:]  # the first one waits for the first completions
    if not later:
        return
    usual_s = median(update.update_s for update in later)
    yield Row("median update s", usual_s, "the first one left out, as in the rows below")
    if len(later) > 1:
        yield Row("90th percentile s", quantiles((u.update_s for u in later), n=10, method="inclusive")[-1])
    slowest = max(later, key=lambda update: update.update_s)
    yield Row(
        "slowest update s",
        slowest.update_s,
        f"update {slowest.update}: {slowest.update_s / usual_s:.1f} × the median",
    )
    beside = [update.update_s for update in later if update.evaluating >= OVERLAP_SHARE]
    # A score waits for the end of the learner's update, so an evaluation may have begun one update earlier.
    alone = [
        one.update_s for one, after in zip(later, [*later[1:], None], strict=True) if not _touches(one, after)
    ]
    if beside:
        ratio = f", {median(beside) / median(alone):.2f} × the next row" if alone else ""
        yield Row("median while evaluating s", median(beside), f"{_counted(beside)}{ratio}")
    if alone:
        yield Row("median while not evaluating s", median(alone), _counted(alone))
    for what, name in (
        ("learner tokens/s", "learner_tokens_per_s"),
        ("rollout tokens/s", "rollout_tokens_per_s"),
        ("padding share", "padding_share"),
        ("completion tokens", "completion_length_mean"),
    ):
        values = [value for update in later if (value := getattr(update, name)) is not None]
        if values:
            yield Row(what, median(values), f"{number(min(values))} to {number(max(values))}")
    whole_s = sum(update.update_s for update in later)
    yield Row("learner waited, share", sum(update.wait_s for update in later) / whole_s)


def _touches(update: Update, after: Update | None) -> bool:
    """Return whether an evaluation may have run during an update; `after` is the next one, None for the last."""
    return bool(update.evaluating or (after and after.evaluating))


def _counted(values: Sequence[float]) -> str:
    return "1 update" if len(values) == 1 else f"{len(values)} updates"


def _evaluation_rows(evaluations: Sequence[Scored]) -> Iterator[Row]:
    for each in evaluations:
        yield Row(
            f"evaluation {each.update} s",
            each.end_at_s - each.start_at_s,
            f"{share(each.accuracy)} of {each.samples} ({share(each.accuracy_low)} to {share(each.accuracy_high)}), "
            f"from {number(each.start_at_s)} to {number(each.end_at_s)} s",
        )
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        yield Row(
            "accuracy gained, points",
            100 * (last.accuracy - first.accuracy),
            f"{share(first.accuracy)} → {share(last.accuracy)}",
        )


def _checkpoint_rows(checkpoints: Sequence[Saved]) -> Iterator[Row]:
    for each in checkpoints:
        parts = [f"{number(each.bytes / GB)} GB"]
        if each.learner_waited_s is not None:
            parts.append(f"learner waited {number(each.learner_waited_s)} s")
        if each.next_update_s is not None:
            parts.append(f"the next update took {number(each.next_update_s)} s")
        yield Row(f"checkpoint {each.update} s", each.sealed_s, ", ".join(parts))


def _end_rows(job: Job) -> Iterator[Row]:
    updates = job.of("metrics")
    if updates:
        yield Row("last update to exit s", job.ended_at - updates[-1]["time"])
    if job.interrupt is not None:
        kept = "with its checkpoint" if job.interrupt.has_checkpoint else "without a checkpoint of it"
        yield Row(
            "Ctrl-C to exit s",
            job.ended_at - job.interrupt.time,
            f"the last update is {job.interrupt.update}, {kept}",
        )


def _memory_rows(job: Job, updates: Sequence[Update]) -> Iterator[Row]:
    whole = [(sample.gpu, sample.time) for sample in job.memory if sample.gpu is not None]
    if whole:
        peak, at = max(whole)
        before = (
            f"{number(whole[0][0] / GB)} GB at the launch, the peak after {number(at - job.started_at)} s"
        )
        yield Row("GPU memory in use GB", peak / GB, before)
    yield from _peaks("GPU memory", [sample.gpu_of for sample in job.memory])
    peaks = [update.learner_peak_gb for update in updates if update.learner_peak_gb is not None]
    if peaks:
        yield Row("learner's arrays, peak GB", max(peaks), "by MLX")
    yield from _peaks("host memory", [sample.host_of for sample in job.memory])


def _peaks(what: str, samples: Sequence[Mapping[str, int]]) -> Iterator[Row]:
    """Yield the peak of the sum over processes, then that of each process."""
    names = sorted({name for sample in samples for name in sample})
    if not names:
        return
    yield Row(
        f"{what}, all processes GB", max(sum(sample.values()) for sample in samples) / GB, "sum at one moment"
    )
    for name in names:
        yield Row(f"{what}, {name} GB", max(sample.get(name, 0) for sample in samples) / GB)
