"""The figures of the page: which sources they read, and what tells the curves of several runs apart."""

import pytest

pytest.importorskip("bokeh", reason="needs the extra: pip install 'grpo-actors[page]'")

from bokeh.models import BasicTickFormatter, CrosshairTool, HoverTool, NumeralTickFormatter

from grpo_actors.page.charts import CHARTS, Chart, curves_of
from grpo_actors.page.figures import COLOURS, DASHES, colour_of, dash_of, figures

REWARD = ("reward_mean", "reward_low", "reward_high")
NAMES = (*REWARD, "loss", "learning_rate", "clip_share", "clip_high_share", "completion_length_max")
BOUNDS = ("", "|low", "|high")


def chart(key: str) -> Chart:
    return next(chart for chart in CHARTS if chart.key == key)


def glyphs(plot) -> list[tuple]:
    """Kind of each glyph, its source, and the columns that it reads upwards."""
    fields = {"VArea": ("y1", "y2"), "Line": ("y",), "Segment": ("y0", "y1"), "Scatter": ("y", "size")}
    return [
        (kind, r.data_source.name, *(getattr(r.glyph, name) for name in fields[kind]))
        for r in plot.renderers
        if (kind := type(r.glyph).__name__)
    ]


def hovers(plot) -> list[tuple[list[str], list[tuple[str, str]]]]:
    """Names of what each hover tool follows, and its rows."""
    return [([renderer.name for renderer in tool.renderers], tool.tooltips) for tool in hover_tools(plot)]


def hover_tools(plot) -> list[HoverTool]:
    return [tool for tool in plot.tools if isinstance(tool, HoverTool)]


@pytest.fixture(scope="module")
def one():
    return figures([("first", NAMES)])


@pytest.fixture(scope="module")
def two():
    return figures([("a@b$", NAMES), ("second", ("loss", "grad_norm"))], ("easy", "hard"))


def test_one_run_has_a_colour_for_each_curve_and_several_have_one_for_each_run_and_dashes():
    assert [colour_of(0, curve, 1) for curve in (0, 1, 8)] == [COLOURS[0], COLOURS[1], COLOURS[0]]
    assert [colour_of(run, 5, 2) for run in (0, 1)] == [COLOURS[0], COLOURS[1]]
    assert [dash_of(curve, 1) for curve in (0, 1)] == ["solid", "solid"]
    assert [dash_of(curve, 2) for curve in (0, 1, 4)] == [DASHES[0], DASHES[1], DASHES[0]]


def test_there_is_a_figure_for_each_chart_that_a_run_has_curves_of(one, two):
    assert list(one.by_key) == ["score", "reward", "length", "loss", "clip", "rate", "timeline"]
    assert one.curves["clip"] == [curve for curve in chart("clip").curves if curve.name in NAMES]
    assert list(one.curves) == ["reward", "length", "loss", "clip", "rate"]
    assert list(two.by_key) == [
        *("score", "score_sources", "reward", "length", "loss", "clip", "grad", "rate", "timeline")
    ]


def test_a_chart_draws_each_curve_with_its_peaks_and_the_band_of_the_first(one):
    assert glyphs(one.by_key["reward"]) == [
        ("VArea", "reward-0", "reward_mean|low", "reward_mean|high"),
        ("Line", "reward-0", "reward_mean"),
        ("VArea", "reward-0", "reward_low", "reward_high"),
    ]
    band = one.by_key["reward"].renderers[2]
    assert band.glyph.fill_color == COLOURS[0]
    source = band.data_source.data
    assert source == {"x": [], **{f"{name}{bound}": [] for name in REWARD for bound in BOUNDS}}
    assert [g[0] for g in glyphs(one.by_key["clip"])] == ["VArea", "Line"] * 2, "no band"
    assert [r.glyph.line_color for r in one.by_key["clip"].renderers[1::2]] == [COLOURS[0], COLOURS[1]]


def test_one_hover_of_each_run_shows_all_of_its_curves_and_several_runs_by_name(one, two):
    assert hovers(one.by_key["clip"]) == [
        (["0|clip_share"], [("update", "@x{0}"), ("all", "@{clip_share}{0.[0] %}"), ("above", "@{clip_high_share}{0.[0] %}")])
    ]  # fmt: skip
    # A sign that Bokeh reads as the name of a column is replaced.
    named = [[row for row in rows if row[0] == "run"] for _, rows in hovers(two.by_key["loss"])]
    assert named == [[("run", "a＠b＄")], [("run", "second")]]
    assert [follows for follows, _ in hovers(two.by_key["loss"])] == [["0|loss"], ["1|loss"]]


def test_curves_without_a_label_are_named_by_themselves():
    found = figures([("run", ("rewards/brevity", "memory/"))])
    assert hovers(found.by_key["rewards"])[0][1][1][0] == "brevity"
    assert hovers(found.by_key["memory"])[0][1][1][0] == "memory/"


