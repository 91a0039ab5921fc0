"""A worker started by hand whose learner goes and comes back."""

import signal

import pytest
from bounds import HANG_S
from runs import wait_until

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(
    "settings",
    [
        {"save_steps": 2},  # the same run continues
        {"save_steps": 0},  # another run begins in the same folder
        {"save_steps": 2, "scheme": "tcp"},  # at other ports
    ],
    ids=["continued", "begun anew", "elsewhere"],
)
def test_it_waits_and_works_on(make_run, settings):
    run = make_run(max_updates=100_000, eval_every_updates=0, workers=1, **settings)
    run.start()
    run.wait_for_update(1)
    worker = run.attach("--attach", str(run.folder), "--name", "faithful")
    wait_until(lambda: delivered(run), "a group of the attached worker", HANG_S)
    run.signal(signal.SIGKILL)
    run.end()
    wait_until(lambda: "the learner is gone; waiting" in worker.stderr_text(), "it says so", HANG_S)
    sessions = {record["session"] for record in run.records()}
    run.start()
    wait_until(lambda: delivered(run, but=sessions), f"it works on: {run.stderr}", HANG_S)
    run.signal(signal.SIGINT)
    assert run.end(HANG_S) == 0
    assert worker.wait(HANG_S) == 0, worker.stderr_text()
    assert worker.stderr_text().splitlines()[-1].endswith(": the run is over")
    run.assert_no_gap_in_records()
    run.assert_nothing_left()


def delivered(run, but=frozenset()) -> bool:
    """Whether a group of the worker trained in a session that is not one of these."""
    return any(
        worker == "faithful"
        for record in run.records("metrics")
        if record["session"] not in but
        for *_, worker in record["ledger"]
    )
