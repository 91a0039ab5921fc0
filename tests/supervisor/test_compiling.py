"""The supervisor's display of the stage that compiles kernels, and that it stops no run."""

import io
from pathlib import Path

import pytest

from grpo_actors.config import Config
from grpo_actors.kernels.stage import Stage
from grpo_actors.observe.status import StatusLine
from grpo_actors.supervisor.compiling import compile_kernels

#: Each part fails.
PROGRAM = ("-c", "import sys; print('details'); sys.exit(f'no {sys.argv[1]} here')")


def output_of(stage: Stage | None) -> list[str]:
    stream = io.StringIO()
    with StatusLine(None, stream, clock=lambda: 0.0) as status:  # progress is shown once
        compile_kernels(stage, status, gives_up=lambda: False)
    return stream.getvalue().splitlines()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_part_that_fails_leaves_one_line_and_the_next_run_does_not_try_again(cache):
    stage = Stage(Config(), cache, cache / "x.done", PROGRAM)
    lines = output_of(stage)
    assert lines[0] == "compiling kernels for this GPU: 0 of about 40"
    assert "kernels for head are compiled when they are needed (no head here)" in lines
    assert sum("here)" in line for line in lines) == len(lines) - 1 == 9
    assert output_of(stage) == []


def test_a_cache_that_cannot_be_written_leaves_one_line(cache):
    cache.write_text("a file")
    [line] = output_of(Stage(Config(), cache, cache / "x.done", PROGRAM))
    assert line.startswith("kernels are compiled when they are needed (")


def test_where_mlx_compiles_no_kernels_nothing_is_shown():
    assert output_of(None) == []
