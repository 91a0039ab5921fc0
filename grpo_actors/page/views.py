"""What the page shows of a run, as JSON values. Pure: it reads a `RunState`.

Curves travel as base64 of little-endian float32: NaN, which JSON lacks, stays NaN, and a screen needs no more digits.
"""

import base64
import math
from collections.abc import Iterable, Mapping
from typing import Any

from grpo_actors.observe.records import Record
from grpo_actors.observe.view import GONE, RunView, mapping, number
from grpo_actors.page.charts import CHARTS, curves_of
from grpo_actors.page.curves import Array, Curves
from grpo_actors.page.run_state import RunState

#: Points of a curve: more than a chart is wide.
BUCKETS = 400
#: Log lines and alarms sent, the newest ones.
LINES_SHOWN = 50


def run_view(
    state: RunState, *, over: str | None = None, first: float = -math.inf, last: float = math.inf
) -> dict[str, Any]:
    """Return everything but the samples.

    Args:
        state: The run.
        over: Why no more records can come, if the run left no word itself.
        first: First update of the curves.
        last: Last update of the curves.
    """
    return {
        "summary": _summary(state.view, over),
        "alarms": [_note(record) for record in list(state.alarms)[-LINES_SHOWN:]],
        "log": [_note(record) for record in list(state.logs)[-LINES_SHOWN:]],
        "workers": _workers(state.view),
        "curves": _curves(state.curves, first, last),
        "latest": {name: state.curves.latest(name) for name in shown_names(state.curves.names)},
        "scores": _scores(state.view.evals),
        "timeline": _timeline(state),
    }


def shown_names(names: Iterable[str]) -> list[str]:
    """Return the curves that a chart shows, of those that a run has."""
    known = list(names)
    found = [curve.name for chart in CHARTS for curve in curves_of(chart, known)]
    bands = [name for chart in CHARTS for name in chart.band or () if name in known]
    return list(dict.fromkeys([*found, *bands]))


def score_sources(view: RunView) -> list[str]:
    """Return the sources of a mixture that have a score of their own."""
    return list(dict.fromkeys(name for record in view.evals for name in mapping(record, "by_source")))


def _summary(view: RunView, over: str | None) -> dict[str, Any]:
    state, why = _state(view, over)
    base = next((record for record in view.evals if number(record, "update") == 0), None)
    return {
        "state": state,
        "why": why,
        "model": _text(view.start, "model_name"),
        "update": view.update,
        "total": view.total_updates,
        "remaining_s": view.remaining_s if state == "running" else None,
        "update_s": number(view.metrics, "update_s"),
        "seconds": _seconds(view),
        "reward": number(view.metrics, "reward_mean"),
        "reward_std": number(view.metrics, "reward_std"),
        "base": _estimate(base, "score"),
        "best": _estimate(view.best_eval, "score"),
        "best_checkpoint": _text(view.best_eval, "checkpoint"),
        "gain": _estimate(view.best_eval, "gain"),
        "measure": _measure(view.last_eval),
    }


def _state(view: RunView, over: str | None) -> tuple[str, str]:
    if view.stop is not None:
        failed = bool(number(view.stop, "exit_code"))
        return ("failed" if failed else "ended"), _text(view.stop, "reason")
    if over is not None:
        return "gone", over
    return ("running" if view.metrics is not None else "starting"), ""


def _seconds(view: RunView) -> float | None:
    """Return the seconds from the newest start to the last record."""
    begin = number(view.start, "time")
    return None if begin is None or view.time is None else max(view.time - begin, 0.0)


def _measure(record: Record | None) -> str:
    measure = mapping(mapping(record, "score"), "measure")
    if not measure:
        return ""
    temperature = number(measure, "temperature")
    how = f"sampled at temperature {temperature:g}" if temperature else "greedy"
    return f"{measure.get('metric')}, {how}, {number(measure, 'problems') or 0:,.0f} held-out problems"


def _estimate(record: Mapping[str, Any] | None, key: str) -> dict[str, float | None] | None:
    estimate = mapping(record, key)
    return {part: number(estimate, part) for part in ("value", "low", "high")} if estimate else None


def _text(record: Record | None, key: str) -> str:
    value = None if record is None else record.get(key)
    return value if isinstance(value, str) else ""


def _note(record: Record) -> dict[str, Any]:
    return {
        "time": record["time"],
        "name": _text(record, "name") or _text(record, "level"),
        "text": _text(record, "text"),
        "update": number(record, "update"),
    }


def _workers(view: RunView) -> list[dict[str, Any]]:
    """Return the newest state of each worker; those that have left or are lost come last."""
    ordered = sorted(view.workers.items(), key=lambda item: (item[1].get("state") in GONE, item[0]))
    return [
        {
            "name": name,
            "role": _text(record, "role"),
            "state": _text(record, "state"),
            "why": _text(record, "why"),
            "device": _text(record, "device"),
            **{key: number(record, key) for key in ("groups", "tokens_per_s", "version", "memory_gb")},
        }
        for name, record in ordered
    ]


def _curves(curves: Curves, first: float, last: float) -> dict[str, Any]:
    sampled = curves.sampled(BUCKETS, first, last)
    names = shown_names(sampled.curves)
    whole = {name: packed(sampled.curves[name].mean) for name in names}
    bands = {name: [packed(sampled.curves[name].low), packed(sampled.curves[name].high)] for name in names}
    return {
        "x": packed(sampled.x),
        "width": sampled.width,
        "mean": whole,
        # Without down-sampling both bounds are the curve itself.
        "band": bands if sampled.width > 1 else {},
    }


def packed(values: Array) -> str:
    """Return the base64 of float32 values."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _scores(evals: Iterable[Record]) -> list[dict[str, Any]]:
    return [
        {
            "update": number(record, "update"),
            "checkpoint": _text(record, "checkpoint"),
            "best": record.get("best") is True,
            **(_estimate(record, "score") or {}),
            "by_source": {
                name: _estimate(mapping(record, "by_source"), name) for name in mapping(record, "by_source")
            },
        }
        for record in evals
    ]


def _timeline(state: RunState) -> dict[str, Any]:
    begin = number(state.view.start, "time") or 0.0
    spans = state.timeline.spans()
    return {
        "actors": state.timeline.actors(),
        "spans": [
            [s.actor, s.doing, round(s.begin - begin, 3), round(s.end - begin, 3), s.what] for s in spans
        ],
    }
