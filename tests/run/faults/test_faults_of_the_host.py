"""Full disks, taken ports and folders, a clock that jumps, a network that is cut."""

import contextlib
import socket
from itertools import pairwise

import pytest
from network import HERE, second_host
from runs import ROOT, new_run, wait_until
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


#: Run by Python at its start: the wall clock of this process is wrong by as many seconds as a file says.
WRONG_CLOCK = """
import time
from pathlib import Path

true_time, offset = time.time, Path(__file__).with_name("offset")
time.time = lambda: true_time() + float(offset.read_text())
"""


@pytest.mark.faults
def test_a_wall_clock_that_jumps_by_an_hour_back_and_by_two_ahead(faulty_run, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WRONG_CLOCK)
    offset, changed = tmp_path / "offset", tmp_path / "changed"
    offset.write_text("0")
    run = faulty_run(environment={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, max_updates=16, eval_every_updates=8)
    run.start()
    for update, offset_s in ((3, -3600), (9, 3600)):
        run.wait_for_update(update)
        changed.write_text(str(offset_s))
        changed.rename(offset)
    run.end_well()
    assert run.exit_codes == [0]
    times_s = [record["time"] for record in run.records()]
    jumps_s = [after - before for before, after in pairwise(times_s) if abs(after - before) > 1800]
    assert [round(jump_s / 3600) for jump_s in jumps_s] == [-1, 2], "it jumped"


#: A run that a worker on another host joins.
FAR = {"scheme": "tcp", "host": HERE, "insecure": True, "max_updates": 100_000, "save_steps": 500}


@pytest.mark.faults
def test_a_network_that_is_cut_and_comes_back(start_run):
    with second_host() as host:
        run = start_run(environment={"GRPO_ACTORS_LOST_S": "3"}, **FAR, workers=1, eval_every_updates=0)
        run.attach("--attach", str(run.folder), "--name", "far", within=host.within)
        for _ in range(2):
            before = sum(worker == "far" for *_, worker in run.ledger())
            wait_until(
                lambda n=before: sum(worker == "far" for *_, worker in run.ledger()) > n, "it delivers"
            )
            losses = len(run.records("worker", worker="far", state="lost"))
            host.set_cable("down")
            wait_until(
                lambda n=losses: len(run.records("worker", worker="far", state="lost")) > n, "it is missed"
            )
            host.set_cable("up")
        wait_until(lambda: run.records("worker", worker="far")[-1]["state"] != "lost", "it is back")
        run.stop_well()


@pytest.mark.faults
def test_a_network_that_delays_and_drops(start_run):
    with second_host() as host:
        host.disturb("delay", "100ms", "50ms", "loss", "5%")
        run = start_run(**FAR, workers=1, eval_every_updates=0)
        run.attach("--attach", str(run.folder), "--name", "far", within=host.within)
        wait_until(lambda: sum(worker == "far" for *_, worker in run.ledger()) > 10, "it delivers")
        run.stop_well()
