"""Read the sizes of a model from its files, without loading weights: its tensors, and its layers' widths."""

import json
from dataclasses import astuple, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from grpo_actors.errors import ModelError
from grpo_actors.policy.config_json import text_part
from grpo_actors.tensor_header import header_of

#: Number of quantised weights that share a scale and an offset, both of the model's dtype.
_GROUP_SIZE = 64


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the model's files. A quantised tensor has the shape of the unpacked weights."""

    name: str
    shape: tuple[int, ...]
    #: Bits per element if the tensor is quantised in the file, else 0.
    bits: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def bytes(self, width: int, bits: int) -> float:
        """Return its bytes in a process.

        Args:
            width: Bytes of a float in that process.
            bits: Bits to which the process quantises tensors that are not quantised yet; 0: it does not.
        """
        divides = len(self.shape) >= 2 and self.shape[-1] % _GROUP_SIZE == 0
        bits = self.bits or (bits if divides else 0)
        return self.size * (bits / 8 + 2 * width / _GROUP_SIZE) if bits else self.size * width


@dataclass(frozen=True, slots=True)
class Widths:
    """Numbers of elements per token that a model computes. All are 0 if its config.json does not tell them."""

    layers: int = 0
    #: Of the residual stream, or of all heads together if that is more.
    hidden: int = 0
    #: Of the MLP; with experts, of all those that one token uses.
    intermediate: int = 0
    heads: int = 0
    #: Keys and values of one layer.
    keys_values: int = 0
    vocabulary: int = 0
    #: Of all heads of a layer with the gated delta rule, and the number of such layers; 0 if there is none.
    delta: int = 0
    delta_layers: int = 0

    @classmethod
    def of(cls, architecture: dict[str, Any]) -> "Widths":
        """Read the widths of the language model from the content of a config.json."""
        architecture = text_part(architecture)
        try:
            hidden, heads = architecture["hidden_size"], architecture["num_attention_heads"]
            size = architecture.get("head_dim") or hidden // heads
            intermediate = architecture.get("intermediate_size", 4 * hidden)
            if experts := architecture.get("num_experts_per_tok"):
                intermediate = experts * architecture.get("moe_intermediate_size", intermediate)
            found = cls(
                layers=architecture["num_hidden_layers"],
                hidden=max(hidden, heads * size),
                intermediate=intermediate,
                heads=heads,
                keys_values=2 * (architecture.get("num_key_value_heads") or heads) * size,
                vocabulary=architecture.get("vocab_size", 0),
            )
            if heads := architecture.get("linear_num_value_heads"):
                sizes = (architecture[f"linear_{what}_head_dim"] for what in ("key", "value"))
                found = replace(found, delta=heads * max(sizes), delta_layers=_linear_layers(architecture))
        except (KeyError, TypeError):
            return cls()
        # Some models have a list with a number for each layer.
        return found if all(isinstance(number, int) for number in astuple(found)) else cls()

    def of_rank(self, ranks: int) -> "Widths":
        """Return the widths that each of the ranks computes among which the model is divided."""
        return replace(
            self,
            intermediate=self.intermediate // ranks,
            heads=self.heads // ranks,
            keys_values=self.keys_values // ranks,
        )


def _linear_layers(architecture: dict[str, Any]) -> int:
    """Return how many layers a config.json says to have linear attention: in a list of their kinds, or by a period."""
    if kinds := architecture.get("layer_types"):
        return sum(kind == "linear_attention" for kind in kinds)
    layers, period = architecture["num_hidden_layers"], architecture.get("full_attention_interval") or 1
    return int(layers - layers // period)


def read_json(data: bytes, path: Path) -> dict[str, Any]:
    """Read an object from a model's file; raises ModelError if there is none."""
    try:
        content = json.loads(data)
    except ValueError as error:
        raise ModelError(f"model.model_name: {path} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise ModelError(f"model.model_name: {path} must hold a JSON object, got {type(content).__name__}")
    return content


def read_tensors(folder: Path, quantization: dict[str, Any]) -> list[Tensor]:
    """List all tensors from the headers of the safetensors files.

    Args:
        folder: The model folder.
        quantization: The entry of that name in its config.json: the default ``bits``, and settings of single modules
            by name.

    Raises:
        ModelError: A file has no header that can be read.
    """
    header: dict[str, Any] = {}
    for path in folder.glob("model*.safetensors"):
        found = header_of(path)
        if found is None:
            raise ModelError(f"model.model_name: {path} is not a safetensors file, or is cut off")
        header |= read_json(found, path)
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        module, _, leaf = name.rpartition(".")
        packed = f"{module}.scales" in header
        shape, bits = tuple(entry["shape"]), 0
        if packed and leaf in {"scales", "biases"}:
            continue
        if packed and leaf == "weight":
            own = quantization.get(module)
            bits = own["bits"] if isinstance(own, dict) else quantization.get("bits", 8)
            shape = (*shape[:-1], shape[-1] * 32 // bits)
        tensors.append(Tensor(name, shape, bits))
    return tensors
