"""The HTML of the page: its charts, tables and data blocks, for the server and for one file alike.

Texts of a run are never markup here: they are escaped, or data that `static/page.js` writes as text.
"""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import bokeh
from bokeh.document import Document
from bokeh.embed.util import standalone_docs_json_and_render_items

from grpo_actors.page.charts import CHARTS, Chart, Curve
from grpo_actors.page.figures import DOING_COLOURS, colour_of, dash_of, figures
from grpo_actors.page.run_state import RunState
from grpo_actors.page.settings import by_name, differing
from grpo_actors.page.views import score_sources, shown_names

STATIC = Path(__file__).parent / "static"
#: Bokeh's own JavaScript, which its package brings.
BOKEH_JS = Path(bokeh.__file__).parent / "server" / "static" / "js" / "bokeh.min.js"
#: Nothing is loaded from elsewhere. Bokeh sets styles on elements.
POLICY = "default-src 'none'; connect-src 'self'; img-src data:; style-src {inline}; script-src {script}; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True, slots=True)
class ShownRun:
    """A run on the page."""

    name: str
    state: RunState


class _Drawn(NamedTuple):
    """Figures in the form in which Bokeh's JavaScript takes them."""

    docs: Any
    item: Any
    #: Figure -> id of the element that it is drawn into.
    element_ids: dict[str, str]
    #: Chart -> its curves.
    curves: dict[str, list[Curve]]


@lru_cache(maxsize=8)
def _drawn(runs: tuple[tuple[str, tuple[str, ...]], ...], sources: tuple[str, ...]) -> _Drawn:
    """Build the figures, which takes a second; see `figures` for the arguments."""
    shown = figures(runs, sources)
    models = list(shown.by_key.values())
    document = Document()
    with document.models.freeze():  # else every root walks through all the others again
        for model in models:
            document.add_root(model)
    docs, [item] = standalone_docs_json_and_render_items(models)
    element_ids = dict(zip(shown.by_key, item.roots.to_json().values(), strict=True))
    return _Drawn(docs, item.to_json(), element_ids, shown.curves)


def shape_of(runs: Sequence[ShownRun]) -> str:
    """Return what decides which charts there are; a page with another shape must be loaded again."""
    return json.dumps(
        [
            [
                shown_names(run.state.curves.names),
                score_sources(run.state.view),
                run.state.view.start is not None,
            ]
            for run in runs
        ]
    )


def live_page(runs: Sequence[ShownRun]) -> str:
    """Return the page that a server serves next to ``page.js``, ``page.css`` and ``bokeh.min.js``."""
    head = '<link rel="stylesheet" href="page.css">'
    scripts = '<script src="bokeh.min.js"></script><script src="page.js"></script>'
    return _page(runs, head=head, scripts=scripts, embedded=None)


def whole_page(run: ShownRun, embedded: Mapping[str, Any]) -> str:
    """Return the page as one file.

    Args:
        run: The run.
        embedded: What a server would answer: ``views`` and ``samples``.
    """
    policy = POLICY.format(inline="'unsafe-inline'", script="'unsafe-inline'")
    style = (STATIC / "page.css").read_text("utf-8")
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{style}</style>'
    sources = (BOKEH_JS.read_text("utf-8"), (STATIC / "page.js").read_text("utf-8"))
    scripts = "".join(f"<script>{_unclosed(source)}</script>" for source in sources)
    return _page([run], head=head, scripts=scripts, embedded=embedded)


