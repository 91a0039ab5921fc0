"""The embedding of a model: which token ids it can read.

MLX checks no index. An id beyond the rows of the embedding reads other memory, and its gradient is written there.
"""

from typing import Any

import mlx.core as mx
from mlx import nn

_KINDS = (nn.Embedding, nn.QuantizedEmbedding)


def embedding_rows(model: Any) -> int | None:
    """Return the rows of the model's token embedding; None if it looks its tokens up in another way.

    An architecture may have more embeddings, of positions or of token pairs: the one meant is the one that is given the
    tokens themselves. So one token runs through the model; nothing is computed, because a shape needs no values.
    """
    tokens, found = mx.array([[1]]), []
    originals = {kind: kind.__call__ for kind in _KINDS}

    def recording(kind: Any) -> Any:
        def call(module: Any, x: mx.array) -> mx.array:
            if x is tokens:
                found.append(int(module.weight.shape[0]))
            embedded: mx.array = originals[kind](module, x)
            return embedded

        return call

    for kind in _KINDS:
        kind.__call__ = recording(kind)
    try:
        model(tokens)
    finally:
        for kind, original in originals.items():
            kind.__call__ = original
    return min(found, default=None)


def trained_embedding(model: nn.Module) -> nn.Module | None:
    """Return an embedding whose rows train; None if none does."""
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return next((table for table in tables if "weight" in table.trainable_parameters()), None)
