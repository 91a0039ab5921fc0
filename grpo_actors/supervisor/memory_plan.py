"""Estimate the memory of each process of a run from the model's files, before anything is loaded.

The estimate covers weights, gradients, optimizer and KV cache. It does not cover the learner's activations: they
depend on the architecture, grow with a micro-batch's tokens, and shrink with learner.gradient_checkpointing.
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
#: Number of quantised weights that share a scale and an offset, both of the model's dtype.
_GROUP_SIZE = 64
#: Bytes of a gradient: gradients and optimizer state are float32.
_GRADIENT_BYTES = 4
#: Bytes per weight for the running means of its gradient and of the gradient's square. Adafactor keeps only a row and
#: a column of these, counted as 0.
_STATE_BYTES = {"adamw": 8, "adam": 8, "lion": 4, "adafactor": 0, "muon": 4}
#: Projections that one joined matrix product can replace.
_JOINED = re.compile(r"\b(q|k|v|gate|up)_proj\.weight$")
#: A weight in a layer; the groups are the layer's number and the module's name within the layer.
_IN_LAYER = re.compile(r"\blayers\.(\d+)\.(.+)\.weight$")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the model's files. A quantised tensor has the shape of the unpacked weights."""

    name: str
    shape: tuple[int, ...]
    #: Bits per element if the tensor is quantised in the file, else 0.
    bits: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def bytes(self, width: int, bits: int) -> float:
        """Return its bytes in a process.

        Args:
            width: Bytes of a float in that process.
            bits: Bits to which the process quantises tensors that are not quantised yet; 0: it does not.
        """
        divides = len(self.shape) >= 2 and self.shape[-1] % _GROUP_SIZE == 0
        bits = self.bits or (bits if divides else 0)
        return self.size * (bits / 8 + 2 * width / _GROUP_SIZE) if bits else self.size * width


@dataclass(frozen=True, slots=True)
class Plan:
    """Estimated bytes of each process."""

    parameters: int
    float_bytes: int
    learner: float
    #: Bytes of one worker without its KV cache.
    worker: float
    #: Bytes of a worker's KV cache at most.
    cache: float
    evaluator: float
    #: Bytes of the weights that are copied for sampling on CUDA (`policy.decoding.blocks`); 0 if they are quantised.
    joined: float = 0.0


def memory_plan(config: Config) -> str:
    """Format the estimate, one line per process; a single line if the model's files are not on this machine yet."""
    folder = locate(config.model.model_name)
    if not isinstance(folder, Path):
        return f"{folder} is on the hub: its size is known once it is downloaded"
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
    """Estimate the memory of a run of the model in `folder`."""
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
    """List all tensors from the headers of the safetensors files, without loading weights.

    Args:
        folder: The model folder.
        quantization: The entry of that name in its config.json: the default ``bits``, and settings of single modules
            by name.
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
    """Return the bytes that training all weights adds to the weights themselves."""
    # Half-precision weights are updated as float32 copies, or small steps would be lost.
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
    """Return the bytes of an adapter, which is always float32, and of its training."""
    model = config.model
    first = 0 if model.lora_layers < 0 else layers - model.lora_layers
    size = 0
    for tensor in tensors:
        match = _IN_LAYER.search(tensor.name)
        if match is None or len(tensor.shape) < 2 or int(match[1]) < first:
            continue
        if not model.lora_keys or match[2] in model.lora_keys:
            *stack, rows, columns = tensor.shape
            magnitudes = rows if model.fine_tune_type == "dora" else 0
            size += prod(stack) * (model.lora_rank * (rows + columns) + magnitudes)
    reference = 4 if config.objective.kl_coeff else 0
    return size * (4 + _GRADIENT_BYTES + _STATE_BYTES[config.learner.optimizer] + reference)


def _cache_bytes(architecture: dict[str, Any], config: Config, width: int) -> int:
    """Return the bytes of keys and values of one batch at its longest; 0 if config.json lacks the shape."""
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
    rows = rollout.batch_groups * rollout.num_generations
    if rollout.max_kv_tokens:
        rows = min(rows, max(1, rollout.max_kv_tokens // tokens))
    return int(per_token * width * tokens * rows)


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"
