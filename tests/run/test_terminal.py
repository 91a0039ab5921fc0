"""What a terminal does to a run: the user presses Ctrl-Z and types fg, and closes it."""

import os
import signal
import subprocess
from pathlib import Path

from runs import Run, children, new_run, wait_until


class Unheard(Run):
    """A run whose standard error has a reader, until `close_terminal`."""

    stderr = ""
    _reader: int

    def start(self, *arguments: str) -> "Run":
        self._reader, write_end = os.pipe()
        self._stderr = Path(f"/dev/fd/{write_end}")
        super().start(*arguments)
        os.close(write_end)
        return self

    def close_terminal(self) -> None:
        os.close(self._reader)


def states(pids: list[int]) -> set[str]:
    """Return the first letters of the states of these processes; T: stopped."""
    command = ["ps", "-o", "stat=", "-p", ",".join(map(str, pids))]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.strip()[0] for line in listing.splitlines()}


def test_ctrl_z_halts_a_whole_run_fg_resumes_it_and_a_closed_terminal_saves_it():
    with new_run(Unheard, max_updates=100_000, save_steps=0, eval_every_updates=0) as run:
        run.process_group = 0  # as a shell starts a job: one without a parent outside ignores Ctrl-Z
        run.start()
        run.wait_for_update(1)
        family = [run.launched.pid, *(pid for pid, _ in children(run.launched.pid))]
        run.signal(signal.SIGTSTP)
        wait_until(lambda: states(family) == {"T"}, "all processes are stopped")
        halted = run.updates()
        run.close_terminal()
        run.signal(signal.SIGCONT)
        run.wait_for_update(halted + 2)
        assert [run.launched.pid, *(pid for pid, _ in children(run.launched.pid))] == family
        # A shell and the kernel both send it. Nobody reads what is printed from here on.
        run.signal(signal.SIGHUP)
        run.signal(signal.SIGHUP)
        assert run.end() == 0
        assert run.checkpoints() == [run.updates()]
        assert run.records("stop")[0]["exit_code"] == 0
        run.assert_nothing_left()
