"""Keep CUDA MPS running while a run lives: ``python -m grpo_actors.supervisor.mps_keeper``, started by `mps`.

The keeper runs NVIDIA's control daemon as its child, in a private folder. It prints one line, ``up FOLDER`` or
``down REASON``. It ends the daemon and removes the folder when its standard input closes: then the supervisor has closed
it, or has died, for whatever reason. Imports nothing heavy.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from grpo_actors.backend import MPS_FOLDER

#: NVIDIA's program: the daemon, and with no argument the way to ask it.
CONTROL = "nvidia-cuda-mps-control"
#: Seconds that the daemon and its server have to come up. With several GPUs the server opens each of them.
START_S = 20.0
#: Seconds after which the daemon has a server, or never will have one.
SERVER_S = 2.0
#: Seconds that clients have to leave before the server is stopped. The run's own processes have ended by then.
QUIT_S = 2
#: Seconds that the control program has to answer. It may answer `quit` only when the clients have left.
ANSWER_S = QUIT_S + 2.0
#: Longest time in seconds from the end of standard input to that of the keeper: two answers that were awaited, and `end`.
END_S = 3 * ANSWER_S + QUIT_S + 1.0
#: Seconds between two looks.
POLL_S = 0.02
#: Longest path of the folder in bytes: the daemon adds names of up to 27, and the path of a Unix socket ends at 107.
MAX_FOLDER = 79


class Daemon:
    """NVIDIA's control daemon in the foreground, with `folder` for its sockets and logs.

    The daemon starts a server, which is what the clients share the GPU through.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment = {
            **os.environ,
            MPS_FOLDER: str(folder),
            "CUDA_MPS_LOG_DIRECTORY": str(folder),
        }
        if self._environment.get("CUDA_VISIBLE_DEVICES", "")[:1].isdigit():
            # A server that sees GPU 2 only calls it 0, and a client that asks for 2 finds none. Identifiers stay as they are.
            del self._environment["CUDA_VISIBLE_DEVICES"]
        self._output = folder / "output"
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [CONTROL, "-f"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,  # it and its server can be killed together
            )

    @property
    def ending(self) -> str:
        """How the daemon ended, with the last line that it printed; empty while it runs."""
        code = self._process.poll()
        if code is None:
            return ""
        lines = self._output.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "without a word")
        return f"{CONTROL} ended with {code}: {last}"

    @property
    def listens(self) -> bool:
        """Whether the daemon has its socket."""
        return (self.folder / "control").exists()

    def start_server(self) -> bool:
        """Start the server, if the daemon answers yet; return whether it did.

        Otherwise the first client would start it and wait for it, and nobody would know before whether it can start.
        """
        return self._ask(f"start_server -uid {os.getuid()}") is not None

    @property
    def server_state(self) -> str:
        """``INITIALIZING``, ``ACTIVE`` or ``FAULT``; empty without a server (not yet started, or ended by itself).

        A daemon that does not answer in time counts as ``INITIALIZING``.
        """
        listed = self._ask("get_server_list")
        servers = ["?"] if listed is None else listed.split()
        if not servers or not servers[0].isdigit():
            return "" if listed is not None else "INITIALIZING"
        answer = self._ask(f"get_server_status {servers[0]}")
        return "INITIALIZING" if answer is None else answer.strip()

    def end(self) -> None:
        """End the daemon and its server: in order if they answer, in any case within some seconds."""
        if self.listens and not self.ending:
            self._ask(f"quit -t {QUIT_S}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(QUIT_S)
        with contextlib.suppress(ProcessLookupError):  # nobody is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _ask(self, command: str) -> str | None:
        """Return the answer of the control program; None if there is none in time."""
        try:
            done = subprocess.run(
                [CONTROL],
                env=self._environment,
                input=f"{command}\n",
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                timeout=ANSWER_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None
        return None if done.returncode else done.stdout


def come_up(daemon: Daemon) -> str:
    """Wait until clients can connect; return the reason if they cannot.

    A client that connects earlier fails instead of working without MPS.
    """
    start_s = time.monotonic()
    asked_s: float | None = None
    while time.monotonic() - start_s < START_S:
        if daemon.ending:
            return daemon.ending
        if asked_s is None:
            if daemon.listens and daemon.start_server():
                asked_s = time.monotonic()
        else:
            state = daemon.server_state
            if state == "FAULT" or (not state and time.monotonic() - asked_s > SERVER_S):
                return "its server cannot start"
            if state not in ("", "INITIALIZING"):
                return ""
        if supervisor_is_gone(POLL_S):
            return "the run is over"
    return f"it is not ready after {START_S:.0f} s"


def supervisor_is_gone(wait_s: float | None) -> bool:
    """Wait up to `wait_s` seconds, or without end, for standard input to close."""
    return bool(select.select([sys.stdin], [], [], wait_s)[0])


def report(line: str) -> None:
    """Print a line for the supervisor, if it still reads."""
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), f"{line}\n".encode())


def keep(folder: Path) -> None:
    """Run the daemon in `folder` until the supervisor is gone."""
    if len(os.fsencode(folder)) > MAX_FOLDER:
        report(f"down {folder} is too long for sockets; set TMPDIR to a shorter folder")
        return
    try:
        daemon = Daemon(folder)
    except OSError as error:
        report(f"down {CONTROL} cannot be run ({error.strerror})")
        return
    try:
        reason = come_up(daemon)
        if reason:
            report(f"down {reason}")
        else:
            report(f"up {folder}")
            supervisor_is_gone(None)
    finally:
        daemon.end()


def main() -> None:
    """Make the folder, keep MPS running, remove the folder."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # runs the cleanup
    folder = Path(tempfile.mkdtemp(prefix="grpo-mps-"))  # only this user may enter it
    try:
        keep(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
