"""The processes of a group of ranks on one host: starting the others next to this one, as `mlx.launch` would.

Rank 0 is the learner, or the worker. Each other rank is a child process in its process group, with a lifeline to it: it
ends when rank 0 ends. If one of them ends first, so does rank 0, at once, wherever it waits. Loads no MLX, and is entered
before anything does: a process sees one GPU only, its own.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from grpo_actors.backend import cuda_build
from grpo_actors.devices import VISIBLE
from grpo_actors.errors import ConfigError
from grpo_actors.process import (
    EVALUATOR_LINE,
    EVALUATOR_TOKEN,
    EXIT_CRASH,
    EXIT_RANK_LOST,
    LIFELINE,
    is_supervised,
    leave,
    removed_at_once,
)
from grpo_actors.progress import PROGRESS
from grpo_actors.rundir.folder import LOCK

#: Environment variables of MLX's distributed back ends.
RANK, HOSTFILE = "MLX_RANK", "MLX_HOSTFILE"
_SIZE, _NCCL_HOST, _NCCL_PORT, _JACCL_COORDINATOR = (
    *("MLX_WORLD_SIZE", "NCCL_HOST_IP", "NCCL_PORT"),
    "MLX_JACCL_COORDINATOR",
)
_OF_GROUP = (RANK, HOSTFILE, _SIZE, _NCCL_HOST, _NCCL_PORT, _JACCL_COORDINATOR)
#: Variables of rank 0 alone.
_OF_FIRST = (PROGRESS, EVALUATOR_LINE, EVALUATOR_TOKEN, LOCK)
_HOST = "127.0.0.1"
#: Files of this process.
_meeting_points: list[Path] = []
#: Seconds that the other ranks have to end after rank 0 has told them to.
_LEAVE_S = 5.0


def launched_rank() -> int | None:
    """Return this process's rank if it is one of several that were launched as ranks, else None."""
    rank = os.environ.get(RANK)
    return None if rank is None else int(rank)


def ranks_here(count: int) -> int:
    """Return how many of the `count` ranks of a learner run in processes of this one; `mlx.launch` starts each by itself."""
    return count if launched_rank() is None else 1


def host_of_first() -> str:
    """Return the address at which the other ranks reach rank 0."""
    if hostfile := os.environ.get(HOSTFILE):
        return str(json.loads(Path(hostfile).read_text())[0][0]).rpartition(":")[0]
    return os.environ.get(_NCCL_HOST) or os.environ.get(_JACCL_COORDINATOR, _HOST).partition(":")[0]


@contextlib.contextmanager
def started(count: int, command: Sequence[str], setting: str) -> Iterator[None]:
    """Make this process rank 0 of `count` within the block, and run the other ranks; do nothing for one rank.

    Args:
        count: Number of ranks.
        command: Module and arguments of the other ranks.
        setting: What the user calls their number.

    Raises:
        ConfigError: There are fewer GPUs.
    """
    if count == 1:
        yield
        return
    with contextlib.ExitStack() as stack:
        devices = devices_of(count, setting)
        common = meeting_point(count)
        stack.callback(forget_meeting_points)
        read_end, write_end = os.pipe()
        stack.callback(os.close, read_end)
        stack.callback(os.close, write_end)
        stack.enter_context(removed_at_once(forget_meeting_points))
        # A run that `mlx.launch` has started may have a worker of several ranks: another group.
        outer = {name: os.environ.pop(name) for name in _OF_GROUP if name in os.environ}
        stack.callback(os.environ.update, outer)
        inherited = {name: value for name, value in os.environ.items() if name not in _OF_FIRST}
        whole_command = [sys.executable, "-m", "grpo_actors.supervisor.entry", *command]
        processes: list[subprocess.Popen[bytes]] = []
        stack.enter_context(removed_at_once(partial(_kill, processes)))
        for rank, device in enumerate(devices[1:], 1):
            environment = inherited | common | device | {RANK: str(rank), LIFELINE: str(read_end)}
            process = subprocess.Popen(
                whole_command, env=environment, stdin=subprocess.DEVNULL, pass_fds=[read_end]
            )
            processes.append(process)
        os.environ.update(common | devices[0] | {RANK: "0"})
        # Taken by what ends the group: the end of the block, or the first rank that ends.
        over = threading.Lock()
        watchers = [
            threading.Thread(target=_end_with, args=(rank, processes, over), name=f"rank {rank}", daemon=True)
            for rank in range(1, count)
        ]
        for watcher in watchers:
            watcher.start()
        patience_s = 0.0
        try:
            yield
            patience_s = _LEAVE_S
        finally:
            over.acquire()  # never, if a rank was first: this process ends
            deadline_s = time.monotonic() + patience_s
            for watcher in watchers:
                watcher.join(max(0.0, deadline_s - time.monotonic()))
            _kill(processes)
            for watcher in watchers:
                watcher.join()
            for name in (*common, RANK):
                os.environ.pop(name)


def meeting_point(count: int) -> dict[str, str]:
    """Return the variables by which MLX in each rank finds the others; for all back ends but CUDA, write a file, too.

    `forget_meeting_points` removes the file.
    """
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server((_HOST, 0))) for _ in range(count)]
        ports = [each.getsockname()[1] for each in sockets]
    if cuda_build() is not None:
        return {_NCCL_HOST: _HOST, _NCCL_PORT: str(ports[0]), _SIZE: str(count)}
    with tempfile.NamedTemporaryFile("w", prefix="grpo-actors-ranks-", suffix=".json", delete=False) as file:
        _meeting_points.append(Path(file.name))
        json.dump([[f"{_HOST}:{port}"] for port in ports], file)
    return {HOSTFILE: file.name}


def forget_meeting_points() -> None:
    """Remove the files that `meeting_point` has written: once a group has met, nobody reads them again."""
    while _meeting_points:
        _meeting_points.pop().unlink(missing_ok=True)


def devices_of(count: int, setting: str) -> list[dict[str, str]]:
    """Return for each rank the variable that shows it its own GPU; on other back ends, nothing.

    Args:
        count: Number of ranks.
        setting: What the user calls it.

    Raises:
        ConfigError: There are fewer GPUs.
    """
    if cuda_build() is None:
        return [{}] * count
    given = os.environ.get(VISIBLE)
    visible = [str(number) for number in range(count)] if given is None else given.split(",")
    if len(visible) < count:
        raise ConfigError(f"{setting}: must be at most the number of GPUs, got {count} and {VISIBLE}={given}")
    return [{VISIBLE: device} for device in visible[:count]]


def lose_rank(what: str) -> NoReturn:
    """End this process, rank 0, because another rank is lost; `what` says so in one line.

    The supervisor then starts it again, with all ranks. A learner's successor takes over the addresses, so they stay.
    """
    print(what, file=sys.stderr)
    if is_supervised():
        forget_meeting_points()
        os._exit(EXIT_RANK_LOST)
    leave(EXIT_CRASH)


def _end_with(rank: int, processes: Sequence[subprocess.Popen[bytes]], over: threading.Lock) -> None:
    """End this process and the other ranks if a rank ends before its time."""
    code = processes[rank - 1].wait()
    if not over.acquire(blocking=False):
        return
    _kill(processes)  # one that is stopped would not end by itself
    if code > 0:
        leave(code)  # it has said why
    lose_rank(f"rank {rank} {f'was ended by signal {-code}' if code else 'has left'}")


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
