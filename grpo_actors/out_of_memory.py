"""Running out of memory: how to recognise it, and which settings to lower, for each process of a run.

MLX has no exception of its own for it: an accelerator's error is a RuntimeError with the driver's words, or a line of C++
on stderr if it came up in one of MLX's threads. Loads no MLX.
"""

import re
from typing import Literal

from grpo_actors.errors import GrpoActorsError, first_line

Role = Literal["learner", "worker", "evaluator"]

#: What to change if the memory is not enough, in the order in which it costs least.
CURES: dict[Role, str] = {
    "learner": "lower learner.batch_size (and raise gradient_accumulation_steps: the gradient stays the same) or "
    "max_prompt_length, or set learner.gradient_checkpointing = true",
    "worker": "lower rollout.batch_groups or rollout.workers, or bound the batch with rollout.max_kv_tokens; "
    "rollout.kv_bits = 8 halves its cache",
    "evaluator": "lower evaluator.eval_batch_size",
}

#: The words of CUDA, cuBLAS, Metal, MLX's allocators and C++.
_WORDS = re.compile(
    r"out[ _]?of[ _]?memory|insufficient memory|unable to allocate|attempting to allocate|alloc_failed|bad_alloc",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that there is no memory, or was raised because of one that does."""
    # The text of an error of our own may quote anything.
    own = None if isinstance(error, GrpoActorsError) else error
    return any(
        isinstance(cause, MemoryError) or (cause is not None and says_out_of_memory(str(cause)))
        for cause in (own, error.__cause__)
    )


def says_out_of_memory(text: str) -> bool:
    """Return whether a line of text says that there is no memory."""
    return bool(_WORDS.search(text))


def refusal(error: BaseException, role: Role) -> str:
    """Return the line for the user: what failed, and what to change."""
    return (
        f"out of memory ({first_line(error)}); {CURES[role]}; "
        "grpo train --dry-run shows what each process needs"
    )


def role_of(name: str) -> Role:
    """Return the role of a process of the supervisor by its name."""
    return "learner" if name == "learner" else "evaluator" if name == "evaluator" else "worker"
