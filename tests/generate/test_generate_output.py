"""The file of results: only complete lines, and only of one batch."""

import pytest

from grpo_actors.errors import ConfigError, RunError
from grpo_actors.generate.output import Output, check_resumable, job_file

SETTINGS = {"input": "abc", "temperature": 0.7, "seed": 0}
RECORDS = [{"index": 0, "sample": 0, "completion": "é"}, {"index": 2, "sample": 1, "completion": "b"}]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.jsonl"


def begun(path):
    with Output(path, SETTINGS) as output:
        assert not output.mended
        output.write(RECORDS)
    return path.read_bytes()


def test_completions_in_the_file_are_done(path):
    written = begun(path)
    with Output(path, SETTINGS) as output:
        assert output.done == {(0, 0), (2, 1)}
        assert not output.mended
    assert (
        path.read_bytes()
        == written
        == '{"index": 0, "sample": 0, "completion": "é"}\n'.encode()
        + (b'{"index": 2, "sample": 1, "completion": "b"}\n')
    )


def test_a_line_that_was_cut_is_dropped_and_no_other(path):
    written = begun(path)
    path.write_bytes(written[:-5])
    with Output(path, SETTINGS) as output:
        assert output.done == {(0, 0)}
        assert output.mended
        output.write(RECORDS[1:])
    assert path.read_bytes() == written


@pytest.mark.parametrize("name", SETTINGS)
def test_another_input_or_setting_is_refused_and_nothing_is_touched(path, name):
    written = begun(path)
    job = job_file(path).read_bytes()
    for refuse in (check_resumable, Output):
        with pytest.raises(ConfigError, match=rf"was begun with {name} = .* got 'other'; give the same"):
            refuse(path, SETTINGS | {name: "other"})
    assert (path.read_bytes(), job_file(path).read_bytes()) == (written, job)


def test_settings_that_are_not_known_yet_are_not_compared(path):
    begun(path)
    check_resumable(path, {"seed": 0})


def test_a_foreign_file_is_refused_and_unchanged(path):
    path.write_text("precious\n")
    with pytest.raises(ConfigError, match=r"exists, and no out.jsonl.job.json"):
        Output(path, SETTINGS)
    assert path.read_text() == "precious\n"
    assert not job_file(path).exists()


def test_an_empty_file_is_taken_for_a_new_one(path):
    path.touch()
    check_resumable(path, SETTINGS)
    assert begun(path).count(b"\n") == 2


def test_a_foreign_line_is_refused(path):
    begun(path)
    with path.open("a") as file:
        file.write('{"index": 3}\n')
    with pytest.raises(RunError, match="line 3: not a completion of a batch"):
        Output(path, SETTINGS)


def test_a_batch_killed_before_its_first_result_starts_again(path):
    job_file(path).write_text('{"input": ' + 1000 * " ")  # longer than what replaces it
    begun(path)
    check_resumable(path, SETTINGS)
    job_file(path).write_text('{"input": ')
    with pytest.raises(ConfigError, match="not JSON"):
        check_resumable(path, SETTINGS)


def test_two_processes_cannot_write_one_file(path):
    with Output(path, SETTINGS), pytest.raises(RunError, match="another process is writing it"):
        Output(path, SETTINGS)
    Output(path, SETTINGS).__exit__()


def test_a_job_file_that_cannot_be_written_is_refused_before_there_are_results(path):
    job_file(path).symlink_to(path.with_name("absent") / "job")
    with pytest.raises(
        RunError, match=r"out.jsonl.job.json: cannot be written \(No such file or directory\)"
    ):
        Output(path, SETTINGS)
    assert not path.exists()


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "absent" / "out.jsonl", tmp_path):
        with pytest.raises(ConfigError, match="--output must name a file in a folder that exists"):
            check_resumable(path, SETTINGS)
