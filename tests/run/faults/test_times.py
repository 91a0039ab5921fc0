"""How long a run takes to stop, to vanish and to replace a hung worker, and where it listens. Prints what it measures.

The bounds only tell a hang from an end: on a busy machine everything takes longer than what is promised.
"""

import shutil
import signal
import subprocess
import time

import pytest
from faulty_run import FaultyRun
from runs import children, living, wait_until

from grpo_actors.transport.weights.shared_memory import MEMORY, PREFIX

#: Seconds that an end may take here.
BOUND_S = 120.0
#: Silence after which a worker counts as hung, in this run.
HUNG_S = 5.0


def family(run: FaultyRun) -> dict[int, str]:
    """The processes of a run that launch.py started, and theirs."""
    assert run.launched is not None
    found, unseen = {}, [run.launched.pid]
    while unseen:
        parent = unseen.pop()
        for pid, command in children(parent):
            found[pid] = " ".join(command)
            unseen.append(pid)
    return found | {run.launched.pid: "launch.py"}


def nothing_left(run: FaultyRun, pids: set[int]) -> bool:
    """Return whether neither processes nor files of a run are there; kernels that MLX compiled are for all runs."""
    files = [path for path in run.temporary.iterdir() if path.name != "mlx"]
    files += [path for path in (run.folder / "endpoints.json",) if path.exists()]
    files += [path for pid in pids for path in MEMORY.glob(f"{PREFIX}{pid}-*")]
    return not files and not living(pids)


@pytest.mark.faults
def test_how_long_a_hung_worker_a_killed_supervisor_and_ctrl_c_take(start_run, note_figures):
    run = start_run(
        environment={"GRPO_ACTORS_LOST_S": f"{HUNG_S:g}"},
        max_updates=100_000,
        workers=1,
        eval_every_updates=0,
        save_steps=10,
    )
    run.arm("worker.sampling", "hang")
    run.wait_for_failure("worker.sampling")
    hung_s = time.monotonic()
    wait_until(lambda: len(run.records("worker", worker="rollout-0", state="joined")) > 1, "it is replaced")
    replaced_s = time.monotonic() - hung_s
    run.wait_for_update(run.updates() + 2)

    listening = listening_sockets(family(run))

    pids = set(family(run))
    run.signal(signal.SIGKILL)
    killed_s = time.monotonic()
    run.end()
    wait_until(lambda: nothing_left(run, pids), "nothing is left", BOUND_S)
    vanished_s = time.monotonic() - killed_s

    run.start()
    run.wait_for_update(run.updates() + 2)
    run.signal(signal.SIGINT)
    asked_s = time.monotonic()
    assert run.end(BOUND_S) == 0
    stopped_s = time.monotonic() - asked_s
    run.check_promises()
    note_figures(
        f"hung worker to its replacement {replaced_s:.1f} s, of which {HUNG_S:g} s are silence; "
        f"supervisor's death to nothing left {vanished_s:.2f} s; Ctrl-C to exit {stopped_s:.1f} s; "
        f"{len(listening)} listening sockets: {'; '.join(listening) or '-'}"
    )
    assert all(line.startswith("u_str") for line in listening), "a default run listens on Unix sockets only"


def listening_sockets(processes: dict[int, str]) -> list[str]:
    """Return what `ss -ltnx` lists for these processes: kind and address of each socket."""
    if shutil.which("ss") is None:
        return []
    listing = subprocess.run(["ss", "-Hltnxp"], capture_output=True, text=True, check=True).stdout
    rows = (line.split() for line in listing.splitlines() if any(f"pid={pid}," in line for pid in processes))
    # A Unix socket has its kind first; a TCP one begins with its state.
    return sorted(f"{row[0]} {row[4] if row[0].startswith('u_') else row[3]}" for row in rows)
