"""Compute the layers that are recurrent over a text in ways that suit whole texts and their gradient."""

import contextlib
from collections.abc import Iterator
from typing import Any

from grpo_actors.policy.gated_delta import delta_by_chunks
from grpo_actors.policy.short_convolution import convolutions_by_shifts


@contextlib.contextmanager
def for_whole_texts(model: Any) -> Iterator[None]:
    """Compute a model's linear attention and short convolutions for whole texts within this block.

    Backward passes must lie within the block too. This patches the layers' modules, for every thread.
    """
    with delta_by_chunks(model), convolutions_by_shifts(model):
        yield
