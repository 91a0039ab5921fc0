"""The plot shows accuracies in per cent with their intervals, by run or by candidate."""

from pathlib import Path

import pytest

from grpo_actors.errors import ConfigError
from grpo_actors.evaluator.comparison.picture import LINES, check_picture, draw
from grpo_actors.evaluator.comparison.result import Completions, Result, Sampled
from grpo_actors.score import Estimate

COMPLETIONS = Completions(3.0, 0.0, {})


def estimate(value: float) -> Estimate:
    return Estimate(value=value, low=value - 0.1, high=value + 0.2)


def result(name: str, value: float, run: str | None = None, update: int | None = None, k: int = 0) -> Result:
    passed = {1: estimate(value), k: estimate(0.75)}
    sampled = Sampled(k, 1.0, estimate(value / 2), estimate(value), passed, COMPLETIONS)
    return Result(name, run, update, 12, estimate(value), COMPLETIONS, sampled if k else None, 1.0)


@pytest.fixture
def drawn(monkeypatch):
    """Draw results; return the axes as matplotlib holds them."""
    figure = pytest.importorskip("matplotlib.figure")

    def axes_of(*results: Result):
        made = []
        monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: made.append(self.axes[0]))
        draw(results, Path("unwritten"), ".svg")
        return made[0]

    return axes_of


def labels(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_candidates_of_no_run_are_points_with_error_bars(drawn):
    axes = drawn(result("base", 0.5, k=4), result("other", 0.25, k=4))
    assert labels(axes) == ["greedy", "avg@4", "maj@4", "pass@4"]
    points, _, (bars,) = axes.containers[0]
    assert points.get_xydata().tolist() == [[0, 50], [1, 25]]
    # From 10 below to 20 above.
    assert [bar[:, 1].round(6).tolist() for bar in bars.get_segments()] == [[40, 70], [15, 45]]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["base", "other"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("", "held-out accuracy, %")
    assert axes.get_title() == "12 problems, 95 % intervals"


def test_one_sample_a_problem_has_one_figure(drawn):
    assert labels(drawn(result("base", 0.5, k=1))) == ["greedy", "avg@1"]


def test_a_run_is_a_curve_over_its_updates_with_a_band(drawn):
    axes = drawn(result("b", 0.5, "r", 8), result("a", 0.25, "r", 4), result("base", 0.125))
    curve, level = axes.get_lines()
    assert curve.get_xydata().tolist() == [[4, 25], [8, 50]]
    assert curve.get_linestyle() == LINES[0]
    (band,) = axes.collections
    assert {tuple(corner) for corner in band.get_paths()[0].vertices.round(6)} >= {
        *((4, 15), (4, 45), (8, 40), (8, 70))
    }
    assert list(level.get_ydata()) == [12.5, 12.5]
    assert labels(axes) == ["greedy", "greedy, base"]
    assert axes.get_xlabel() == "update"


def test_several_runs_are_named_and_have_lines_of_their_own(drawn):
    runs = [f"r{number}" for number in range(5)]
    axes = drawn(*(result("a", 0.5, run, 4) for run in runs))
    assert labels(axes) == [f"greedy, {run}" for run in runs]
    assert [line.get_linestyle() for line in axes.get_lines()] == [*LINES, LINES[0]]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_file_has_the_format_that_was_asked_for(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    check_picture(tmp_path / f"plot{suffix}")
    draw([result("base", 0.5)], tmp_path / "plot.tmp", suffix)
    assert (tmp_path / "plot.tmp").read_bytes().startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


def test_another_format_is_refused_before_anything_is_computed():
    with pytest.raises(ConfigError, match=r"--plot: must end in \.png or \.svg, got plot\.pdf"):
        check_picture(Path("plot.pdf"))
