"""The memory table: which model trains how on which machine, by the plan that ``--dry-run`` prints."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from mlx.utils import tree_flatten

from grpo_actors.bench.random_model import build, config_json
from grpo_actors.config import Config, load_config
from grpo_actors.supervisor.fit import scale
from grpo_actors.supervisor.machine import BackEnd, Machine
from grpo_actors.supervisor.memory_plan import Plan, plan_of

MODELS = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b", "qwen2.5-14b")
METHODS: Mapping[str, Sequence[str]] = {
    "all weights": ("fine_tune_type=full",),
    "LoRA": ("fine_tune_type=lora", "lora_rank=16"),
    "QLoRA": ("fine_tune_type=lora", "lora_rank=16", "base_bits=4"),
}
#: Name in the table -> the machine. A Mac's memory is counted in GiB, as macOS reports it; a card of 24 GB reports a little
#: more than 24 · 10⁹ bytes.
MACHINES: Mapping[str, Mapping[str, Machine]] = {
    "Mac": {f"{size} GB": Machine("metal", 10, size * 2**30, size * 2**30) for size in (16, 32, 64, 128)},
    "NVIDIA GPU": {f"{size} GB": Machine("cuda", 16, 128 * 10**9, size * 10**9) for size in (24, 48, 80)},
}
#: The job: groups as large as those of `grpo train prod`, one of them at a time.
JOB = (
    "task=gsm8k",
    "num_generations=8",
    "max_new_tokens=512",
    "max_prompt_length=512",
    "gradient_checkpointing=true",
    "batch_size=1",
    "batch_groups=1",
    "eval_batch_size=8",
    "dtype=bfloat16",
)
#: A learner, a worker and an evaluator; or the learner alone, which then samples by itself.
SEPARATE, ALONE = ("workers=1",), ("workers=0", "eval_every_updates=0")


def markdown() -> str:
    """Return one table per kind of machine."""
    return "\n".join(_table(kind, machines) for kind, machines in MACHINES.items())


def _table(kind: str, machines: Mapping[str, Machine]) -> str:
    rows = [f"| {kind} | | {' | '.join(machines)} |", f"|---|---|{'---|' * len(machines)}"]
    for model in MODELS:
        for index, method in enumerate(METHODS):
            cells = [cell(model, method, machine) for machine in machines.values()]
            rows.append(
                f"| {model.rpartition('-')[2].upper() if index == 0 else ''} | {method} | {' | '.join(cells)} |"
            )
    return "\n".join(rows) + "\n"


def cell(model: str, method: str, machine: Machine) -> str:
    """Return the most memory that the run may take, and what follows from it for this machine."""
    memory = machine.device_bytes or 0
    # Only on CUDA a run's plan depends on the size of the memory: copies of weights are made where there is room.
    of_plan = memory if machine.back_end == "cuda" else 0
    for arrangement, workers, remark in ((SEPARATE, 1, ""), (ALONE, 0, ", one process")):
        found = plan(model, method, arrangement, machine.back_end, of_plan)
        if scale(found, workers, machine) == 1:
            return f"{found.total(workers) / 1e9:.0f} GB{remark}"
    return f"{found.total(0) / 1e9:.0f} GB, tight" if found.certain(0) <= memory else "no"


@cache
def plan(model: str, method: str, arrangement: Sequence[str], back_end: BackEnd, device_bytes: int) -> Plan:
    """Plan a run from the model's shapes, without its weights."""
    config = _config(method, arrangement)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config_json(model, "bfloat16")))
        (folder / "model.safetensors").write_bytes(_header(model))
        return plan_of(folder, config, Machine(back_end, 10, device_bytes, device_bytes))


@cache
def _config(method: str, arrangement: Sequence[str]) -> Config:
    return load_config(None, [*JOB, *METHODS[method], *arrangement]).config


@cache
def _header(model: str) -> bytes:
    """Return a safetensors file without its data: the plan reads names and shapes."""
    arrays = tree_flatten(build(config_json(model, "bfloat16")).parameters())
    header = json.dumps(
        {name: {"dtype": "BF16", "shape": array.shape, "data_offsets": [0, 0]} for name, array in arrays}
    ).encode()
    return len(header).to_bytes(8, "little") + header
