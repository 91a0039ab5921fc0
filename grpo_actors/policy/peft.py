"""Translate the arrays of a LoRA or DoRA between PEFT and mlx-lm, without a change of what they compute.

    PEFT    y = W x + s · B (A x),        A [r, in], B [out, r]
    mlx-lm  y = W x + s · (x a) b,        a [in, r], b [r, out]

So a = Aᵀ and b = Bᵀ. For embeddings, PEFT stores A [r, tokens] and B [out, r], mlx-lm a [tokens, r] and b [r, out]. The
magnitudes of DoRA's rows are the same [out]. Experts are one module in mlx-lm and many in PEFT.
"""

import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

from grpo_actors.config.peft_folder import (
    BASE_COPY,
    EMBEDDING_A,
    EMBEDDING_B,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    PREFIX,
    PeftAdapter,
)
from grpo_actors.errors import ModelError

_TAIL = re.compile(r"(?:^|\.)(layers\.\d+\..+|[^.]+)$")
#: Largest difference of a base's values from the copy in a PEFT folder, which may have another type: 2^-7 of 1.
_SAME = 8e-3


def from_peft(
    adapter: PeftAdapter, stored: Mapping[str, mx.array], model: nn.Module, rank: int, scale: float
) -> dict[str, mx.array]:
    """Return the arrays of a PEFT adapter under the names of `model`, with one rank and scale for all.

    Args:
        adapter: Its description.
        stored: Content of its file.
        model: The model with a new adapter on the same modules.
        rank: Rank of the new adapter; lower ranks are filled up with zeros.
        scale: Scale of the new adapter; other scales become a factor on B.

    Raises:
        ModelError: a module has no counterpart, or computes something else in mlx-lm.
    """
    modules = dict(model.named_modules())
    arrays: dict[str, mx.array] = {}
    for theirs in adapter.ranks:
        ours = _counterpart(theirs, modules)
        factor = adapter.scale(theirs) / scale

        def read(end: str, theirs: str = theirs) -> mx.array:
            return stored[f"{PREFIX}{theirs}{end}"].astype(mx.float32)

        if isinstance(modules[ours], LoRAEmbedding):
            if _is_tied(model):
                raise ModelError(
                    f"{theirs}: mlx-lm adapts a tied embedding as output head too, PEFT does not; "
                    "merge the adapter with peft's merge_and_unload and train the merged model"
                )
            _check_copy(theirs, modules[ours].embedding, stored.get(f"{PREFIX}{theirs}{BASE_COPY}"))
            a, b = read(EMBEDDING_A), read(EMBEDDING_B)
        elif isinstance(modules[ours], LoRALinear | DoRALinear):
            a, b = read(LORA_A), read(LORA_B)
        else:
            raise ModelError(
                f"{theirs}: a PEFT adapter cannot be continued on a {type(modules[ours]).__name__}"
            )
        missing = rank - a.shape[0]
        arrays[f"{ours}.lora_a"] = mx.pad(a, [(0, missing), (0, 0)]).T
        arrays[f"{ours}.lora_b"] = mx.pad(factor * b, [(0, 0), (0, missing)]).T
        if isinstance(modules[ours], DoRALinear):
            name = f"{PREFIX}{theirs}{MAGNITUDE}"
            magnitudes = stored[name] if name in stored else stored[f"{name}.weight"]
            arrays[f"{ours}.m"] = magnitudes.astype(mx.float32).reshape(-1)
    return arrays


def to_peft(
    model: nn.Module, base: str | None, stored_names: set[str]
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Return the arrays and the adapter_config.json that peft loads.

    Args:
        model: A model with an adapter.
        base: Name of its base; None if it has none that others know.
        stored_names: Names of the arrays in the base's files; transformers uses the same.

    Raises:
        ModelError: peft has no name or no form for a module.
    """
    arrays: dict[str, mx.array] = {}
    adapted: list[str] = []
    rank, scale, has_dora = 0, 0.0, False
    for name, module in model.named_modules():
        if "lora_a" not in module:
            continue
        if (
            not isinstance(module, LoRALinear | DoRALinear | LoRAEmbedding)
            or f"{name}.weight" not in stored_names
        ):
            raise ModelError(
                f"--peft: peft has no counterpart of {name}, a {type(module).__name__}; take --adapter or --fuse"
            )
        a, b = module.lora_a.T, module.lora_b.T
        rank, scale, has_dora = a.shape[0], module.scale, has_dora or isinstance(module, DoRALinear)
        adapted.append(name)
        ends = (EMBEDDING_A, EMBEDDING_B) if isinstance(module, LoRAEmbedding) else (LORA_A, LORA_B)
        arrays |= {f"{PREFIX}{name}{end}": array for end, array in zip(ends, (a, b), strict=True)}
        if isinstance(module, DoRALinear):
            arrays[f"{PREFIX}{name}{MAGNITUDE}"] = module.m
        if isinstance(module, LoRAEmbedding) and _is_tied(model):
            # Here the head is the adapted embedding; in peft it is a module of its own: W + s · a b, so A = b and B = a.
            adapted.append("lm_head")
            arrays |= {f"{PREFIX}lm_head{LORA_A}": b.T, f"{PREFIX}lm_head{LORA_B}": a.T}
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "use_dora": has_dora,
        "bias": "none",
        "inference_mode": True,
        "target_modules": _targets(model, adapted),
    }
    return {name: mx.contiguous(array) for name, array in arrays.items()}, described


def _counterpart(theirs: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the name of an adapted module: the same, or the only one that ends alike, as in models with several parts."""
    adapted = [name for name, module in modules.items() if "lora_a" in module]
    if theirs in adapted:
        return theirs
    match = _TAIL.search(theirs)
    alike = [name for name in adapted if match and f".{name}".endswith(f".{match[1]}")]
    if len(alike) != 1:
        raise ModelError(
            f"{theirs}: the PEFT adapter has this module, and the model has none of that name to adapt"
        )
    return alike[0]


def _targets(model: nn.Module, adapted: list[str]) -> list[str]:
    """Return the shortest names that mean exactly the adapted modules: peft matches the end of a name."""
    everywhere = [name for name, _ in model.named_modules()]
    targets: set[str] = set()
    for name in adapted:
        leaf = name.rpartition(".")[2]
        meant = {other for other in everywhere if other.rpartition(".")[2] == leaf}
        targets.add(leaf if meant <= {*adapted} else name)
    return sorted(targets)


def _is_tied(model: Any) -> bool:
    """Return whether the output head is the embedding."""
    return not any("lm_head" in name for name, _ in tree_flatten(model.parameters()))


def _check_copy(name: str, embedding: Any, copy: mx.array | None) -> None:
    """Refuse a copy of the base's embedding that is another one, such as one with new tokens."""
    if copy is None or not isinstance(embedding, nn.Embedding):
        return
    own: mx.array = embedding.weight
    same = own.shape == copy.shape and bool(
        mx.all(mx.abs(own.astype(mx.float32) - copy.astype(mx.float32)) <= _SAME)
    )
    if not same:
        raise ModelError(
            f"{name}: the PEFT folder has another embedding {copy.shape} than the base {own.shape}"
        )