def _page(runs: Sequence[ShownRun], *, head: str, scripts: str, embedded: Mapping[str, Any] | None) -> str:
    shown = _drawn(
        tuple((run.name, tuple(shown_names(run.state.curves.names))) for run in runs),
        tuple(dict.fromkeys(name for run in runs for name in score_sources(run.state.view))),
    )
    element_ids = shown.element_ids
    meta = {
        "live": embedded is None,
        "shape": shape_of(runs),
        "runs": [
            {"name": run.name, "colour": colour_of(index, 0, len(runs))} for index, run in enumerate(runs)
        ],
        "doing": DOING_COLOURS,
        "docs": shown.docs,
        "item": shown.item,
        "embedded": embedded,
    }
    sections = {
        f"{section}_charts": "".join(
            _card(chart, shown, element_ids[chart.key], len(runs))
            for chart in CHARTS
            if chart.section == section and chart.key in element_ids
        )
        for section in ("reward", "length", "learning", "actors")
    }
    title = " · ".join(run.name for run in runs)
    return Template((STATIC / "page.html").read_text("utf-8")).substitute(
        **sections,
        head=head,
        scripts=scripts,
        title=html.escape(title),
        score=_plot(element_ids["score"]),
        score_sources=_score_sources(element_ids.get("score_sources")),
        timeline=_plot(element_ids["timeline"]),
        doing="".join(
            f'<li><i style="--c:{colour}"></i>{doing}</li>' for doing, colour in DOING_COLOURS.items()
        ),
        settings=_settings(runs),
        several="several" if len(runs) > 1 else "single",
        meta=_data(meta),
    )


def _card(chart: Chart, shown: _Drawn, element_id: str, runs: int) -> str:
    keys = "".join(_key(curve, index, runs) for index, curve in enumerate(shown.curves[chart.key]))
    return (
        f'<figure class="card chart" id="chart-{chart.key}" data-format="{chart.format}"><figcaption>'
        f'<h3>{html.escape(chart.title)}</h3><ul class="keys">{keys}</ul><p class="help">{html.escape(chart.help)}</p>'
        f"</figcaption>{_plot(element_id)}</figure>"
    )


def _key(curve: Curve, index: int, runs: int) -> str:
    """Return the button that shows the curve's newest value, and hides or shows the curve."""
    colour = colour_of(0, index, runs) if runs == 1 else "currentColor"
    name = html.escape(curve.name, quote=True)
    return (
        f'<li><button type="button" data-curve="{name}" aria-pressed="true">'
        f'<i class="{dash_of(index, runs)}" style="--c:{colour}"></i>'
        f"{html.escape(curve.label or curve.name)} <b></b></button></li>"
    )


def _plot(element_id: str) -> str:
    return f'<div class="plot" id="{html.escape(element_id, quote=True)}"></div>'


def _score_sources(element_id: str | None) -> str:
    if element_id is None:
        return ""
    return f'<figure class="card chart" id="chart-score_sources"><figcaption><h3>By source</h3></figcaption>{_plot(element_id)}</figure>'


def _settings(runs: Sequence[ShownRun]) -> str:
    """Return the settings that differ, one column per run; for one run, all of its settings by section."""
    configs = [by_name(run.state.view.start) for run in runs]
    if len(runs) > 1:
        rows = differing(configs)
        if not rows:
            return "<p>All settings are equal.</p>"
        head = "".join(f"<th scope=col>{html.escape(run.name)}</th>" for run in runs)
        return _table(f"<th scope=col>setting</th>{head}", rows)
    [config] = configs
    if not config:
        return "<p>None recorded yet.</p>"
    sections = dict.fromkeys(name.partition(".")[0] for name in config)
    return "".join(
        f"<details><summary>{section}</summary>"
        + _table(
            "<th scope=col>setting</th><th scope=col>value</th>",
            {name: [value] for name, value in config.items() if name.startswith(f"{section}.")},
        )
        + "</details>"
        for section in sections
    )


def _table(head: str, rows: Mapping[str, Sequence[Any]]) -> str:
    body = "".join(
        f"<tr><th scope=row>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(_shown(value))}</td>" for value in values)
        + "</tr>"
        for name, values in rows.items()
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _data(value: Any) -> str:
    """Return JSON that cannot end the script element it stands in."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _unclosed(script: str) -> str:
    """Return a script in whose strings nothing ends the element it stands in."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")
