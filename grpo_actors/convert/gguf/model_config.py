"""The model inside one GGUF file: its sizes, the list of tensors to convert, and config.json.

Depends on the file and the table of families, not on how weights are written. Rejects a missing or
unexpected tensor, a wrong shape, and a model that shares a known architecture's name but not its maths.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

from grpo_actors.convert.gguf import rope
from grpo_actors.convert.gguf.families import FAMILIES, HEAD, LAYER, OUTER, Family, Place
from grpo_actors.convert.gguf.reader import GgufFile
from grpo_actors.convert.gguf.sizes import Floats, Sizes
from grpo_actors.errors import ModelError

T = TypeVar("T")


class Slot(NamedTuple):
    """One tensor to convert: `undo` is applied to the decoded array."""

    stored: str
    name: str
    shape: tuple[int, ...]
    undo: Callable[[Floats], Floats] | None


class Architecture:
    """The model inside one GGUF file: its slots and its config.json.

    Raises:
        ModelError: unknown architecture, a size missing, or a kind of model that shares a known
            architecture's name but not its tensors (experts, split files).
    """

    def __init__(self, gguf: GgufFile) -> None:
        self.gguf = gguf
        self.name = gguf.value("general.architecture", str)
        if self.name not in FAMILIES:
            raise ModelError(
                f"{gguf.path}: general.architecture must be one of {', '.join(FAMILIES)}, got {self.name!r:.60}"
            )
        self.family = FAMILIES[self.name]
        self.sizes = self._read_sizes()
        self._refuse_variants()
        self.tied = "output.weight" not in gguf.tensors
        self.flags = {
            flag: any(f"blk.0.{stored}" in gguf.tensors for stored in places)
            for flag, places in self.family.optional.items()
        }

    def slots(self) -> list[Slot]:
        """Return every tensor to convert, in the order of the forward pass, with names and shapes checked."""
        slots = []
        # One by one: with a damaged layer count, the check stops at the first missing layer.
        for slot in expected_slots(self.family, self.sizes, self.flags, tied=self.tied):
            info = self.gguf.tensors.get(slot.stored)
            if info is None:
                raise ModelError(
                    f"{self.gguf.path}: tensor {slot.stored} is missing; the file is not a whole model"
                )
            if info.shape != slot.shape:
                raise ModelError(
                    f"{self.gguf.path}: tensor {slot.stored} must have shape {slot.shape}, got {info.shape}"
                )
            slots.append(slot)
        spare = self.gguf.tensors.keys() - {slot.stored for slot in slots} - {rope.FACTORS}
        if spare:
            raise ModelError(
                f"{self.gguf.path}: {len(spare)} tensors, {min(spare)} first, are not known for architecture "
                f"{self.name}; without them the model would be another one"
            )
        return slots

    def config(self, dtype: str) -> dict[str, Any]:
        """Return the content of config.json without the token ids, which come from the tokenizer."""
        sizes = self.sizes
        config: dict[str, Any] = {
            "architectures": [self.family.hf_class],
            "model_type": self.family.model_type,
            "vocab_size": sizes.vocab,
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.inner,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "max_position_embeddings": self._value("context_length", int),
            "rms_norm_eps": self._value("attention.layer_norm_rms_epsilon", float),
            "rope_theta": rope.base(self.gguf, self.name),
            "tie_word_embeddings": self.tied,
            "torch_dtype": dtype,
            **self.family.activation,
            **self.flags,
            **self.family.settings(self.gguf, sizes),
        }
        if self.family.has_head_dim:
            config["head_dim"] = sizes.head_dim
        scaling = rope.scaling(self.gguf, self.name, sizes.head_dim)
        if scaling is not None:
            config["rope_scaling"] = scaling
        return config

    def _value(self, key: str, kind: type[T], default: T | None = None) -> T:
        return self.gguf.value(f"{self.name}.{key}", kind, default)

    def _read_sizes(self) -> Sizes:
        heads, hidden = self._value("attention.head_count", int), self._value("embedding_length", int)
        if heads < 1 or hidden < heads:
            raise ModelError(f"{self.gguf.path}: {heads} heads over {hidden} features make no attention")
        embedding = self.gguf.tensors.get("token_embd.weight")
        if embedding is None:
            raise ModelError(
                f"{self.gguf.path}: tensor token_embd.weight is missing; the file is not a whole model"
            )
        kv_heads = self._value("attention.head_count_kv", int, heads)
        if kv_heads < 1 or heads % kv_heads:
            raise ModelError(
                f"{self.gguf.path}: {kv_heads} key-value heads do not divide {heads} query heads"
            )
        return Sizes(
            layers=self._value("block_count", int),
            hidden=hidden,
            inner=self._value("feed_forward_length", int),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=self._value("attention.key_length", int, hidden // heads),
            vocab=embedding.shape[0],
        )

    def _refuse_variants(self) -> None:
        """Reject models that have a known architecture's name but are different."""
        sizes, path = self.sizes, self.gguf.path
        parts = self.gguf.value("split.count", int, 1)
        if parts > 1:
            raise ModelError(
                f"{path}: this is one part of a split file; join the parts with llama-gguf-split --merge"
            )
        experts = self._value("expert_count", int, 0)
        if experts:
            raise ModelError(
                f"{path}: {self.name} with {experts} experts is not supported; take a dense model"
            )
        rotated = self._value("rope.dimension_count", int, sizes.head_dim)
        value_dim = self._value("attention.value_length", int, sizes.head_dim)
        if rotated != sizes.head_dim or value_dim != sizes.head_dim or sizes.head_dim % 2:
            raise ModelError(
                f"{path}: rotary and value dimensions must equal the even head dimension {sizes.head_dim}, "
                f"got {rotated} and {value_dim}"
            )
        if not self.family.has_head_dim and sizes.head_dim * sizes.heads != sizes.hidden:
            raise ModelError(
                f"{path}: {self.name} needs heads × head dimension = {sizes.hidden}, "
                f"got {sizes.heads} × {sizes.head_dim}"
            )


def expected_slots(family: Family, sizes: Sizes, flags: Mapping[str, bool], *, tied: bool) -> Iterator[Slot]:
    """Yield every tensor of a model of this family, in the order of the forward pass.

    Args:
        family: its table.
        sizes: its sizes.
        flags: which optional tensors a layer has.
        tied: whether the embedding serves as the output head.
    """

    def slot(kind: str, stored: str, place: Place, prefix: str) -> Slot:
        change = family.undo.get(kind)
        undo = None if change is None else partial(change, sizes)
        return Slot(stored, prefix + place.name, tuple(sizes.axes[axis] for axis in place.axes), undo)

    for stored, place in OUTER.items():
        yield slot(stored, stored, place, "")
    layer = {**LAYER, **family.required}
    for flag, places in family.optional.items():
        if flags[flag]:
            layer.update(places)
    for index in range(sizes.layers):
        for stored, place in layer.items():
            yield slot(stored, f"blk.{index}.{stored}", place, f"model.layers.{index}.")
    if not tied:
        for stored, place in HEAD.items():
            yield slot(stored, stored, place, "")
