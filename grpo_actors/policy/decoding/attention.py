"""Decide whether the kernel over `slots` can replace a model's attention on this machine."""

from typing import Any

from grpo_actors.policy.attention import Callers, keeps_all_positions
from grpo_actors.policy.decoding.slot_kernels import HEAD_SIZES
from grpo_actors.policy.device import on_cuda


def callers(model: Any) -> Callers | bool:
    """Return the modules that call attention, if the kernel can replace all of the calls here; else False."""
    if not on_cuda() or not keeps_all_positions(model):
        return False
    found = Callers(model)
    sizes = found.sizes(model)
    alike = (
        len(sizes) == len(model.layers) and len(set(sizes)) == 1
    )  # one array holds the cache of all layers
    fit = alike and sizes[0][1] == sizes[0][2] and sizes[0][1] in HEAD_SIZES
    return found if fit else False
