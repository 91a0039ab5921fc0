import errno
import os
import shutil
import threading
from pathlib import Path

import pytest

from grpo_actors.config import load_config
from grpo_actors.config.wording import toml_value
from grpo_actors.errors import DataError
from grpo_actors.supervisor.pipes import without_pipes

LINES = b'{"question": "a"}\n{"question": "b"}\n'


def pipe(path):
    """Make a pipe into which a thread writes once."""
    os.mkfifo(path)
    threading.Thread(target=path.write_bytes, args=(LINES,), daemon=True).start()
    return str(path)


def test_what_comes_through_a_pipe_may_be_read_as_often_as_wanted_until_the_run_ends(tmp_path):
    first, second = pipe(tmp_path / "first"), pipe(tmp_path / "second")
    sources = [{"name": "a", "path": second}, {"name": "b", "path": "other.csv"}]
    given = [
        "task=dataset",
        f"path={first}",
        f"sources={toml_value(sources)}",
        "functions={ xml_count = 1.0 }",
    ]
    config = load_config(None, given).config
    with without_pipes(config) as filed:
        files = [Path(filed.data.path), Path(filed.data.sources[0].path)]
        for file in files:
            assert file.suffix == ".jsonl"
            assert [file.read_bytes() for _ in range(3)] == [LINES] * 3
        assert filed.data.sources[1] == config.data.sources[1]
        assert filed.model_copy(update={"data": config.data}) == config
    assert not any(file.exists() for file in files)


def test_settings_without_a_pipe_stay_as_they_are():
    config = load_config(None, ["task=dataset", "path=data.csv"]).config
    with without_pipes(config) as same:
        assert same == config


def test_a_pipe_that_breaks_off_is_one_line(tmp_path, monkeypatch):
    def breaks(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(shutil, "copyfileobj", breaks)
    path = pipe(tmp_path / "data")
    config = load_config(None, ["task=dataset", f"path={path}"]).config
    with (
        pytest.raises(DataError, match=f"^{path}: cannot be read: Input/output error; check data.path$"),
        without_pipes(config),
    ):
        pass
