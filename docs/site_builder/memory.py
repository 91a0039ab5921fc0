"""The memory table: which model trains how on which machine, by the plan that ``--dry-run`` prints."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from mlx.utils import tree_flatten

from grpo_actors.bench.random_model import build, config_json
from grpo_actors.config import Config, load_config
from grpo_actors.devices import BackEnd, Device
from grpo_actors.supervisor.fit import needs_on, scale
from grpo_actors.supervisor.machine import Machine
from grpo_actors.supervisor.memory_plan import Plan, plan_of
from grpo_actors.supervisor.placement import Placement, place

MODELS = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b", "qwen2.5-14b")
METHODS: Mapping[str, Sequence[str]] = {
    "all weights": ("fine_tune_type=full",),
    "LoRA": ("fine_tune_type=lora", "lora_rank=16"),
    "QLoRA": ("fine_tune_type=lora", "lora_rank=16", "base_bits=4"),
}


def machine_of(back_end: BackEnd, device_bytes: int) -> Machine:
    """Return a machine with one device of this size."""
    gpus = (Device("cuda", 0, device_bytes),) if back_end == "cuda" else ()
    return Machine(back_end, 10, device_bytes, gpus)


#: Name in the table -> the machine. A Mac's memory is counted in GiB, as macOS reports it; a card of 24 GB reports a little
#: more than 24 · 10⁹ bytes.
MACHINES: Mapping[str, Mapping[str, Machine]] = {
    "Mac": {f"{size} GB": machine_of("metal", size * 2**30) for size in (16, 32, 64, 128)},
    "NVIDIA GPU": {f"{size} GB": machine_of("cuda", size * 10**9) for size in (24, 48, 80)},
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
    [device] = machine.devices
    for arrangement, remark in ((SEPARATE, ""), (ALONE, ", one process")):
        found, placement = plan(model, method, arrangement, machine)
        needs = needs_on(device, found, placement).values()
        total = sum(need.total for need in needs) / 1e9
        if scale(found, placement, device) == 1:
            return f"{total:.0f} GB{remark}"
    certain = sum(need.certain for need in needs)
    return f"{total:.0f} GB, tight" if certain <= (device.memory_bytes or 0) else "no"


@cache
def plan(model: str, method: str, arrangement: Sequence[str], machine: Machine) -> tuple[Plan, Placement]:
    """Plan a run from the model's shapes, without its weights."""
    config = _config(method, arrangement)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config_json(model, "bfloat16")))
        (folder / "model.safetensors").write_bytes(_header(model))
        found = plan_of(folder, config, machine)
    return found, place(config, machine.devices, found, most_workers=1, ranks=config.learner.ranks)


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
