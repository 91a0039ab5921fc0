"""The report: one file, small, without personal paths."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from bounds import HANG_S
from commands import run_here

pytest.importorskip("bokeh", reason="needs the extra: pip install 'grpo-actors[page]'")
sys.path.append(str(Path(__file__).parents[1] / "page"))

from recorded import RecordedRun, record_run

from grpo_actors.errors import RunError
from grpo_actors.page import extra
from grpo_actors.page.curves import Curves
from grpo_actors.page.views import packed
from grpo_actors.report import writing
from grpo_actors.report.__main__ import main
from grpo_actors.report.privacy import Privacy
from grpo_actors.report.writing import MAX_BYTES, build_report, spread


def test_a_report_is_one_small_file_in_the_run_folder(run_dir):
    command = [sys.executable, "-m", "grpo_actors.report", str(record_run(run_dir))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    file = run_dir / "report.html"
    text = file.read_text()
    size = len(text.encode())
    assert size < MAX_BYTES
    assert done.stdout == f"{file} ({size / 1e6:.1f} MB)\n"
    # Scripts and styles are inside.
    assert "<script src" not in text
    assert '<link rel="stylesheet"' not in text


def test_the_curves_are_in_the_report_unchanged(run_dir):
    curves = Curves()
    for update in range(1, 41):
        curves.append(update, {"loss": 0.01 * math.sin(update)})  # as recorded
    packed_loss = packed(curves.sampled(400).curves["loss"].mean)
    assert "/" in packed_loss  # a slash that is no path
    assert packed_loss in build_report(record_run(run_dir))


def test_the_rewards_in_the_report_are_weighed_as_the_run_weighed_them(run_dir):
    # Functions with the weights 1 and 0.2: right, right, wrong in the right form, neither.
    assert '"rewards":[1.2,1.2,0.2,0.0]' in build_report(record_run(run_dir, updates=1))


def test_a_report_beyond_the_bound_is_refused_and_not_written(run_dir, monkeypatch):
    folder, file = record_run(run_dir), run_dir / "report.html"
    size = len(build_report(folder).encode())
    monkeypatch.setattr(writing, "MAX_BYTES", size - 1)
    with pytest.raises(RunError, match=f"would have {size:,} bytes, more than {size - 1:,}"):
        writing.write_report(folder, file)
    assert not file.exists()
    monkeypatch.setattr(writing, "MAX_BYTES", size)
    assert writing.write_report(folder, file) == file.stat().st_size == size


def test_a_report_of_many_large_groups_stays_small(run_dir):
    run = RecordedRun(run_dir, planned=600)
    for update in range(1, 601):
        run.update(update)
    long = {"text": "word " * 4000, "reward": 1.0, "rewards": {}, "truncated": False}
    for update in range(601, 1001):
        run.journal.append(
            "sample", {"update": update, "problem": "p", "prompt": "?", "answer": "", "completions": [long]}
        )
    run.close()
    (run_dir / "groups.jsonl").unlink()
    assert run_here(main, run_dir).returncode == 0
    assert 2_000_000 < (run_dir / "report.html").stat().st_size < MAX_BYTES


def test_samples_are_listed_newest_first_and_with_how_many_there_are_if_some_are_left_out(
    run_dir, monkeypatch
):
    folder = record_run(run_dir, 3)
    whole = writing._samples(folder, None)
    assert [one["id"] for one in whole["groups"]] == [5, 4, 3, 2, 1, 0]
    assert whole["of"] is None
    monkeypatch.setattr(writing, "MOST_GROUPS", 2)
    some = writing._samples(folder, None)
    # Those at the ends come first.
    assert ([one["id"] for one in some["groups"]], some["of"]) == ([5, 0], 6)


def test_samples_are_taken_until_their_bytes_are_used_up(run_dir, monkeypatch):
    folder = record_run(run_dir, 3)
    [first, second, *_] = writing._samples(folder, None)["contents"].values()
    room = sum(len(json.dumps(group, separators=(",", ":"))) for group in (first, second))
    for size, taken in ((room, 2), (room - 1, 1)):
        monkeypatch.setattr(writing, "SAMPLE_BYTES", size)
        assert len(writing._samples(folder, None)["contents"]) == taken


def test_a_report_names_no_personal_path(tmp_path):
    folder = tmp_path / "wilhelmina-secret" / "run"
    run = RecordedRun(folder, task="dataset", path="/home/wilhelmina/data/problems.jsonl")
    run.update(1)
    run.journal.append(
        "log", {"level": "warning", "text": f"{folder}/x: broken; see /home/wilhelmina/notes/why.txt"}
    )
    run.close()
    assert run_here(main, folder).returncode == 0
    text = (folder / "report.html").read_text()
    assert "wilhelmina" not in text
    assert "…/problems.jsonl" in text or "\\u2026/problems.jsonl" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/team/x.jsonl: line 3", "…/x.jsonl: line 3"),
        ("see ~/runs/a/b", "see …/b"),
        ("C:\\Users\\alice\\x.txt", "…/x.txt"),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("https://host/a/b", "https://host/a/b"),
        ("<answer>1/2</answer>", "<answer>1/2</answer>"),
        ("learner/rollout 3/4", "learner/rollout 3/4"),
        ("/home/bob/x", "~/x"),
    ],
)
def test_paths_keep_only_their_last_part(text, expected):
    assert Privacy(Path("/home/bob"), []).without_paths(text) == expected


def test_what_a_model_wrote_loses_only_this_hosts_places():
    privacy = Privacy(Path("/home/bob"), [Path("/home/bob/runs/a")])
    assert privacy.without_places(["/home/bob/runs/a/x", "/etc/os-release/y", 3]) == [
        "…/x",
        "/etc/os-release/y",
        3,
    ]


def test_a_home_that_is_no_folder_of_its_own_is_no_place():
    assert Privacy(Path("/"), []).without_places("a/b") == "a/b"
    assert Privacy(Path("/r"), []).without_places("/r/x") == "~/x"


def test_samples_are_spread_over_the_run():
    assert list(spread(5)) == [4, 0, 2, 3, 1]
    assert sorted(spread(100)) == list(range(100))
    assert list(spread(1)) == [0]
    assert list(spread(0)) == []


def test_a_run_that_ends_gets_a_report_of_all_that_it_has_recorded_when_it_is_told(run_dir, monkeypatch):
    class Caller:
        """Standard input: it ends when the run has ended, which has recorded nothing before."""

        @staticmethod
        def read():
            record_run(run_dir)

    monkeypatch.setattr(sys, "stdin", Caller)
    done = run_here(main, run_dir, "--when-told", "--output", run_dir.parent / "own.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert "checkpoint-40" in (run_dir.parent / "own.html").read_text()
    assert not (run_dir / "report.html").exists()


def test_a_report_that_cannot_be_written_is_one_line(run_dir):
    file = run_dir / "absent" / "own.html"
    done = run_here(main, record_run(run_dir, 1), "--output", file)
    told = f"error: {file}: cannot be written (No such file or directory); choose another --output\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_without_the_packages_of_the_page_the_command_that_installs_them_is_told(run_dir, monkeypatch):
    monkeypatch.setattr(extra, "PACKAGES", ("bokeh", "no_such_package"))
    done = run_here(main, run_dir)
    told = "error: the page needs no_such_package: pip install 'grpo-actors[page]'\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_a_folder_without_a_run_is_one_line(tmp_path):
    done = run_here(main, tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "has no metrics.jsonl" in done.stderr
