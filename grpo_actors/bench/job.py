"""Part ``run``: a real job, started by launch.py with the user's settings and measured from its launch to its exit.

The run gets nothing else to do. Everything comes from its own records and from watching its processes. A run that
fails, or that Ctrl-C stops, is reported as far as it came. Loads no MLX: the bench must take no memory of the GPU.
"""

import contextlib
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from grpo_actors import __version__
from grpo_actors.backend import KERNELS
from grpo_actors.bench.job_report import Interrupt, Job, report
from grpo_actors.bench.launched import Launched
from grpo_actors.bench.watching import Watch
from grpo_actors.config import Config, load_config
from grpo_actors.devices import nvidia_smi
from grpo_actors.errors import ConfigError
from grpo_actors.kernels.files import kernels_in
from grpo_actors.rundir.checkpoints import checkpoint_at
from grpo_actors.rundir.folder import checkpoint_folder
from grpo_actors.supervisor.machine import Machine

#: Lines of launch.py's output that are shown if it failed.
SHOWN_LINES = 20


def measure(
    file: str,
    overrides: Sequence[str],
    folder: Path | None,
    json_file: Path | None,
    interrupt_after: int | None,
) -> int:
    """Run the job, print its table, return the run's exit code.

    Args:
        file: The settings, as launch.py's ``--config``.
        overrides: As its ``--set``.
        folder: New folder to keep the run in; None: a temporary one.
        json_file: File for everything that was measured; None: no file.
        interrupt_after: Send Ctrl-C after this update; None: let the run finish.

    Raises:
        ConfigError: an argument is unusable; nothing was started.
    """
    config = load_config(file, overrides).config
    if interrupt_after is not None and interrupt_after < 1:
        raise ConfigError(f"--interrupt-after: must be at least 1, got {interrupt_after}")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ConfigError(f"--json: {json_file.absolute().parent} is no folder")
    with _new_folder(folder) as place:
        job, output = _run(config, place.absolute(), interrupt_after)
        figures, machine = report(job), description()
        if job.exit_code:
            print("\n".join(output.splitlines()[-SHOWN_LINES:]), file=sys.stderr)
        print(", ".join(f"{name} {value}" for name, value in machine.items()))
        print(figures.as_table(), flush=True)
        if json_file is not None:
            parameters = {"config": file, "overrides": overrides, "interrupt_after": interrupt_after}
            document = {
                "version": __version__,
                "machine": machine,
                "parameters": parameters,
                **figures.as_json(),
                "config": config.model_dump(mode="json"),
                "output": output.splitlines(),
            }
            _write(json_file, document)
    return job.exit_code


def _run(config: Config, folder: Path, interrupt_after: int | None) -> tuple[Job, str]:
    """Run the job to its end; return what was seen, and the run's output."""
    kernels = _kernels()
    with Launched(config, folder, working_folder=Path.cwd()) as run, _forwarding(run.send) as interrupts:
        with Watch(run.pid) as watch:
            if interrupt_after is not None and run.first("metrics", lambda r: r["update"] >= interrupt_after):
                os.kill(os.getpid(), signal.SIGINT)  # the same way as a key
            code = run.end()
            ended_at = time.time()
        records = run.records()
        updates = [record["update"] for record in records if record["topic"] == "metrics"]
        last = updates[-1] if updates else 0
        kept = checkpoint_at(checkpoint_folder(run.run_dir, last)) is not None
        job = Job(
            started_at=run.started_at,
            ended_at=ended_at,
            exit_code=code if code >= 0 else 128 - code,
            records=records,
            memory=watch.samples,
            kernels=len(_kernels() - kernels),
            interrupt=Interrupt(interrupts[0], last, kept) if interrupts else None,
        )
        return job, run.output.read_text(errors="replace")


@contextlib.contextmanager
def _forwarding(send: Callable[[int], None]) -> Iterator[list[float]]:
    """Pass Ctrl-C and SIGTERM on within the block, so that the bench outlives the run; yield the list of their times."""
    times: list[float] = []

    def forward(number: int, frame: FrameType | None) -> None:
        del frame
        times.append(time.time())
        send(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield times
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _new_folder(folder: Path | None) -> Iterator[Path]:
    """Make the folder; without a name, a temporary one that is removed after the block."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="grpo-bench-") as name:
            yield Path(name)
        return
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--folder: must be a new folder, got {folder} ({error.strerror})") from error
    yield folder


def _kernels() -> set[str]:
    folder = os.environ.get(KERNELS)
    return set(kernels_in(Path(folder))) if folder else set()


def description() -> dict[str, Any]:
    """Return the description of the machine that goes with the figures."""
    names = Counter(row[0] for row in nvidia_smi("--query-gpu=name"))
    several = " + ".join(f"{count} × {name}" if count > 1 else name for name, count in names.items())
    return {
        "device": several or platform.machine(),
        "mlx": metadata.version("mlx"),
        "cores": Machine.here(asks_gpu=False).cores,
    }


def _write(file: Path, document: Mapping[str, Any]) -> None:
    try:
        file.write_text(json.dumps(document, allow_nan=False) + "\n")
    except OSError as error:
        raise ConfigError(f"--json: {file} cannot be written ({error.strerror})") from error
