"""Full disks, taken ports and folders, a clock that jumps, a network that is cut."""

import contextlib
import socket

import pytest
from runs import new_run
from small_disk import small_disk

#: Megabytes of one checkpoint of the embedded model in float32, rounded up.
CHECKPOINT_MB = 9


@pytest.mark.faults
def test_a_disk_that_is_full_during_a_checkpoint(faulty_run):
    run = faulty_run(max_updates=8, workers=1, eval_every_updates=0)
    run.folder.mkdir()
    with small_disk(run.folder, CHECKPOINT_MB + 4) as disk:
        run.start()
        assert run.end() == 2
        assert "cannot be written" in run.stderr
        disk.resize(10 * CHECKPOINT_MB)
        run.start()
        run.end_well()


@pytest.mark.faults
def test_a_disk_that_is_full_when_a_record_is_written(faulty_run):
    run = faulty_run(max_updates=8, workers=1, eval_every_updates=0)
    run.folder.mkdir()
    with small_disk(run.folder, 10 * CHECKPOINT_MB):
        run.start()
        run.wait_for_update(3)
        filler = run.folder / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        assert run.end() == 2
        assert "No space left" in run.stderr
        filler.unlink()
        run.start()
        run.end_well()


@pytest.mark.faults
def test_a_second_run_and_a_second_learner_on_the_folder_of_a_live_run(start_run):
    run = start_run(max_updates=16, workers=1)
    learner = run.command("learner", str(run.folder))
    with new_run(**run.settings) as second:
        assert second.run() == 2
        assert "is in use by a live run" in second.stderr
    assert learner.wait(60) == 2
    assert "is in use by a live run" in learner.stderr_text()
    run.end_well()
    assert run.exit_codes == [0]


@pytest.mark.faults
def test_a_port_in_use_and_then_free(faulty_run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        run = faulty_run(max_updates=4, scheme="tcp", port=taken.getsockname()[1], eval_every_updates=0)
        run.start()
        assert run.end() == 2
        assert "Address already in use" in run.stderr
    run.start()
    run.end_well()
