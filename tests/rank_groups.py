"""A script that runs as each rank of a group: real processes, over MLX's ring back end on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bounds import HANG_S

from grpo_actors.backend import cuda_build
from grpo_actors.ranks.processes import RANK, devices_of, forget_meeting_points, meeting_point

ROOT = Path(__file__).parents[1]


def found_by_ranks(script: Path, size: int, *arguments: str) -> dict:
    """Run a script with these arguments as `size` ranks; return what rank 0 printed, objects of JSON, by their ``case``."""
    if cuda_build() is not None and os.environ.get("CUDA_VISIBLE_DEVICES", "").count(",") + 1 < size:
        pytest.skip(f"CUDA_VISIBLE_DEVICES does not name {size} GPUs")
    shared, devices = meeting_point(size), devices_of(size, "the size of the group")
    folders = (script.parent, ROOT / "tests", ROOT)
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    # As exact as a CPU: CUDA's tensor cores round the factors of float32 products.
    common = {**os.environ, **shared, "PYTHONPATH": path, "MLX_ENABLE_TF32": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**common, **device, RANK: str(rank)},
            stdout=subprocess.PIPE,
        )
        for rank, device in enumerate(devices)
    ]
    try:
        printed, *_ = [rank.communicate(timeout=HANG_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        forget_meeting_points()
    assert [rank.returncode for rank in ranks] == [0] * size
    return {line.pop("case"): line for line in map(json.loads, printed.splitlines())}
