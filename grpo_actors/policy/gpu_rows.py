"""Sizes of a micro-batch on a GPU: its rows, and the parts of head and gradient. Loads no MLX: memory planning uses it too."""

#: A row has a multiple of this many tokens, so that a few shapes hold all updates: each costs a third of a second once.
#: MLX has a fused gradient of attention for multiples of 128 only.
PACKED_ROW = 1024
#: The same for a model that computes one completion in a row.
ROW = 128
#: Most positions whose logits exist at the same time (`logprobs`): enough to keep a GPU busy.
HEAD_ROWS = 1024
#: Elements of float32 arrays that several ranks add up at the same time: enough for a collective's full speed, and small next
#: to the gradient. Of a gradient that is divided, so many are computed and dropped together.
GRADIENT_PART = 2**26


def cuda_row(*, packed: bool) -> int:
    """Return the number of which a row's length is a multiple; `packed`: whether completions share rows."""
    return PACKED_ROW if packed else ROW
