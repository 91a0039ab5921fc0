"""Programs that start a run: typed into an interpreter, without a guard, and then ended in two ways."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from bounds import HANG_S
from runs import children, living, wait_until

ROOT = Path(__file__).parents[2]

#: Its functions have no file, and no ``if __name__ == "__main__"`` guards the call.
PROGRAM = """
    from grpo_actors.api import train

    scored = []

    def brevity(completions, **columns):
        scored.append(len(completions))
        return [-len(completion[-1]["content"]) for completion in completions]

    run = train(
        config="smoke_test", rewards=brevity, output_dir={folder!r}, max_new_tokens=16,
        max_updates=100_000, save_steps=0, eval_every_updates=0,
    )
    for event in run:
        if event["topic"] == "metrics":
            break
    print("scored", sum(scored), flush=True)
    {end}
"""


def family(pid):
    """Return a process's children and theirs."""
    found = [child for child, _ in children(pid)]
    return [*found, *(one for child in found for one in family(child))]


@pytest.mark.parametrize(
    "end", ["import threading; threading.Event().wait()", pytest.param("pass", marks=pytest.mark.slow)]
)
def test_a_run_ends_with_its_program_with_a_checkpoint_also_if_that_is_killed(end, tmp_path):
    folder = tmp_path / "run"
    with (tmp_path / "stderr.txt").open("w+") as stderr:
        program = subprocess.Popen(
            [sys.executable, "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        with program:
            try:
                program.stdin.write(textwrap.dedent(PROGRAM).format(folder=str(folder), end=end))
                program.stdin.close()
                said = program.stdout.readline()
                assert said.startswith("scored "), (tmp_path / "stderr.txt").read_text()
                assert int(said.split()[1]) >= 16  # the first update's 4 groups of 4
                processes = family(program.pid)
                if end == "pass":
                    assert program.wait(HANG_S) == 0
                    assert (
                        "the program ends, so the run finishes its step"
                        in (tmp_path / "stderr.txt").read_text()
                    )
            finally:
                program.kill()
    assert end == "pass" or len(processes) >= 3  # supervisor, learner, worker
    wait_until(lambda: not living(processes), "the run has ended")
    stop = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert (stop["topic"], stop["exit_code"]) == ("stop", 0)
    assert (folder / f"checkpoint-{stop['reason'].split()[-1]}").is_dir()
    assert not (folder / "endpoints.json").exists()
