"""The supervisor's display of the stage that compiles kernels, and that it stops no run."""

import io
import re
from pathlib import Path

import pytest

from grpo_actors.config import Config
from grpo_actors.kernels.stage import Stage
from grpo_actors.observe.status import StatusLine
from grpo_actors.supervisor.compiling import compile_kernels

#: Two parts fail for one reason, one for another.
PROGRAM = (
    "-c",
    "import sys; print('details'); sys.exit({'head': 'no head', 'body': 'no memory', 'step': 'no memory'}.get(sys.argv[1]))",
)


def output_of(stage: Stage | None, gives_up=lambda: False) -> list[str]:
    stream = io.StringIO()
    with StatusLine(None, stream, clock=lambda: 0.0) as status:  # progress is shown once
        compile_kernels(stage, status, gives_up=gives_up)
    return stream.getvalue().splitlines()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_reason_for_a_failure_leaves_one_line_and_the_next_run_does_not_try_again(cache):
    stage = Stage(Config(), cache, cache / "x.done", PROGRAM)
    progress, *lines = output_of(stage)
    assert progress == "compiling kernels for this GPU: 0 of about 45"
    assert sorted(lines) == [
        "kernels for body, step: compiled when they are needed (no memory)",
        "kernels for head: compiled when they are needed (no head)",
    ]
    assert output_of(stage) == []


def test_a_cache_that_cannot_be_written_leaves_one_line(cache):
    cache.write_text("a file")
    [line] = output_of(Stage(Config(), cache, cache / "x.done", PROGRAM))
    assert line.startswith("kernels for all parts: compiled when they are needed (")


def test_where_mlx_compiles_no_kernels_nothing_is_shown():
    assert output_of(None) == []


#: The first part compiles a kernel; the others do nothing, for as many seconds as PAUSE_S says.
COMPILES = (
    "-c",
    """
import os, sys, time
from pathlib import Path
if sys.argv[1] != "body":
    time.sleep(float(os.environ["PAUSE_S"]))
    sys.exit()
for suffix in (".ptx", ".txt", ".cu"):
    Path(os.environ["MLX_PTX_CACHE_DIR"], "Add" + suffix).write_text("kernel")
""",
)


def test_the_number_of_compiled_kernels_is_told_unless_the_user_has_given_up(cache, monkeypatch):
    stage = Stage(Config(), cache, cache / "x.done", COMPILES)
    monkeypatch.setenv("PAUSE_S", "600")
    assert [line for line in output_of(stage, lambda: any(cache.glob("*.ptx"))) if "compiled" in line] == []
    (cache / "Add.ptx").unlink()
    monkeypatch.setenv("PAUSE_S", "0")
    *_, line = output_of(stage)
    assert re.fullmatch(r"compiled 1 kernels in \d s, once for this GPU and these settings", line)


def test_what_the_stage_shows_ends_with_it(cache, monkeypatch):
    shown = []
    monkeypatch.setattr(StatusLine, "show_preparation", lambda _, text: shown.append(text))
    output_of(Stage(Config(), cache, cache / "x.done", ("-c", "")))
    assert shown[0] == "compiling kernels for this GPU: 0 of about 45"
    assert shown[-1] == ""
