"""Compare the memory plan with the machine: show it, refuse a run that cannot fit, and limit each process."""

from dataclasses import replace
from pathlib import Path

from grpo_actors.config import Config
from grpo_actors.errors import ConfigError
from grpo_actors.out_of_memory import CURES
from grpo_actors.policy.locate import locate
from grpo_actors.supervisor.machine import Machine, Share
from grpo_actors.supervisor.memory_plan import Need, Plan, gb, plan_of
from grpo_actors.supervisor.room import room_of

_CURES_OF_WEIGHTS = (
    'set model.fine_tune_type = "lora" (and base_bits = 4), lower rollout.workers, or take a smaller model'
)


def find_plan(config: Config, machine: Machine) -> Plan | None:
    """Return the run's plan; None if the model's files are not on this machine yet."""
    folder = locate(config.model.model_name)
    return plan_of(folder, config, machine) if isinstance(folder, Path) else None


def plan_text(config: Config, machine: Machine) -> str:
    """Format the plan, one line per process and the total; a single line if it is not known."""
    plan, wanted = find_plan(config, machine), config.rollout.workers
    lines = []
    if plan is None:
        lines.append(f"{config.model.model_name} is on the hub: its size is known once it is downloaded")
    else:
        count = 1 if wanted == "auto" else wanted
        lines.append(f"{plan.parameters / 1e6:,.1f} M parameters, floats of {plan.float_bytes} bytes")
        lines.append(f"learner    {plan.learner}")
        lines += [f"rollout-{number}  {plan.worker}" for number in range(count)]
        if wanted == "auto":
            lines.append("each further worker: the same")
        if plan.evaluator is not None:
            lines.append(f"evaluator  {plan.evaluator}")
        lines.append(f"total      {gb(plan.total(count))} at most, of {_of(machine)}")
        if machine.back_end == "cuda":
            lines.append(f"host       {gb(plan.snapshot)}: the copy from which checkpoints are written")
        if not plan.is_whole:
            lines.append(
                "config.json does not tell the model's widths: no activations and KV caches are counted"
            )
        elif warning := tight(plan, count, machine):
            lines.append(warning)
    if wanted == "auto":
        lines.append(f"rollout workers: {room_of(config, machine)}")
    return "\n".join(lines)


def tight(plan: Plan, workers: int, machine: Machine) -> str | None:
    """Return a warning if a run may need more memory than there is."""
    usable = machine.usable_bytes
    if usable is None or plan.total(workers) <= usable:
        return None
    return f"it may need more than the {gb(usable)} that a run may use; if it runs out of memory: {', or '.join(CURES.values())}"


def check_memory(config: Config, machine: Machine) -> None:
    """Check that weights, training state and contexts alone fit.

    Raises:
        ConfigError: They do not; one line with the cure.
    """
    plan, memory = find_plan(config, machine), machine.device_bytes
    if plan is None or memory is None:
        return
    workers = 1 if config.rollout.workers == "auto" else config.rollout.workers
    certain = plan.certain(workers)
    if certain > memory:
        raise ConfigError(
            f"memory: weights and training state must fit into {_of(machine)}, got {gb(certain)} "
            f"(learner {gb(plan.learner.certain)}, each of {workers} workers {gb(plan.worker.certain)}); {_CURES_OF_WEIGHTS}"
        )


def scale(plan: Plan, workers: int, machine: Machine) -> float:
    """Return the share of its plan that each process may use: 1 if all fit at the same time."""
    usable = machine.usable_bytes
    return 1.0 if usable is None else min(1.0, usable / plan.total(workers))


def limited(share: Share, need: Need, fits: float) -> Share:
    """Return a process's share with the limits of its plan, of which it may use the part `fits`.

    The learner may hold a checkpoint's arrays only if everything fits: MLX refuses no memory beyond a limit.
    """
    checkpoint = need.checkpoint if fits == 1 else 0.0
    memory = need.arrays * fits - checkpoint
    return replace(
        share,
        memory_bytes=max(1, int(memory)),
        cache_bytes=max(1, int(min(need.reused, memory / 2))),
        checkpoint_bytes=int(checkpoint),
    )


def _of(machine: Machine) -> str:
    known = machine.device_bytes
    owner = "the GPU's" if machine.back_end == "cuda" else "the machine's"
    return f"{owner} memory, which nvidia-smi does not tell" if known is None else f"{owner} {gb(known)}"
