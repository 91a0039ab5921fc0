"""The HTML of the page: texts of a run are never markup, and charts are those that its curves need."""

import json
import re
from typing import Any

import pytest

pytest.importorskip("bokeh", reason="needs the extra: pip install 'grpo-actors[page]'")

from grpo_actors.observe.records import make_record
from grpo_actors.page.document import STATIC, ShownRun, live_page, shape_of, whole_page
from grpo_actors.page.figures import COLOURS
from grpo_actors.page.run_state import RunState

EVIL = "</script><!--<b>&"


def run(name: str = "one", *, config: dict[str, Any] | None = None, **metrics: Any) -> ShownRun:
    state = RunState()
    if config is not None:
        state.apply(make_record(1, 1.0, "start", {"config": config}))
    state.apply(make_record(2, 2.0, "metrics", {"update": 1, "loss": 0.5, **metrics}))
    return ShownRun(name, state)


def meta(page: str) -> dict[str, Any]:
    [text] = re.findall(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def settings(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr><th scope=row>(.*?)</tr>", page)
    return [re.split(r"</th><td>|</td><td>", row.removesuffix("</td>")) for row in rows]


def test_a_page_has_a_card_for_each_chart_with_a_key_for_each_curve():
    page = live_page([run(clip_share=0.1, clip_high_share=0.1)])
    charts = re.findall(r'id="chart-(\w+)"', page)
    assert [name for name in charts if name not in ("score", "timeline")] == ["loss", "clip"]
    assert re.findall(r'data-curve="([^"]*)"', page) == ["loss", "clip_share", "clip_high_share"]
    keys = re.findall(r'<i class="(\w+)" style="--c:([^"]*)"></i>(\w+) <b>', page)
    assert keys == [
        ("solid", COLOURS[0], "loss"),
        ("solid", COLOURS[0], "all"),
        ("solid", COLOURS[1], "above"),
    ]
    ids = set(re.findall(r'class="plot" id="([^"]+)"', page))
    assert len(ids) == 4, "the score, two charts, the timeline"
    data = meta(page)
    assert data["live"] is True
    assert data["embedded"] is None
    assert data["runs"] == [{"name": "one", "colour": COLOURS[0]}]


def test_several_runs_have_a_colour_each_and_keys_without_one():
    page = live_page([run("one", clip_share=0.1), run("two", clip_high_share=0.1)])
    assert [one["colour"] for one in meta(page)["runs"]] == [COLOURS[0], COLOURS[1]]
    keys = re.findall(r'<i class="(\w+)" style="--c:([^"]*)"></i>(\w+) <b>', page)
    assert keys == [("solid", "currentColor", name) for name in ("loss", "all")] + [
        ("dashed", "currentColor", "above")
    ]
    assert "<title>one · two" in page
    assert re.findall(r'class="(single|several)"', page) == ["several"]
    assert re.findall(r'class="(single|several)"', live_page([run()])) == ["single"]
    assert 'data-curve="rewards/a&quot;b"' in live_page([run(rewards={'a"b': 1.0})])


def test_names_and_settings_of_a_run_are_no_markup():
    config = {"data": {"path": EVIL, "task": "ü"}}
    page = live_page([run(EVIL, config=config, rewards={EVIL: 1.0})])
    assert EVIL not in page
    assert "<b>&" not in page
    assert settings(page) == [["data.path", "&lt;/script&gt;&lt;!--&lt;b&gt;&amp;"], ["data.task", "ü"]]
    assert meta(page)["runs"][0]["name"] == EVIL


def test_the_settings_of_one_run_are_listed_by_section():
    config = {"run": {"seed": 1}, "data": {"task": "x", "path": None}, "runner": {"a": [1, "ü"]}}
    page = live_page([run(config=config)])
    assert re.findall(r"<details><summary>([a-z]+)</summary>", page) == ["run", "data", "runner"]
    assert settings(page) == [
        ["run.seed", "1"],
        ["data.task", "x"],
        ["data.path", "null"],
        ["runner.a", "[1, &quot;ü&quot;]"],
    ]
    assert "None recorded yet." in live_page([run()])


def test_of_several_runs_only_the_settings_that_differ_are_listed():
    one, other = ({"data": {"task": task, "n": 1}} for task in "ab")
    page = live_page([run("one", config=one), run("two", config=other)])
    assert settings(page) == [["data.task", "a", "b"]]
    assert "<th scope=col>one</th><th scope=col>two</th>" in page
    assert "All settings are equal." in live_page([run("one", config=one), run("two", config=one)])


def test_the_shape_changes_with_the_charts_the_sources_and_the_settings():
    shapes = [
        shape_of([run()]),
        shape_of([run(config={})]),
        shape_of([run(kl=0.5)]),
        shape_of([run(), run()]),
    ]
    scored = run()
    scored.state.apply(make_record(3, 3.0, "eval", {"update": 1, "by_source": {"easy": {"value": 1}}}))
    assert len({*shapes, shape_of([scored])}) == 5
    assert shape_of([run(memory_total=3)]) == shapes[0], "no chart shows it"


def test_a_mixture_has_a_chart_of_the_score_of_each_source():
    assert "chart-score_sources" not in live_page([run()])
    scored = run()
    scored.state.apply(make_record(3, 3.0, "eval", {"update": 1, "by_source": {"easy": {"value": 1}}}))
    page = live_page([scored, run("two")])
    assert page.count('id="chart-score_sources"') == 1
    assert len(set(re.findall(r'class="plot" id="([^"]+)"', page))) == 4


def test_a_page_in_one_file_names_no_other_file_and_holds_what_a_server_would_answer():
    page = whole_page(run(), {"views": [1], "samples": {"text": EVIL}})
    assert not re.search(r"<script src|<link [^>]*page.css", page)
    assert "default-src 'none'" in page
    assert EVIL not in page
    data = meta(page)
    assert (STATIC / "page.js").read_text()[:500] in page
    with pytest.raises(ValueError, match="not JSON compliant"):  # no browser could read it
        whole_page(run(), {"views": [float("nan")]})
    assert (data["live"], data["embedded"]) == (False, {"views": [1], "samples": {"text": EVIL}})