def test_the_score_has_its_interval_as_area_and_bars_and_a_dot_for_each_checkpoint(one, two):
    drawn = [
        ("VArea", "low", "high"),
        ("Segment", "low", "high"),
        ("Line", "value"),
        ("Scatter", "value", "size"),
    ]
    assert glyphs(two.by_key["score"]) == [
        (kind, f"score-{run}", *columns) for run in (0, 1) for kind, *columns in drawn
    ]
    assert [r.glyph.line_color for r in two.by_key["score"].renderers if r.name] == list(COLOURS[:2])
    assert [r.glyph.line_color for r in one.by_key["score"].renderers if r.name] == [COLOURS[0]]
    dots = [r for r in two.by_key["score"].renderers if type(r.glyph).__name__ == "Scatter"]
    assert [tool.renderers for tool in hover_tools(two.by_key["score"])] == [[dot] for dot in dots]
    assert two.by_key["score"].height > two.by_key["loss"].height


def test_the_score_of_each_source_has_its_interval(two):
    plot = two.by_key["score_sources"]
    assert glyphs(plot)[:4] == [
        ("VArea", "score_sources-0", "easy|low", "easy|high"),
        ("Line", "score_sources-0", "easy"),
        ("VArea", "score_sources-0", "hard|low", "hard|high"),
        ("Line", "score_sources-0", "hard"),
    ]
    assert plot.renderers[0].data_source.data == {
        "update": [],
        **{f"{name}{bound}": [] for name in ("easy", "hard") for bound in BOUNDS},
    }
    assert [(follows, [row[0] for row in rows]) for follows, rows in hovers(plot)] == [
        (["0|easy"], ["run", "update", "easy", "hard"]),
        (["1|easy"], ["run", "update", "easy", "hard"]),
    ]


def test_all_figures_over_updates_share_their_axis_and_their_cursor(one):
    over_updates = [plot for key, plot in one.by_key.items() if key != "timeline"]
    assert {plot.x_range.name for plot in over_updates} == {"updates"}
    assert len({id(plot.x_range) for plot in over_updates}) == 1
    assert len({id(tool.overlay) for plot in over_updates for tool in plot.select(CrosshairTool)}) == 1
    assert all(len(plot.select(CrosshairTool)) == 1 for plot in over_updates)


def test_an_axis_that_has_0_neither_begins_elsewhere_nor_goes_below(one):
    from_zero = {key: plot.y_range for key, plot in one.by_key.items() if key in ("clip", "length")}
    assert {(axis.start, axis.bounds) for axis in from_zero.values()} == {(0, (0, None))}
    other = {key: plot.y_range for key, plot in one.by_key.items() if key in ("loss", "score", "reward")}
    assert {axis.bounds for axis in other.values()} == {None}
    assert all(axis.start != 0 for axis in other.values())
    # A curve that was hidden does not count.
    assert all(axis.only_visible for axis in (from_zero | other).values())


def test_an_axis_is_written_in_the_form_of_its_numbers(one):
    forms = {key: plot.yaxis[0].formatter for key, plot in one.by_key.items() if key != "timeline"}
    assert {key: form.format for key, form in forms.items() if isinstance(form, NumeralTickFormatter)} == {
        "clip": "0.[0] %",
        "length": "0.[0]a",
    }
    assert {key: form.precision for key, form in forms.items() if isinstance(form, BasicTickFormatter)} == {
        **dict.fromkeys(("score", "reward", "loss"), "auto"),
        "rate": 1,
    }


def test_figures_have_the_pages_background_and_tools_that_show_only_when_they_are_used(two):
    for plot in two.by_key.values():
        assert (plot.background_fill_alpha, plot.border_fill_alpha) == (0, 0)
        assert (plot.toolbar.autohide, plot.toolbar_inner) == (True, True)
        assert [tool.visible for tool in hover_tools(plot)].count(True) == 0


def test_the_timeline_has_a_bar_for_each_span_with_its_words(one):
    plot = one.by_key["timeline"]
    [bars] = plot.renderers
    assert (bars.glyph.y, bars.glyph.left, bars.glyph.right) == ("actor", "begin", "end")
    assert set(bars.data_source.data) == {"actor", "begin", "end", "doing", "what", "seconds", "colour"}
    [tool] = hover_tools(plot)
    assert tool.renderers == [bars]
    assert (plot.x_range.name, plot.y_range.name) == ("seconds", "actors")


def test_only_what_may_be_below_0_or_is_never_near_it_has_an_axis_without_0():
    without = {chart.key for chart in CHARTS if not chart.from_zero}
    assert without == {"reward", "rewards", "sources", "loss", "ratio", "rate"}


def test_a_star_stands_for_every_curve_of_that_beginning():
    found = curves_of(chart("rewards"), ["rewards/a", "reward_mean", "rewards/b"])
    assert [tuple(curve) for curve in found] == [("rewards/a", "a"), ("rewards/b", "b")]
    assert curves_of(chart("loss"), ["grad_norm"]) == []


@pytest.mark.parametrize(("workers", "shown"), [(0, 1), (1, 1), (2, 3)])
def test_with_one_worker_its_own_gap_is_the_mean(workers, shown):
    names = ["logprob_gap_mean", *(f"logprob_gaps/rollout-{worker}" for worker in range(workers))]
    assert [curve.name for curve in curves_of(chart("gap"), names)] == names[:shown]
    assert len(curves_of(chart("speed"), ["rollout_tokens_per_s", "learner_tokens_per_s"])) == 2
