"""The report that a run leaves behind: prepared with the last update, written when it is told, never a failure of the run."""

import os
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("bokeh", reason="needs the extra: pip install 'grpo-actors[page]'")
sys.path.append(str(Path(__file__).parents[1] / "page"))

from recorded import record_run

from grpo_actors.config import Config
from grpo_actors.supervisor import closing_report
from grpo_actors.supervisor.closing_report import ClosingReport


def metrics(update, total=3):
    return {"topic": "metrics", "update": update, "total_updates": total}


def test_it_is_written_after_the_last_update_from_what_is_there_when_it_is_told(run_dir):
    with ClosingReport(run_dir, Config()) as report:
        report.handle_record(metrics(3))
        record_run(run_dir, updates=3)  # no run is there while it prepares
        assert report.write() == f"report: {run_dir / 'report.html'}"
    page = (run_dir / "report.html").read_text()
    assert "add-3-1" in page
    assert str(run_dir.parent) not in page


def test_a_run_that_goes_on_has_none_and_one_that_cannot_be_written_is_one_line(run_dir):
    with ClosingReport(run_dir, Config()) as report:
        for record in (metrics(2), metrics(None), metrics(3, None), metrics(3) | {"topic": "eval"}):
            report.handle_record(record)
        assert report.write() is None
        report.handle_record({"topic": "stop"})
        line = report.write()
    assert line is not None
    assert line.startswith("no report: ")
    assert "has no metrics.jsonl" in line


@pytest.mark.parametrize("off", ["write_report", "log_jsonl"])
def test_settings_turn_it_off(run_dir, off):
    config = Config.model_validate({"metrics": {off: False}})
    with ClosingReport(run_dir, config) as report:
        report.prepare()
        assert report.write() is None


def test_a_report_that_is_not_there_in_time_is_done_without(run_dir, monkeypatch):
    monkeypatch.setattr(closing_report, "PATIENCE_S", 0.0)
    with ClosingReport(run_dir, Config()) as report:
        report.prepare()
        first = report._process
        report.prepare()
        assert report._process is first
        assert os.getsid(first.pid) == first.pid, "Ctrl-C is for the run"
        assert report.write() == "no report: it took more than 0 s"
    assert first.returncode == -signal.SIGKILL


def test_a_report_whose_process_was_killed_is_done_without(run_dir):
    with ClosingReport(run_dir, Config()) as report:
        report.prepare()
        report._process.kill()
        assert report.write() == "no report: its process was killed"
