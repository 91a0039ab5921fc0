"""Bound the memory of each process of a run from the model's files and the settings, before anything is loaded.

This is the one plan: it decides how many processes a device has room for (`placement`), `--dry-run` prints it, a run that it
proves impossible is refused (`fit`), and the processes are limited to it (`fit.limited`).
"""

from collections.abc import Mapping, Sequence
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
from grpo_actors.supervisor.model_files import Tensor, Widths, read_json, read_tensors
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
    name = config.model.model_name
    require_divisible(name, architecture, config.rollout.rollout_ranks, "rollout.rollout_ranks")
    require_divisible(
        name, architecture, config.learner.model_ranks, "learner.ranks with divide_model", trains=True
    )
    tensors = read_tensors(folder, architecture.get("quantization", {}))
    model = _Model(architecture, tensors, config, machine)
    return Plan(
        parameters=sum(tensor.size for tensor in tensors),
        float_bytes=model.width,
        learner=model.learner(),
        worker=model.worker(),
        evaluator=model.evaluator() if config.evaluator.eval_every_updates else None,
        is_whole=bool(model.widths.layers),
        snapshot=model.parts.snapshot,
    )


class _Model:
    """What the processes of a run need for its model."""

    def __init__(
        self,
        architecture: dict[str, Any],
        tensors: Sequence[Tensor],
        config: Config,
        machine: Machine,
    ) -> None:
        self.architecture, self.tensors, self.config, self.machine = architecture, tensors, config, machine
        self.on_cuda = machine.back_end == "cuda"
        self.widths = Widths.of(architecture)
        #: Bytes of a float.
        self.width = _float_bytes(config.model.dtype, architecture, machine)
        #: What is trained.
        layers = text_part(architecture).get("num_hidden_layers", 0)
        self.parts = trained(config, tensors, layers, self.width)
        self.adapter = self.parts.weights if config.model.fine_tune_type != "full" else 0.0

    def learner(self) -> Need:
        """Return what a rank of the learner needs."""
        config, ranks = self.config, self.config.learner.model_ranks
        activations = activation_bytes(
            config,
            ARCHITECTURES.get(str(self.architecture.get("model_type")), Architecture()),
            widths=self.widths.of_rank(ranks),
            parts=self.parts,
            width=self.width,
            back_end=self.machine.back_end,
        )
        at_times = {
            "activations": activations,
            # The former version, until it is copied to where the workers fetch it.
            "publication": self.parts.weights,
            CHECKPOINT: 0.0 if self.on_cuda else self.parts.snapshot,
        }
        if config.rollout.workers == 0:  # it samples with its own weights
            worker = self.worker()
            at_times |= {name: worker.at_times[name] for name in ("copies of weights", "KV cache", "a step")}
        return Need(
            held={
                "weights": self._base(config.model.base_bits, ranks) + self.adapter,
                "training": self.parts.training,
            },
            at_times=at_times,
            reused=min(activations, CUDA_KEPT_BYTES) if self.on_cuda else activations,
            context=self._context,
            slack=CUDA_LEARNER_SLACK if self.on_cuda else 0.0,
        )

    def worker(self) -> Need:
        """Return what a rank of a worker needs."""
        rollout = self.config.rollout
        bits = self.config.model.base_bits or (rollout.rollout_bits if rollout.quantize_for_rollouts else 0)
        return self._sampler(worker_batch(self.config), bits, rollout.rollout_ranks, rollout.kv_bits)

    def evaluator(self) -> Need:
        """Return what the evaluator needs."""
        return self._sampler(evaluator_batch(self.config), self.config.model.base_bits)

    def _sampler(self, batch: Batch, bits: int, ranks: int = 1, kv_bits: int = 0) -> Need:
        """Return what a process needs that samples such a batch, one of `ranks` that divide the model."""
        widths = self.widths.of_rank(ranks)
        step = step_bytes(widths, batch, self.width)
        copied = self.on_cuda and not (bits or kv_bits) and ranks == 1
        return Need(
            held={"weights": self._base(bits, ranks) + self.adapter},
            at_times={
                "copies of weights": joined_bytes(self.tensors, self.width, self.machine.device_bytes)
                if copied
                else 0.0,
                "KV cache": cache_bytes(widths, batch, self.width, kv_bits),
                # New weights arrive between two steps.
                "a step": max(step, self.parts.weights),
            },
            reused=step,
            context=self._context,
            slack=CUDA_SLACK if self.on_cuda else 0.0,
        )

    def _base(self, bits: int, ranks: int) -> float:
        return divided_bytes(self.tensors, self.width, bits, ranks)

    @property
    def _context(self) -> float:
        return CUDA_CONTEXT_BYTES if self.on_cuda else 0.0


def _float_bytes(dtype: str, architecture: Mapping[str, Any], machine: Machine) -> int:
    """Return the bytes of a float in the model, as `policy.model.resolve_dtype` chooses its type."""
    if dtype == "auto" and machine.back_end != "cpu":
        dtype = stored_dtype(architecture) or "bfloat16"
    return _BYTES.get(dtype, 4 if machine.back_end == "cpu" else 2)


def gb(count: float) -> str:
    """Format bytes: ``1.23 GB``."""
    return f"{count / 1e9:.2f} GB"
