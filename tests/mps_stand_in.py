"""A stand-in for NVIDIA's `nvidia-cuda-mps-control`, and a machine that seems to have CUDA.

The stand-in is a program of its own: a daemon in the foreground with -f, and without arguments the way to ask it. It
answers as NVIDIA's does, and writes down what it was asked.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

PROGRAM = """#!{python} -S
import json, os, socket, sys, time
from pathlib import Path

folder, kind = Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"]), "{kind}"
address = str(folder / "control")


def note(**fields):
    with open("{journal}", "a") as file:
        file.write(json.dumps(fields) + "\\n")


def answer(command, state={{}}):
    note(asked=command)
    if command.startswith("start_server"):
        state["looks"] = 0
    elif command == "get_server_list" and "looks" in state and kind != "no server":
        return "4242"
    elif command == "get_server_status 4242":
        state["looks"] += 1
        return "INITIALIZING" if state["looks"] == 1 else "FAULT" if kind == "fault" else "ACTIVE"
    return ""


if sys.argv[1:] == ["-f"]:
    variables = {{name: os.environ.get(name) for name in ("CUDA_MPS_LOG_DIRECTORY", "CUDA_VISIBLE_DEVICES")}}
    note(pid=os.getpid(), folder=str(folder), mode=folder.stat().st_mode & 0o777, **variables)
    if kind == "refuses":
        print("starting")
        sys.exit("An instance of this daemon is already running")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen()
    while True:
        connection, _ = listener.accept()
        command = connection.recv(1000).decode().strip()
        connection.send(answer(command).encode() + b"\\n")
        if command.startswith("quit") and kind != "stubborn":
            sys.exit()

client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
client.connect(address)
client.send(sys.stdin.read().encode())
sys.stdout.write(client.recv(1000).decode())
"""


class StandIn:
    """The program in a folder for PATH, of a kind that works, ``refuses``, has ``no server``, ends in ``fault`` or is ``stubborn``."""

    def __init__(self, folder: Path, kind: str = "works") -> None:
        self.folder = folder / "bin"
        self.folder.mkdir()
        self._journal = folder / "journal.jsonl"
        program = self.folder / "nvidia-cuda-mps-control"
        program.write_text(PROGRAM.format(python=sys.executable, journal=self._journal, kind=kind))
        program.chmod(0o755)
        self.path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"

    def notes(self) -> list[dict[str, Any]]:
        """Return what the program wrote down: one entry of the daemon's start, then one a question."""
        return [json.loads(line) for line in self._journal.read_text().splitlines()] if self.started else []

    @property
    def started(self) -> bool:
        return self._journal.exists()

    @property
    def daemon(self) -> dict[str, Any]:
        return next(note for note in self.notes() if "pid" in note)

    @property
    def asked(self) -> list[str]:
        return [note["asked"] for note in self.notes() if "asked" in note]


def seems_to_have_cuda(folder: Path) -> Path:
    """Return a folder for PYTHONPATH in which MLX for CUDA seems to be installed."""
    metadata = folder / "site" / "mlx_cuda_13-0.0.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx-cuda-13\nVersion: 0.0.0\n")
    return metadata.parent
