"""A mixture of three sources in a real run: killed, its data moved, continued; compared with one that was not."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import launch_here
from runs import Run, kill, new_run

from grpo_actors.config.wording import toml_value

pytestmark = pytest.mark.slow

SETTINGS = {
    "max_updates": 4,
    "eval_every_updates": 4,
    "max_staleness": 0,
    "batch_size": 4,
    "eval_subset_size": 12,
    "max_new_tokens": 24,
}


def write_data(folder: Path, *, first: int = 2) -> list[str]:
    """Write the data of two sources; return the options that make a mixture of them and arithmetic."""
    from datasets import Dataset  # a second

    folder.mkdir(exist_ok=True)
    sums = [f"There are {n} pears and 7 plums. How many are there in all?,{n + 7}" for n in range(first, 32)]
    (folder / "sums.csv").write_text("\n".join(["question,answer", *sums]) + "\n")
    free = [{"prompt": f"What is the sum of the digits of {n}?", "limit": 60} for n in range(1000, 1030)]
    Dataset.from_list(free).to_parquet(str(folder / "free.parquet"))
    reward = folder.parent / "rewards.py"
    reward.write_text(
        "def short(completions, limit, **columns):\n"
        "    return [float(len(str(text)) <= most) for text, most in zip(completions, limit)]\n"
    )
    short = f"{reward}:short"
    sources = [
        {"name": "arithmetic", "weight": 2.0, "rewards": ["correctness"]},
        {"name": "sums", "weight": 1.0, "task": "dataset", "path": str(folder / "sums.csv")}
        | {"rewards": ["correctness"], "system_prompt": ""},
        {"name": "free", "weight": 1.0, "task": "dataset", "path": str(folder / "free.parquet")}
        | {"rewards": [short], "system_prompt": "", "prompt_column": "prompt"},
    ]
    functions = {"correctness": 1.0, short: 0.5}
    return [f"--set=sources={toml_value(sources)}", f"--set=functions={toml_value(functions)}"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Iterator[Run]:
    """A run that nothing interrupts."""
    with new_run(**SETTINGS) as run:
        run.mixture = write_data(run.folder.parent / "data")
        assert run.run(*run.mixture) == 0, run.stderr
        yield run


def test_every_update_has_its_share_of_each_source_and_the_metrics_say_what_each_earned(whole):
    for record in whole.records("metrics"):
        assert record["groups_by_source"] == {"arithmetic": 2, "free": 1, "sums": 1}
        assert set(record["reward_by_source"]) == {"arithmetic", "free", "sums"}
        # 1 at most for an answer, 0.5 for a short text.
        assert 0 <= record["reward_by_source"]["free"] <= 0.5


def test_every_evaluation_has_a_score_for_each_source(whole):
    for record in whole.records("eval"):
        assert set(record["by_source"]) == {"arithmetic", "free", "sums"}
        assert record["score"]["measure"]["metric"] == "reward"
    (line,) = re.findall(r"eval @4 .*", whole.stderr)
    assert all(re.search(rf"  {name} \d\.\d\d \[", line) for name in ("arithmetic", "sums", "free"))


def test_after_a_kill_it_continues_with_the_same_bits_also_if_its_data_has_moved(whole):
    with new_run(**SETTINGS) as run:
        data = run.folder.parent / "data"
        run.start(*write_data(data))
        run.wait_for_update(3)  # a checkpoint is written every second update
        kill(run.child("learner"))
        run.end()
        moved = write_data(data.rename(run.folder.parent / "moved"))
        assert run.run(*moved, "--resume") == 0, run.stderr
        without_rewards = [[lease, epoch, problem] for lease, epoch, problem, _ in run.ledger()]
        assert without_rewards == [[lease, epoch, problem] for lease, epoch, problem, _ in whole.ledger()]
        assert run.curve() == whole.curve()

        before = json.loads((run.folder / "data.json").read_text())
        changed = write_data(run.folder.parent / "moved", first=3)
        done = launch_here(*run.launch_arguments(*changed, "--set=max_updates=5"))
        assert done.returncode == 2
        line = done.stderr.splitlines()[-1]
        assert re.search(
            rf"has trained on other data: [\d,]+ problems with the digest {before['digest']}, "
            r"got [\d,]+ problems with the digest [0-9a-f]{16}; restore the data",
            line,
        )
