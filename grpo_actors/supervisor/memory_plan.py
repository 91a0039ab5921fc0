"""How much memory each process of a run will hold, estimated from a model's files before anything loads.

What can be counted is counted (weights, gradients, optimizer, KV cache). The activations of the learner
are not: they depend on the architecture, grow with a micro-batch's tokens, and shrink with
learner.gradient_checkpointing.
"""

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from grpo_actors.config import Config
from grpo_actors.policy.locate import locate

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Quantised weights that share a scale and an offset, both of the model's type.
_GROUP_SIZE = 64
#: Gradients and all that moves weights is float32.
_GRADIENT_BYTES = 4
#: Running means of a weight's gradient and of its square. Adafactor keeps of these a row and a column only.
_STATE_BYTES = {"adamw": 8, "adam": 8, "lion": 4, "adafactor": 0, "muon": 4}
#: Those that one product can take the place of.
_JOINED = re.compile(r"\b(q|k|v|gate|up)_proj\.weight$")
#: The layer's number and the module's name within it.
_IN_LAYER = re.compile(r"\blayers\.(\d+)\.(.+)\.weight$")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the model's files, with the shape that it has unpacked."""

    name: str
    shape: tuple[int, ...]
    #: Bits of an element in the file if it is quantised there, else 0.
    bits: int = 0

    @property
    def size(self) -> int:
        """Its elements."""
        return prod(self.shape)

    def bytes(self, width: int, bits: int) -> float:
        """In a process whose floats have `width` bytes and that quantises what is not yet so to `bits`; 0: nothing."""
        divides = len(self.shape) >= 2 and self.shape[-1] % _GROUP_SIZE == 0
        bits = self.bits or (bits if divides else 0)
        return self.size * (bits / 8 + 2 * width / _GROUP_SIZE) if bits else self.size * width


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes that each process holds, as far as they can be counted."""

    parameters: int
    float_bytes: int
    learner: float
    #: Of one worker, without its cache.
    worker: float
    cache: float
    evaluator: float
    #: Of those of the weights that are copied to sample on CUDA (`policy.decoding.blocks`): none that are packed.
    joined: float = 0.0


def memory_plan(config: Config) -> str:
    """A line for each process; a single line where the model's files are not on this machine yet."""
    folder = locate(config.model.model_name)
    if not isinstance(folder, Path):
        return f"{folder} is on the hub: its size is known once it was downloaded"
    plan = plan_of(folder, config)
    lines = [f"{plan.parameters / 1e6:,.1f} M parameters, floats of {plan.float_bytes} bytes"]
    lines.append(f"learner    {_gb(plan.learner)} and activations")
    worker_line = f"{_gb(plan.worker + plan.cache)}, of it {_gb(plan.cache)} KV cache at most"
    workers = config.rollout.workers
    lines += [f"rollout-{worker}  {worker_line}" for worker in range(1 if workers == "auto" else workers)]
    if workers == "auto":
        lines.append("each further worker: the same")
    if config.evaluator.eval_every_updates:
        lines.append(f"evaluator  {_gb(plan.evaluator)} and its KV cache")
    return "\n".join(lines)


def plan_of(folder: Path, config: Config) -> Plan:
    """What a run of the model in `folder` holds."""
    architecture = json.loads((folder / "config.json").read_text())
    tensors = read_tensors(folder, architecture.get("quantization", {}))
    width = _BYTES.get(config.model.dtype, 0) or _BYTES.get(str(architecture.get("torch_dtype")), 4)
    bits = config.model.base_bits
    rollout_bits = bits or (config.rollout.rollout_bits if config.rollout.quantize_for_rollouts else 0)
    weights = sum(tensor.bytes(width, bits) for tensor in tensors)
    if config.model.fine_tune_type == "full":
        training = _full_bytes(config, tensors, width)
    else:
        training = _adapter_bytes(config, tensors, architecture.get("num_hidden_layers", 0))
    return Plan(
        parameters=sum(tensor.size for tensor in tensors),
        float_bytes=width,
        learner=weights + training,
        worker=sum(tensor.bytes(width, rollout_bits) for tensor in tensors),
        cache=_cache_bytes(architecture, config, width),
        evaluator=weights,
        joined=0.0 if bits or any(tensor.bits for tensor in tensors) else _joined_bytes(tensors, width),
    )


def read_tensors(folder: Path, quantization: dict[str, Any]) -> list[Tensor]:
    """All tensors, from the headers of the safetensors files: nothing is loaded.

    Args:
        folder: Of the model.
        quantization: That entry of its config.json: ``bits`` of most modules, and settings of single ones by name.
    """
    header: dict[str, Any] = {}
    for path in folder.glob("model*.safetensors"):
        with path.open("rb") as file:
            header |= json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        module, _, leaf = name.rpartition(".")
        packed = f"{module}.scales" in header
        shape, bits = tuple(entry["shape"]), 0
        if packed and leaf in {"scales", "biases"}:
            continue
        if packed and leaf == "weight":
            own = quantization.get(module)
            bits = own["bits"] if isinstance(own, dict) else quantization["bits"]
            shape = (*shape[:-1], shape[-1] * 32 // bits)
        tensors.append(Tensor(name, shape, bits))
    return tensors


def _joined_bytes(tensors: list[Tensor], width: int) -> float:
    return sum(tensor.bytes(width, 0) for tensor in tensors if _JOINED.search(tensor.name))


def _full_bytes(config: Config, tensors: list[Tensor], width: int) -> float:
    """What training all weights adds to them."""
    # Half-precision weights are moved in float32, or small steps would be lost.
    masters = 4 if width < 4 else 0
    reference = width if config.objective.kl_coeff else 0
    optimizer = config.learner.optimizer
    total = 0
    for tensor in tensors:
        by_adamw = optimizer == "muon" and not (len(tensor.shape) == 2 and _IN_LAYER.search(tensor.name))
        state = _STATE_BYTES["adamw" if by_adamw else optimizer]
        total += tensor.size * (_GRADIENT_BYTES + state + masters + reference)
    return total


def _adapter_bytes(config: Config, tensors: list[Tensor], layers: int) -> float:
    """An adapter, which is float32 whatever its base is, and its training."""
    model = config.model
    first = 0 if model.lora_layers < 0 else layers - model.lora_layers
    size = 0
    for tensor in tensors:
        place = _IN_LAYER.search(tensor.name)
        if place is None or len(tensor.shape) < 2 or int(place[1]) < first:
            continue
        if not model.lora_keys or place[2] in model.lora_keys:
            *stack, rows, columns = tensor.shape
            magnitudes = rows if model.fine_tune_type == "dora" else 0
            size += prod(stack) * (model.lora_rank * (rows + columns) + magnitudes)
    reference = 4 if config.objective.kl_coeff else 0
    return size * (4 + _GRADIENT_BYTES + _STATE_BYTES[config.learner.optimizer] + reference)


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
    places = rollout.batch_groups * rollout.num_generations
    if rollout.max_kv_tokens:
        places = min(places, max(1, rollout.max_kv_tokens // tokens))
    return int(per_token * width * tokens * places)


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
