"""What it costs a run to be looked at: ``python tests/page/reading_cost.py [UPDATES]``.

One run of the quickstart. A page with three tabs that read all that a browser reads is there for ten updates, away for
the next ten, and so on, so that whatever else the machine does weighs on both alike.
"""

import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[2]
GRPO = [sys.executable, "-m", "grpo_actors"]
TABS, WINDOW = 3, 10
#: Seconds between two looks at the files of the run.
POLL_S = 0.02
#: Pause of the page after each refresh, in seconds (page.js).
PAUSE_S = 0.2
#: Updates at the start that are not counted: files and kernels are loaded.
WARM_UP = 5
TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    updates = int(sys.argv[1]) if len(sys.argv) > 1 else 125
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        run = Path(folder) / "run"
        settings = {
            "output_dir": run,
            "max_updates": updates,
            "eval_every_updates": 0,
            "record_groups": "true",
        }
        words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        trained = stack.enter_context(
            subprocess.Popen(
                [*GRPO, "train", "quickstart", *words], env=environment, stderr=subprocess.DEVNULL
            )
        )
        stack.callback(trained.terminate)
        wait_for(run, WARM_UP)
        learner = json.loads((run / "endpoints.json").read_text())["pid"]
        measured: dict[bool, list[float]] = {False: [], True: []}
        cpu: dict[bool, list[float]] = {False: [], True: []}
        asked = 0
        for number in cycle([False, True]):
            done = len(computed(run))
            if done + 2 * WINDOW > updates:
                break
            with page(run, environment) if number else ExitStack() as counter:
                first = len(computed(run))
                before_s = cpu_seconds(learner)
                wait_for(run, first + WINDOW)
                last = len(computed(run))
                cpu[number].append((cpu_seconds(learner) - before_s) / (last - first))
                measured[number] += computed(run)[first + 1 : last]  # the first began before the window did
                asked += sum(counter) if number else 0
        for number, name in ((False, "nobody reads"), (True, f"one page, {TABS} tabs")):
            print(
                f"{name:20}  {statistics.median(measured[number]):.3f} s an update (median of {len(measured[number])}, "
                f"without the wait for groups), {statistics.mean(cpu[number]):.3f} s of the learner's CPU time "
                f"(mean of {len(cpu[number])} windows)"
            )
        print(f"{asked} answers were read by the tabs")


def computed(run: Path) -> list[float]:
    """Return the seconds that the learner computed in each update so far."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    records = [json.loads(line) for line in lines if '"topic":"metrics"' in line and line.endswith("}")]
    return [record["update_s"] - record["wait_s"] for record in records]


def wait_for(run: Path, updates: int) -> None:
    while len(computed(run)) < updates:
        time.sleep(POLL_S)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@contextmanager
def page(run: Path, environment: dict[str, str]):
    """A page with its tabs; yields the number of answers of each tab, which grow."""
    command = [*GRPO, "watch", str(run), "--web"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as served:
        address = urlsplit(served.stdout.readline().strip())
        counter, ended = [0] * TABS, threading.Event()
        tabs = [
            threading.Thread(target=tab, args=(address, counter, number, ended)) for number in range(TABS)
        ]
        for each in tabs:
            each.start()
        try:
            yield counter
        finally:
            ended.set()
            served.terminate()
            for each in tabs:
                each.join()


def tab(address, counter: list[int], number: int, ended: threading.Event) -> None:
    """Read as page.js does: the page, then at each event the view and the newest samples, one of them whole."""

    def get(path: str) -> bytes:
        connection = http.client.HTTPConnection(address.netloc, timeout=60)
        connection.request("GET", address.path + path)
        answer = connection.getresponse().read()
        connection.close()
        counter[number] += 1
        return answer

    try:
        for path in ("", "bokeh.min.js", "page.js", "page.css"):
            get(path)
        listening = http.client.HTTPConnection(address.netloc, timeout=60)
        listening.request("GET", f"{address.path}events")
        events = listening.getresponse()
        while not ended.is_set() and (line := events.readline()):
            if line.startswith(b"data:"):
                get("view?run=0")
                listed = json.loads(get("samples?run=0"))["groups"]
                if listed:
                    get(f"samples/{listed[0]['id']}?run=0")
                ended.wait(PAUSE_S)
    except (OSError, http.client.HTTPException):
        if not ended.is_set():
            raise


if __name__ == "__main__":
    main()
