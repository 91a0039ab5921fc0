"""The figures of the page in Bokeh: empty sources and the lines that read them. `static/page.js` fills the sources.

Colours and fonts of axes are the style sheet's, which the page applies for its theme. Imports Bokeh, an extra: it is
imported late.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from bokeh.models import (
    BasicTickFormatter,
    ColumnDataSource,
    CrosshairTool,
    DataRange1d,
    FactorRange,
    HoverTool,
    NumeralTickFormatter,
    Range1d,
    Span,
)
from bokeh.plotting import figure

from grpo_actors.page.charts import CHARTS, Chart, Curve, Format, curves_of

#: Readable on white and on near black.
COLOURS = ("#2f7ed8", "#e0700b", "#1a9c6b", "#d9435f", "#8a63d2", "#1496b4", "#c94f9c", "#8f8f1f")
#: Dashes of the curves of a chart when colours tell the runs apart.
DASHES = ("solid", "dashed", "dotted", "dashdot")
#: Colours of what an actor does on the timeline.
DOING_COLOURS = {
    "trains": "#2f7ed8",
    "samples": "#1a9c6b",
    "waits": "#e3b341",
    "evaluates": "#8a63d2",
    "writes": "#1496b4",
}

#: Pixels.
_HEIGHT, _SCORE_HEIGHT = 210, 300
_BORDER_LEFT, _BORDER_RIGHT = 8, 12
_LINE_WIDTH, _SCORE_WIDTH, _INTERVAL_WIDTH = 1.8, 2, 1.5
#: How much of what lies behind a filled part does not show through it.
_PEAKS_ALPHA, _BAND_ALPHA, _INTERVAL_ALPHA, _CURSOR_ALPHA = 0.22, 0.1, 0.7, 0.6
_TICKS_ACROSS, _TICKS_UP = 6, 5
#: Powers of ten outside of which numbers of an axis are written with an exponent.
_SMALL_POWER, _LARGE_POWER = -4, 5
#: Parts of a range that stay free around what it shows: upwards, and around the spans and the lanes of the timeline.
_PADDING, _SPAN_PADDING, _LANE_PADDING = 0.08, 0.01, 0.1
_BAR_HEIGHT = 0.62
_TICKS: dict[Format, str] = {
    "share": "0.[0] %",
    "count": "0.[0]a",
    "number": "0.[000]",
    "scientific": "0.[00]e+0",
}


class Figures(NamedTuple):
    """The figures of one page."""

    #: Chart key, ``score``, ``score_sources`` or ``timeline`` -> its figure.
    by_key: dict[str, Any]
    #: Chart -> its curves, over all runs.
    curves: dict[str, list[Curve]]


def figures(runs: Sequence[tuple[str, Sequence[str]]], score_sources: Sequence[str] = ()) -> Figures:
    """Build all figures that have something to show.

    Args:
        runs: Name and curve names of each run.
        score_sources: Sources of a mixture that have a score of their own.
    """
    axis = Range1d(name="updates")
    cursor = Span(dimension="height", line_dash="dotted", line_alpha=_CURSOR_ALPHA, line_color="#888888")
    builder = _Builder([name for name, _ in runs], axis, cursor)
    by_key = {"score": builder.score()}
    if score_sources:
        by_key["score_sources"] = builder.score_by_source(score_sources)
    curves = {}
    for chart in CHARTS:
        found = list(dict.fromkeys(curve for _, names in runs for curve in curves_of(chart, names)))
        if found:
            curves[chart.key] = found
            by_key[chart.key] = builder.chart(chart, found)
    by_key["timeline"] = _timeline()
    return Figures(by_key, curves)


def colour_of(run: int, curve: int, runs: int) -> str:
    """Return the colour of a curve: of the run if there are several, else of the curve."""
    return COLOURS[(run if runs > 1 else curve) % len(COLOURS)]


def dash_of(curve: int, runs: int) -> str:
    """Return the dash of a curve."""
    return DASHES[curve % len(DASHES)] if runs > 1 else "solid"


class _Builder:
    """The figures over updates, which share their axis and their cursor.

    Each has sources of its own, so that the page fills only those that are seen.
    """

    def __init__(self, runs: Sequence[str], axis: Range1d, cursor: Span) -> None:
        self._runs = runs
        self._axis = axis
        self._cursor = cursor

    def chart(self, chart: Chart, curves: Sequence[Curve]) -> Any:
        plot = self._figure(chart.format, from_zero=chart.from_zero)
        for run in range(len(self._runs)):
            source = ColumnDataSource({"x": []}, name=f"{chart.key}-{run}")
            lines = []
            for index, curve in enumerate(curves):
                _declare(source, curve.name)
                colour = colour_of(run, index, len(self._runs))
                plot.varea(
                    "x",
                    f"{curve.name}|low",
                    f"{curve.name}|high",
                    source=source,
                    fill_color=colour,
                    fill_alpha=_PEAKS_ALPHA,
                )
                line = plot.line(
                    *("x", curve.name),
                    source=source,
                    line_color=colour,
                    line_width=_LINE_WIDTH,
                    line_dash=dash_of(index, len(self._runs)),
                    name=f"{run}|{curve.name}",
                )
                lines.append(line)
            if chart.band is not None:
                low, high = chart.band
                _declare(source, low)
                _declare(source, high)
                colour = colour_of(run, 0, len(self._runs))
                plot.varea("x", low, high, source=source, fill_color=colour, fill_alpha=_BAND_ALPHA)
            rows = [
                (curve.label or curve.name, f"@{{{curve.name}}}{{{_TICKS[chart.format]}}}")
                for curve in curves
            ]
            plot.add_tools(self._hover(run, lines[:1], [("update", "@x{0}"), *rows]))
        return plot

    def score(self) -> Any:
        """The held-out score with its 95 % intervals."""
        plot = self._figure("number")
        plot.height = _SCORE_HEIGHT
        for run in range(len(self._runs)):
            colour = colour_of(run, 0, len(self._runs))
            source = ColumnDataSource(
                {name: [] for name in ("update", "value", "low", "high", "checkpoint", "size")},
                name=f"score-{run}",
            )
            plot.varea("update", "low", "high", source=source, fill_color=colour, fill_alpha=_BAND_ALPHA)
            plot.segment(
                "update",
                "low",
                "update",
                "high",
                source=source,
                line_color=colour,
                line_width=_INTERVAL_WIDTH,
                line_alpha=_INTERVAL_ALPHA,
            )
            plot.line(
                "update",
                "value",
                source=source,
                line_color=colour,
                line_width=_SCORE_WIDTH,
                name=f"{run}|score",
            )
            dots = plot.scatter("update", "value", source=source, size="size", color=colour, line_color=None)
            rows = [
                ("checkpoint", "@checkpoint"),
                ("score", "@value{0.000}"),
                ("95 %", "@low{0.000} to @high{0.000}"),
            ]
            plot.add_tools(self._hover(run, [dots], rows))
        return plot

    def score_by_source(self, sources: Sequence[str]) -> Any:
        """The part of each source of a mixture in the score, with its interval."""
        plot = self._figure("number")
        for run in range(len(self._runs)):
            columns: dict[str, list[float]] = {
                "update": [],
                **{f"{name}{part}": [] for name in sources for part in ("", "|low", "|high")},
            }
            source = ColumnDataSource(columns, name=f"score_sources-{run}")
            lines = []
            for index, name in enumerate(sources):
                colour = colour_of(run, index, len(self._runs))
                plot.varea(
                    "update",
                    f"{name}|low",
                    f"{name}|high",
                    source=source,
                    fill_color=colour,
                    fill_alpha=_BAND_ALPHA,
                )
                lines.append(
                    plot.line(
                        *("update", name),
                        source=source,
                        line_color=colour,
                        line_width=_LINE_WIDTH,
                        line_dash=dash_of(index, len(self._runs)),
                        name=f"{run}|{name}",
                    )
                )
            rows = [("update", "@update{0}"), *((name, f"@{{{name}}}{{0.000}}") for name in sources)]
            plot.add_tools(self._hover(run, lines[:1], rows))
        return plot

    def _figure(self, form: Format, *, from_zero: bool = False) -> Any:
        # Nothing grows from 0 exactly: a curve at 0 must stay visible above the axis.
        vertical = DataRange1d(
            range_padding=_PADDING, only_visible=True, **({"bounds": (0, None)} if from_zero else {})
        )
        plot = _bare_figure(self._axis, vertical)
        plot.yaxis.ticker.desired_num_ticks = _TICKS_UP
        if form in ("share", "count"):
            plot.yaxis.formatter = NumeralTickFormatter(format=_TICKS[form])
        else:
            precision = 1 if form == "scientific" else "auto"
            plot.yaxis.formatter = BasicTickFormatter(
                power_limit_high=_LARGE_POWER, power_limit_low=_SMALL_POWER, precision=precision
            )
        plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
        plot.add_tools(CrosshairTool(overlay=self._cursor, dimensions="height"))
        if from_zero:
            vertical.start = 0
        return plot

    def _hover(self, run: int, renderers: Sequence[Any], rows: Sequence[tuple[str, str]]) -> HoverTool:
        named = (
            [("run", self._runs[run].replace("@", "＠").replace("$", "＄"))] if len(self._runs) > 1 else []
        )
        return HoverTool(renderers=list(renderers), mode="vline", tooltips=[*named, *rows], visible=False)


def _bare_figure(horizontal: Any, vertical: Any) -> Any:
    plot = figure(
        x_range=horizontal,
        y_range=vertical,
        height=_HEIGHT,
        sizing_mode="stretch_width",
        tools="xpan,xbox_zoom,xwheel_zoom,reset",
        active_drag="xbox_zoom",
        active_scroll=None,
        toolbar_location="above",
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
        min_border_left=_BORDER_LEFT,
        min_border_right=_BORDER_RIGHT,
        output_backend="canvas",
    )
    plot.toolbar_inner = True
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.xgrid.grid_line_color = None
    plot.axis.minor_tick_line_color = None
    plot.axis.major_tick_line_color = None
    plot.axis.axis_line_color = None
    plot.axis.major_label_text_font_size = "11px"
    plot.xaxis.ticker.desired_num_ticks = _TICKS_ACROSS
    return plot


def _timeline() -> Any:
    plot = _bare_figure(
        DataRange1d(range_padding=_SPAN_PADDING, name="seconds"),
        FactorRange(name="actors", range_padding=_LANE_PADDING),
    )
    columns = ("actor", "begin", "end", "doing", "what", "seconds", "colour")
    source = ColumnDataSource({name: [] for name in columns}, name="spans")
    bars = plot.hbar(
        y="actor",
        left="begin",
        right="end",
        height=_BAR_HEIGHT,
        source=source,
        color="colour",
        line_color=None,
    )
    plot.ygrid.grid_line_color = None
    plot.xaxis.formatter = NumeralTickFormatter(format="00:00:00")
    plot.add_tools(
        HoverTool(
            renderers=[bars],
            tooltips=[("", "@actor @doing @what"), ("for", "@seconds{0.00} s")],
            visible=False,
        )
    )
    return plot


def _declare(source: ColumnDataSource, name: str) -> None:
    for column in (name, f"{name}|low", f"{name}|high"):
        if column not in source.data:
            source.data[column] = []
