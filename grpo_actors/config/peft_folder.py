"""Read the description of a PEFT adapter (LoRA or DoRA): which modules it adapts, with which rank and scale.

PEFT may give each module its own rank and scale, mlx-lm has one of each: the largest rank, and the scale of the modules
that have it. `policy.peft` fills up and rescales the arrays of the others, so that nothing computed changes.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grpo_actors.errors import ModelError
from grpo_actors.tensor_header import header_of

PEFT_WEIGHTS = "adapter_model.safetensors"
#: Starts every name in the file; the module's name in transformers follows.
PREFIX = "base_model.model."
#: Ends of the names of the arrays that an adapter has, and of a copy of the base that PEFT adds for embeddings.
LORA_A, LORA_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
BASE_COPY = ".base_layer.weight"

_IN_LAYER = re.compile(r"^(?P<layer>.*?\.\d+)\.(?P<inner>.+)$")
#: Settings of PEFT that change what an adapter computes, in a way that mlx-lm has not.
_UNKNOWN = (
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
)


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """A PEFT adapter's description."""

    described: Mapping[str, Any]
    #: Module's name in transformers -> rank.
    ranks: Mapping[str, int]

    @property
    def kind(self) -> Literal["lora", "dora"]:
        """The kind of adapter, as mlx-lm calls it."""
        return "dora" if self.described.get("use_dora") else "lora"

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of section [model]."""
        rank = max(self.ranks.values())
        base = self.described.get("base_model_name_or_path")
        return {
            **({"model_name": base} if base else {}),
            "fine_tune_type": self.kind,
            "lora_rank": rank,
            "lora_scale": next(self.scale(module) for module, own in self.ranks.items() if own == rank),
            "lora_layers": -1,
            "lora_keys": tuple(self._keys()),
        }

    def scale(self, module: str) -> float:
        """Return the factor on the product of a module's matrices: alpha / rank, or alpha / √rank."""
        patterns = self.described.get("alpha_pattern") or {}
        own = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        alpha, rank = next(own, self.described["lora_alpha"]), self.ranks[module]
        return float(alpha / math.sqrt(rank) if self.described.get("use_rslora") else alpha / rank)

    def _keys(self) -> list[str]:
        """Return names within a layer if all layers have the same; else, and outside the layers, whole names."""
        inner: dict[str, set[str]] = {}
        outer: set[str] = set()
        for module in self.ranks:
            match = _IN_LAYER.match(module)
            if match is None:
                outer.add(module)
            else:
                inner.setdefault(match["layer"], set()).add(match["inner"])
        chosen = isinstance(self.described.get("target_modules"), str) or self.described.get(
            "layers_to_transform"
        )
        first: set[str] = next(iter(inner.values()), set())
        if chosen or any(names != first for names in inner.values()):
            return sorted(self.ranks)
        return sorted(first | outer)


def read_peft(folder: Path, described: Mapping[str, Any]) -> PeftAdapter:
    """Return the description of a PEFT adapter.

    Args:
        folder: Its folder.
        described: Content of its adapter_config.json.

    Raises:
        ModelError: It is of a kind that mlx-lm cannot represent.
    """
    kind = described["peft_type"]
    unknown = [key for key in _UNKNOWN if described.get(key)]
    if kind != "LORA" or unknown:
        what = f"peft_type {kind}" if kind != "LORA" else f"{unknown[0]} = {described[unknown[0]]}"
        raise ModelError(f"{folder}: a PEFT adapter with {what}; only plain LoRA and DoRA can be trained on")
    ranks: dict[str, int] = {}
    for name, shape in _shapes(folder / PEFT_WEIGHTS):
        module = name.removeprefix(PREFIX)
        for end in (LORA_A, EMBEDDING_A):
            if module.endswith(end):
                ranks[module.removesuffix(end)] = shape[0]
        known = (LORA_A, LORA_B, EMBEDDING_A, EMBEDDING_B, MAGNITUDE, f"{MAGNITUDE}.weight", BASE_COPY)
        if not module.endswith(known):
            raise ModelError(
                f"{folder}: {name} is no LoRA matrix but a whole tensor (modules_to_save, bias or tokens of its own); "
                "merge the adapter with peft's merge_and_unload and train the merged model"
            )
    if not ranks:
        raise ModelError(f"{folder}: {PEFT_WEIGHTS} has no LoRA matrices")
    return PeftAdapter(described, ranks)


def _shapes(path: Path) -> Iterator[tuple[str, list[int]]]:
    """Yield name and shape of every array, from the header of a safetensors file; raises ValueError if it has none."""
    header = header_of(path)
    if header is None:
        raise ValueError(f"{path.name} is not a safetensors file, or is cut off")
    entries = json.loads(header)
    yield from ((name, entry["shape"]) for name, entry in entries.items() if name != "__metadata__")
