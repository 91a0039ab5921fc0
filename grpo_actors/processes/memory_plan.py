"""How much memory each process of a run will hold, estimated from a model's files before anything loads.

What can be counted is counted (weights, gradients, optimizer, KV cache). The activations of the learner
are not: they depend on the architecture, grow with a micro-batch's tokens, and shrink with
learner.gradient_checkpointing.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

from grpo_actors.config import Config
from grpo_actors.policy.locate import locate

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: AdamW's two running means and the gradient, all float32.
_TRAINING_BYTES = 12


def memory_plan(config: Config) -> str:
    """A line for each process; a single line where the model's files are not on this machine yet."""
    folder = locate(config.model.model_name)
    if not isinstance(folder, Path):
        return f"{folder} is on the hub: its size is known once it was downloaded"
    architecture = json.loads((folder / "config.json").read_text())
    parameters = count_parameters(folder)
    width = _BYTES.get(config.model.dtype, 0) or _BYTES.get(str(architecture.get("torch_dtype")), 4)
    weights = parameters * width
    caches = _cache_bytes(architecture, config, width)
    lines = [f"{parameters / 1e6:,.1f} M parameters of {width} bytes"]
    lines.append(f"learner    {_gb(weights + _learner_extra(config, parameters, width))} and activations")
    worker_line = f"{_gb(weights + caches)}, of it {_gb(caches)} KV cache at most"
    lines += [f"rollout-{worker}  {worker_line}" for worker in range(config.rollout.workers)]
    if config.evaluator.eval_every_updates:
        lines.append(f"evaluator  {_gb(weights)} and its KV cache")
    return "\n".join(lines)


def count_parameters(folder: Path) -> int:
    """Elements of all tensors, from the headers of the safetensors files: nothing is loaded."""
    total = 0
    for path in sorted(folder.glob("model*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def _learner_extra(config: Config, parameters: int, width: int) -> int:
    """What training adds to the weights: nearly nothing for an adapter."""
    if config.model.fine_tune_type != "full":
        return 0
    # Half-precision weights are moved in float32, or small steps would be lost.
    masters = 4 if width < 4 else 0
    reference = width if config.objective.kl_coeff else 0
    return parameters * (_TRAINING_BYTES + masters + reference)


def _cache_bytes(architecture: dict[str, Any], config: Config, width: int) -> int:
    """Keys and values of one batch at its longest; 0 where config.json does not tell the shape."""
    try:
        heads = architecture["num_attention_heads"]
        size = architecture.get("head_dim") or architecture["hidden_size"] // heads
        per_token = (
            2 * architecture["num_hidden_layers"] * architecture.get("num_key_value_heads", heads) * size
        )
    except KeyError:
        return 0
    rollout = config.rollout
    tokens = config.data.max_prompt_length + rollout.max_new_tokens
    return int(per_token * width * tokens * rollout.batch_groups * rollout.num_generations)


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
