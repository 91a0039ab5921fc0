"""Part ``startup``: time until the command line answers, a run has its first update, and a worker is ready.

A worker is ready when it has joined and holds the weights; its first beat shows this. The floor is a process that
only loads the same model.
"""

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from grpo_actors.bench.bench_process import BenchProcess
from grpo_actors.bench.figures import Figure
from grpo_actors.bench.launched import TRAIN, Launched, with_this_package
from grpo_actors.bench.options import Options, config_of
from grpo_actors.config import Config, read_config
from grpo_actors.consent import options_for
from grpo_actors.rundir.folder import CONFIG_FILE

#: Name of the worker that the bench attaches, in addition to the run's own workers.
NAME = "bench"


def measure(options: Options, model_name: str) -> list[Figure]:
    """Measure this part; each round is a run from its launch to an attached worker."""
    config = config_of(options, model_name, "max_updates=1000000", "eval_every_updates=0", "save_steps=0")
    help_s, loaded, first_update, ready = [], [], [], []
    for _ in range(options.rounds):
        with (
            tempfile.TemporaryDirectory(prefix="grpo-bench-") as folder,
            Launched(config, Path(folder)) as run,
        ):
            first_update.append(run.wait_for("metrics")["time"] - run.started_at)
            ready.append(_worker_ready_s(run))
        help_s.append(_help_s())
        loaded.append(_load_s(config))
    load = Figure("model loaded in a fresh process s", loaded)
    return [
        Figure("grpo train --help s", help_s),
        load,
        Figure("worker ready s", ready, load.median),
        Figure("launch to first update s", first_update),
    ]


def _worker_ready_s(run: Launched) -> float:
    """Measure the seconds from a worker's start to its first beat; the worker has ended when this returns."""
    started_at = time.time()
    command = ["-m", "grpo_actors.rollout", "--attach", str(run.run_dir), "--name", NAME]
    command += options_for(read_config(run.run_dir / CONFIG_FILE))
    worker = subprocess.Popen(
        [sys.executable, *command],
        env=with_this_package(),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        beat = run.wait_for("worker", lambda r: r["worker"] == NAME and r["state"] != "joined")
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait()
    return float(beat["time"]) - started_at


def _help_s() -> float:
    started_s = time.perf_counter()
    subprocess.run([sys.executable, *TRAIN, "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started_s


def _load_s(config: Config) -> float:
    """Measure the seconds from the start of a process that only loads the model to its hello."""
    started_s = time.perf_counter()
    # With all threads of the machine, like an attached worker, which gets no share.
    with BenchProcess("grpo_actors.bench.fetcher", config.model_dump_json(), processes=1) as process:
        process.answer()
        return time.perf_counter() - started_s
