"""Bound the memory of each process of a run from the model's files and the settings, before anything is loaded.

This is the one plan: it decides how many processes a device has room for (`placement`), `--dry-run` prints it, a run that it
proves impossible is refused (`fit`), and the processes are limited to it (`fit.limited`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from grpo_actors.config import Config
from grpo_actors.policy.architectures import ARCHITECTURES, Architecture, require_divisible
from grpo_actors.policy.config_dtype import stored_dtype
from grpo_actors.policy.config_json import text_part
from grpo_actors.supervisor.learner_memory import activation_bytes, trained
from grpo_actors.supervisor.machine import Machine
from grpo_actors.supervisor.model_files import Widths, read_json, read_tensors
from grpo_actors.supervisor.sampling_memory import (
    Batch,
    cache_bytes,
    divided_bytes,
    evaluator_batch,
    joined_bytes,
    step_bytes,
    worker_batch,
)

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: GPU memory of a process on CUDA besides its arrays: driver context and kernels.
CUDA_CONTEXT_BYTES = 1_300_000_000
#: What the driver's memory pool holds of it beyond the arrays, as a share of them; more in the learner, whose arrays have
#: many sizes. All three were read from nvidia-smi (H200).
CUDA_SLACK, CUDA_LEARNER_SLACK = 0.12, 0.3
#: Freed arrays that MLX may keep in the learner on CUDA. The driver's pool, to which the others return, divides and joins
#: its pieces; pieces of ever new sizes that MLX keeps only take memory.
CUDA_KEPT_BYTES = 3_000_000_000
#: What a process of a run does.
Role = Literal["learner", "worker", "evaluator"]
#: The purpose of the arrays that are held while a checkpoint is written.
CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Need:
    """The most memory that one process takes, in bytes by purpose."""

    #: Held from the start to the end.
    held: Mapping[str, float] = field(default_factory=dict)
    #: Held at times; the plan counts all of it at the same time.
    at_times: Mapping[str, float] = field(default_factory=dict)
    #: Freed arrays that MLX may keep: those that the next micro-batch or step allocates again.
    reused: float = 0.0
    #: Memory of the device that is not of arrays: a part that is always there, and one that grows with the arrays.
    context: float = 0.0
    slack: float = 0.0

    @cached_property
    def arrays(self) -> float:
        """Bytes of all arrays."""
        return sum(self.held.values()) + sum(self.at_times.values())

    @property
    def checkpoint(self) -> float:
        """Bytes of the arrays that are held while a checkpoint is written; part of `at_times`."""
        return self.at_times.get(CHECKPOINT, 0.0)

    @property
    def total(self) -> float:
        """All bytes."""
        return self.arrays + self.overhead

    @property
    def overhead(self) -> float:
        """Bytes that are not of arrays."""
        return self.context + self.slack * self.arrays

    @property
    def certain(self) -> float:
        """Bytes without which the process cannot work at all."""
        return sum(self.held.values()) + self.context

    def __str__(self) -> str:
        parts = {**self.held, **self.at_times, "CUDA": self.overhead}
        return f"{gb(self.total)}: " + ", ".join(f"{name} {gb(size)}" for name, size in parts.items() if size)


@dataclass(frozen=True, slots=True)
class Plan:
    """The memory of each process of a run."""

    parameters: int
    float_bytes: int
    learner: Need
    #: Of each rank of a worker.
    worker: Need
    #: None without an evaluator.
    evaluator: Need | None
    #: Whether activations and caches are counted: the model's config.json tells its widths.
    is_whole: bool = True
    #: Bytes of the arrays in a checkpoint. On CUDA they are copied to the host's memory.
    snapshot: float = 0.0

    def of(self, role: Role) -> Need:
        """Return the memory of one process of a role."""
        needs = {"learner": self.learner, "worker": self.worker, "evaluator": self.evaluator}
        return needs[role] or Need()


def plan_of(folder: Path, config: Config, machine: Machine) -> Plan:
    """Bound the memory of a run of the model in `folder` on a machine.

    Raises:
        ModelError: Its files cannot be read.
        ConfigError: It cannot be divided among ranks as configured.
    """
    architecture = read_json((folder / "config.json").read_bytes(), folder / "config.json")
    ranks, learner_ranks = config.rollout.rollout_ranks, config.learner.model_ranks
    name = config.model.model_name
    require_divisible(name, architecture, ranks, "rollout.rollout_ranks")
    require_divisible(name, architecture, learner_ranks, "learner.ranks with divide_model", trains=True)
    tensors = read_tensors(folder, architecture.get("quantization", {}))
    widths, back_end = Widths.of(architecture), machine.back_end
    width = _float_bytes(config.model.dtype, architecture, machine)
    bits = config.model.base_bits
    rollout_bits = bits or (config.rollout.rollout_bits if config.rollout.quantize_for_rollouts else 0)
    base = divided_bytes(tensors, width, bits)
    sampling = divided_bytes(tensors, width, rollout_bits, ranks)
    parts = trained(config, tensors, text_part(architecture).get("num_hidden_layers", 0), width)
    adapter = parts.weights if config.model.fine_tune_type != "full" else 0.0
    on_cuda = back_end == "cuda"
    context, slack = (CUDA_CONTEXT_BYTES, CUDA_SLACK) if on_cuda else (0.0, 0.0)
    joined = joined_bytes(tensors, width, machine.device_bytes) if on_cuda else 0.0

    def sampler(weights: float, copies: float, batch: Batch, widths: Widths, kv_bits: int = 0) -> Need:
        step = step_bytes(widths, batch, width)
        return Need(
            held={"weights": weights + adapter},
            at_times={
                "copies of weights": copies,
                "KV cache": cache_bytes(widths, batch, width, kv_bits),
                # New weights arrive between two steps.
                "a step": max(step, parts.weights),
            },
            reused=step,
            context=context,
            slack=slack,
        )

    cache_bits = config.rollout.kv_bits
    copies = 0.0 if rollout_bits or cache_bits or ranks > 1 else joined
    worker = sampler(sampling, copies, worker_batch(config), widths.of_rank(ranks), cache_bits)
    known = ARCHITECTURES.get(str(architecture.get("model_type")), Architecture())
    activations = activation_bytes(
        config,
        known,
        widths=widths.of_rank(learner_ranks),
        parts=parts,
        width=width,
        back_end=back_end,
    )
    at_times = {
        "activations": activations,
        # The former version, until it is copied to where the workers fetch it.
        "publication": parts.weights,
        CHECKPOINT: 0.0 if on_cuda else parts.snapshot,
    }
    if config.rollout.workers == 0:  # the learner samples with its own weights
        at_times |= {name: worker.at_times[name] for name in ("copies of weights", "KV cache", "a step")}
    return Plan(
        parameters=sum(tensor.size for tensor in tensors),
        float_bytes=width,
        learner=Need(
            held={
                "weights": divided_bytes(tensors, width, bits, learner_ranks) + adapter,
                "training": parts.training,
            },
            at_times=at_times,
            reused=min(activations, CUDA_KEPT_BYTES) if on_cuda else activations,
            context=context,
            slack=CUDA_LEARNER_SLACK if on_cuda else 0.0,
        ),
        worker=worker,
        evaluator=sampler(base, 0.0 if bits else joined, evaluator_batch(config), widths)
        if config.evaluator.eval_every_updates
        else None,
        is_whole=bool(widths.layers),
        snapshot=parts.snapshot,
    )


def _float_bytes(dtype: str, architecture: Mapping[str, Any], machine: Machine) -> int:
    """Return the bytes of a float in the model, as `policy.model.resolve_dtype` chooses its type."""
    if dtype == "auto" and machine.back_end != "cpu":
        dtype = stored_dtype(architecture) or "bfloat16"
    return _BYTES.get(dtype, 4 if machine.back_end == "cpu" else 2)


def gb(count: float) -> str:
    """Format bytes: ``1.23 GB``."""
    return f"{count / 1e9:.2f} GB"
