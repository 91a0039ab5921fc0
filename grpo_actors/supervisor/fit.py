"""Compare the memory plan with each device: show it, refuse a run that cannot fit, and limit each process."""

from collections.abc import Mapping
from dataclasses import replace

from grpo_actors.config import Config
from grpo_actors.devices import Device
from grpo_actors.errors import ConfigError
from grpo_actors.out_of_memory import CURES
from grpo_actors.supervisor.allocation import Allocation
from grpo_actors.supervisor.machine import Share
from grpo_actors.supervisor.memory_plan import Need, Plan, gb
from grpo_actors.supervisor.placement import Placement

_CURES_OF_WEIGHTS = (
    'set model.fine_tune_type = "lora" (and base_bits = 4), lower rollout.workers, or take a smaller model'
)


def plan_text(config: Config, allocation: Allocation) -> str:
    """Format where each process computes and the memory that it takes, device by device."""
    machine, plan, placement = allocation.machine, allocation.plan, allocation.placement
    lines = []
    if plan is None:
        lines.append(f"{config.model.model_name} is on the hub: its size is known once it is downloaded")
    else:
        lines.append(f"{plan.parameters / 1e6:,.1f} M parameters, floats of {plan.float_bytes} bytes")
    for device in machine.devices:
        lines += _lines_of(device, plan, placement)
    if plan is not None:
        if machine.back_end == "cuda":
            lines.append(f"host       {gb(plan.snapshot)}: the copy from which checkpoints are written")
        if not plan.is_whole:
            lines.append(
                "config.json does not tell the model's widths: no activations and KV caches are counted"
            )
        else:
            lines += tight(plan, placement)
    if config.rollout.workers == "auto":
        where = ", ".join(dict.fromkeys(device.name for devices in placement.further for device in devices))
        if where:
            lines.append(f"each further worker: the same, on {where}")
        lines.append(f"rollout workers: {allocation.room}")
    return "\n".join(lines)


def _lines_of(device: Device, plan: Plan | None, placement: Placement) -> list[str]:
    names = [name for name, _, place in placement.actors() if place == device]
    if not names:
        return [f"{device.name}: idle"]
    if plan is None:
        return [f"{device.name}: {', '.join(names)}"]
    needs = needs_on(device, plan, placement)
    total = sum(need.total for need in needs.values())
    lines = [f"{device.name}: {gb(total)} at most, of {_memory_of(device)}"]
    return lines + [f"  {name:10} {need}" for name, need in needs.items()]


def needs_on(
    device: Device, plan: Plan, placement: Placement, *, all_workers: bool = False
) -> Mapping[str, Need]:
    """Return process -> the memory that it takes, for those on a device; with `all_workers`, also those that may follow."""
    actors = placement.actors(all_workers=all_workers)
    return {name: plan.of(role) for name, role, place in actors if place == device}


def tight(plan: Plan, placement: Placement) -> list[str]:
    """Return a warning for each device on which a run may need more memory than there is."""
    return [
        f"{device.name}: it may need more than the {gb(device.usable_bytes or 0.0)} that a run may use; "
        f"if it runs out of memory: {', or '.join(CURES.values())}"
        for device in dict.fromkeys(place for _, _, place in placement.actors())
        if scale(plan, placement, device) < 1
    ]


def check_memory(allocation: Allocation) -> None:
    """Check that weights, training state and contexts alone fit on each device.

    Raises:
        ConfigError: They do not; one line with the cure.
    """
    plan, devices = allocation.plan, allocation.machine.devices
    if plan is None:
        return
    for device in devices:
        needs = needs_on(device, plan, allocation.placement)
        certain = {name: need.certain for name, need in needs.items()}
        if device.memory_bytes is not None and sum(certain.values()) > device.memory_bytes:
            parts = ", ".join(f"{name} {gb(size)}" for name, size in certain.items())
            elsewhere = (
                ", or set rollout.rollout_devices or evaluator.evaluator_device to another GPU"
                if len(devices) > 1
                else ""
            )
            raise ConfigError(
                f"memory: weights and training state must fit into {_memory_of(device)} of {device.name}, got "
                f"{gb(sum(certain.values()))} ({parts}); {_CURES_OF_WEIGHTS}{elsewhere}"
            )


def scale(plan: Plan, placement: Placement, device: Device) -> float:
    """Return the share of its plan that each process on a device may use: 1 if all fit at the same time."""
    usable, needs = device.usable_bytes, needs_on(device, plan, placement, all_workers=True)
    total = sum(need.total for need in needs.values())
    return 1.0 if usable is None or not total else min(1.0, usable / total)


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


def _memory_of(device: Device) -> str:
    known = device.memory_bytes
    return "memory that nvidia-smi does not tell" if known is None else gb(known)
