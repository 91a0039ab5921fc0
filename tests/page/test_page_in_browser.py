"""The page in headless Chromium: a recorded run, a live one, several, and a report."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
import zmq
from bounds import HANG_S
from browser import Tab, browser, needs_browser
from recorded import RIGHT, RecordedRun, record_run
from test_page_command import served

from grpo_actors.transport.events import EventPublisher

pytestmark = needs_browser

#: The pixels of a chart that are not its background: a curve was drawn.
#: They are read from a copy: the browser warns of a canvas of the page that is read repeatedly.
PAINTED = """[...Bokeh.documents[0].roots()].map((root) => {
  const view = Bokeh.index.get_by_id(root.id), canvas = view.canvas_view.primary.canvas;
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  const pixels = copy.getImageData(0, 0, canvas.width, canvas.height).data;
  let painted = 0;
  for (let place = 3; place < pixels.length; place += 4) painted += pixels[place] > 0;
  return painted;
})"""


@pytest.fixture(scope="module")
def new_tab() -> Iterator[Callable[[], Tab]]:
    pytest.importorskip("websocket", reason="needs websocket-client")
    with browser() as new_tab:
        yield new_tab


@pytest.fixture
def tab(new_tab) -> Iterator[Tab]:
    tab = new_tab()
    tab.size(1400, 1000)
    yield tab
    tab.close()
    assert tab.errors == []


def test_a_recorded_run_shows_every_view(tab, tmp_path):
    with served(record_run(tmp_path / "run")) as (address, _):
        tab.size(1400, 6000)  # all charts are in sight
        tab.open(address)
        assert tab.evaluate("document.querySelector('.tile strong').textContent") == "0.40 → 0.80"
        charts = tab.evaluate("[...document.querySelectorAll('.chart')].map((chart) => chart.id.slice(6))")
        assert {"score", "reward", "rewards", "length", "truncated", "loss", "kl", "clip", "grad"} <= set(
            charts
        )
        assert {"entropy", "gap", "timeline", "waits", "memory"} <= set(charts)
        tab.wait(f"{PAINTED}.every((painted) => painted > 500)")
        assert "raise it" in tab.evaluate("document.querySelector('#alarm-list .cure').textContent")
        assert tab.evaluate("document.querySelector('#workers tbody').innerText").startswith("rollout-0")
        # Nothing but this address was asked for, and what is in the page itself.
        assert {urlsplit(request).netloc for request in tab.requests} <= {urlsplit(address).netloc, ""}
        assert all(request.startswith((address, "data:")) for request in tab.requests)


def test_samples_are_read_filtered_coloured_and_turned_over_by_keyboard(tab, tmp_path):
    with served(record_run(tmp_path / "run")) as (address, _):
        tab.open(address)
        texts = tab.evaluate("[...document.querySelectorAll('#group .text')].map((text) => text.textContent)")
        assert (len(texts), texts[0]) == (4, RIGHT)
        assert (
            tab.evaluate("document.querySelector('#group .environment').textContent")
            == "<|user|>Use the tags.<|end|><|assistant|>"
        )
        assert tab.evaluate("document.querySelector('#group .advantage').textContent") == "A +0.86"
        assert tab.evaluate("document.querySelectorAll('#group .tag').length") == 1
        title = "document.querySelector('#group h3').firstChild.textContent"
        assert tab.evaluate(title) == "add-40-1"
        tab.press("j")
        tab.wait(f"{title} === 'add-40-0'")
        tab.evaluate(
            "(() => { const filter = document.getElementById('filter').elements; filter.update_max.value = 7; filter.reward_max.value = 0.1;"
            " filter.update_max.dispatchEvent(new Event('input', { bubbles: true })) })()"
        )
        tab.wait("document.getElementById('found').textContent === '14 of 80 groups'")
        tab.wait(f"{title} === 'add-7-1'")
        assert tab.evaluate(
            "[...document.querySelectorAll('.completion')].map((one) => one.classList.contains('dim'))"
        ) == [True, True, True, False]
        for colour, begins in (("logprob", "log-prob"), ("ratio", "log-ratio")):
            tab.evaluate(
                f"(() => {{ const colour = document.getElementById('colour'); colour.value = '{colour}'; colour.dispatchEvent(new Event('input', {{ bubbles: true }})) }})()"
            )
            # One element for each sampled token, and one for the environment's tokens.
            assert (
                tab.evaluate(
                    f"document.querySelectorAll('.completion')[1].querySelectorAll('[title^=\"{begins}\"]').length"
                )
                == 15
            )
        assert tab.evaluate(
            "document.querySelectorAll('.completion')[1].querySelector('.text').textContent"
        ).endswith(RIGHT)


def test_a_live_run_is_on_the_screen_within_a_second(tab, tmp_path):
    with zmq.Context() as context, EventPublisher(context, f"ipc://{tmp_path}/e") as publisher:
        run = RecordedRun(tmp_path / "live", publish=publisher.publish)
        (run.folder / "endpoints.json").write_text(
            f'{{"control": "", "weights": "", "events": "{publisher.endpoint}", "pid": {os.getpid()}}}'
        )
        run.update(1)
        with served(run.folder) as (address, _):
            tab.open(address)
            assert tab.evaluate("document.getElementById('state').textContent") == "running"
            shown = "document.querySelectorAll('.tile strong')[2].textContent"
            delays_s = []
            for update in range(2, 12):
                run.update(update)
                delays_s.append(
                    tab.evaluate(
                        f"new Promise((shown) => {{ const begin = performance.now(); const look = () => {shown} === '{update} / 40'"
                        " ? shown((performance.now() - begin) / 1000) : setTimeout(look, 10); look(); })"
                    )
                )
            # The median: on a busy machine a single one may take longer.
            assert sorted(delays_s)[len(delays_s) // 2] < 1, delays_s
            run.alarm(11)
            tab.wait("document.querySelector('#newest-alarm .cure') !== null")
            run.stop()
            tab.wait("document.getElementById('state').textContent === 'ended'")
        run.close()
        tab.wait("!document.getElementById('offline').hidden")


@pytest.mark.slow
def test_several_runs_are_overlaid_and_their_differing_settings_listed(tab, tmp_path):
    runs = [
        record_run(tmp_path / "one", updates=10),
        record_run(tmp_path / "two", updates=20, learning_rate=1e-3),
    ]
    with served(*runs) as (address, _):
        tab.open(address)
        assert tab.evaluate(
            "[...document.querySelectorAll('#summary tbody th')].map((cell) => cell.textContent)"
        ) == ["one", "two"]
        rows = tab.evaluate(
            "[...document.querySelectorAll('#settings tbody tr')].map((row) => row.innerText.split('\\t'))"
        )
        assert rows == [["learner.learning_rate", "0.0002", "0.001"]]
        lengths = "[0, 1].map((run) => Bokeh.documents[0].get_model_by_name(`reward-${run}`).data.x.length)"
        tab.wait(f"{lengths}.join() === '10,20'")


@pytest.mark.slow
def test_zooming_by_keyboard_loads_more_detail(tab, tmp_path):
    with served(record_run(tmp_path / "run", updates=500, groups=False)) as (address, _):
        tab.open(address)
        width = "Bokeh.documents[0].get_model_by_name('reward-0').data.x"
        # 500 updates in at most 400 points: buckets of 2.
        tab.wait(f"{width}.length === 250")
        tab.press("+")
        tab.wait(f"{width}.length > 200 && {width}[1] - {width}[0] === 1")
        tab.press("0")
        tab.wait(f"{width}.length === 250")


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_a_phone_and_follows_the_theme(new_tab, tmp_path, dark):
    tab = new_tab()
    tab.dark(on=dark)
    tab.size(390, 844, phone=True)
    with served(record_run(tmp_path / "run", updates=3)) as (address, _):
        tab.open(address)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        brightness = tab.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
        )
        assert (brightness < 60) is dark
        tab.evaluate("document.getElementById('theme').click()")
        after = tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
        assert (after < 60) is not dark
    tab.close()
    assert tab.errors == []


def test_a_report_shows_the_same_views_from_one_file_without_any_request(tab, tmp_path):
    folder = record_run(tmp_path / "run")
    file = tmp_path / "report.html"
    command = [sys.executable, "-m", "grpo_actors.report", str(folder), "--output", str(file)]
    subprocess.run(command, check=True, timeout=HANG_S)
    tab.size(1400, 6000)
    tab.open(file.as_uri())
    assert all(request.startswith(("data:", file.as_uri())) for request in tab.requests)
    tab.wait(f"{PAINTED}.every((painted) => painted > 500)")
    assert tab.evaluate("document.querySelector('#group .text').textContent") == RIGHT
    tab.evaluate(
        "(() => { const filter = document.getElementById('filter').elements; filter.update_max.value = 7; filter.reward_max.value = 0.1;"
        " filter.update_max.dispatchEvent(new Event('input', { bubbles: true })) })()"
    )
    tab.wait("document.getElementById('found').textContent === '14 of 80 groups'")
