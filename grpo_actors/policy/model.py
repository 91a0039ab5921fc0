"""The policy: a model, its tokenizer, and what of it trains.

Loads from the embedded default ("tiny"), a folder, or a hub id, through mlx-lm. The reference model is no
second model: it is this one, holding the values that its trainable arrays had at the start.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from jinja2 import TemplateError
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from grpo_actors.config import ModelConfig
from grpo_actors.errors import ConfigError, ModelError, first_line
from grpo_actors.policy.adapter import add_adapter
from grpo_actors.policy.identity import Identity, identify
from grpo_actors.policy.locate import locate
from grpo_actors.policy.quantization import is_quantized, quantize

#: In place of a type: the weights keep what they have in their files.
AS_STORED = "as stored"
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


@dataclass(eq=False)
class Policy:
    """A loaded model. `model` maps token ids [B, T] to logits [B, T, V]."""

    name: str
    model: nn.Module
    tokenizer: Any
    #: The model's config.json.
    architecture: dict[str, Any]
    #: Where tokenizer and generation files come from.
    source: Path
    config: ModelConfig

    @property
    def has_adapter(self) -> bool:
        """Whether only an adapter trains."""
        return self.config.fine_tune_type != "full"

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """All token ids that end a completion."""
        return frozenset(self.tokenizer.eos_token_ids)

    def trainable(self) -> dict[str, mx.array]:
        """Name -> array of everything that the optimizer moves and the workers need."""
        return dict(tree_flatten(self.model.trainable_parameters()))

    def load_trainable(self, arrays: Mapping[str, mx.array]) -> None:
        """Replace trainable arrays: all of them, checked by name and shape beforehand, or none.

        Raises:
            ModelError: a name or a shape is another model's.
        """
        if self._shapes.keys() != arrays.keys():
            odd = min(self._shapes.keys() ^ arrays.keys())
            raise ModelError(f"{self.name}: weights do not fit: {odd!r} is on one side only")
        for name, array in arrays.items():
            if array.shape != self._shapes[name]:
                raise ModelError(f"{self.name}: {name} has shape {self._shapes[name]}, got {array.shape}")
        modules = dict(self.model.named_modules())
        held = dict(tree_flatten(self.model.parameters()))
        updates: list[tuple[str, mx.array]] = []
        for name, array in arrays.items():
            owner, _, leaf = name.rpartition(".")
            if leaf == "weight" and f"{owner}.scales" in held:
                module = modules[owner]
                packed = mx.quantize(array, group_size=module.group_size, bits=module.bits)
                updates += zip((name, f"{owner}.scales", f"{owner}.biases"), packed, strict=True)
            else:
                updates.append((name, array.astype(held[name].dtype)))
        self.model.update(tree_unflatten(updates))

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the trainable arrays before any `quantize`."""
        return {name: array.shape for name, array in self.trainable().items()}

    def quantize(self, bits: int) -> None:
        """Sample with fewer bits: less memory, and a policy that is no longer quite the learner's.

        Only for a policy that never trains; new weights are quantised as they arrive. What is quantised
        already stays as it is.
        """
        assert self._shapes is not None  # taken now: the names and shapes that the learner will send
        quantize(self.model, bits)
        mx.eval(self.model.parameters())

    @contextlib.contextmanager
    def holding(self, arrays: Mapping[str, mx.array]) -> Iterator[None]:
        """Other values of the trainable arrays, such as the reference's, for as long as the block lasts."""
        own = self.trainable()
        self.model.update(tree_unflatten(list(arrays.items())))
        try:
            yield
        finally:
            self.model.update(tree_unflatten(list(own.items())))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's turn begins.

        Raises:
            ModelError: there is no chat template, or it refuses these turns.
        """
        if self.tokenizer.chat_template is None:
            raise ModelError(
                f"{self.name}: its tokenizer has no chat template; use an instruction-tuned model, "
                "or add chat_template to its tokenizer_config.json"
            )
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ModelError(
                f"{self.name}: its chat template refuses the turns {roles} ({error}); "
                'if it knows no system turn, leave that out (data.system_prompt = "")'
            ) from error
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of a completion, without the stop token."""
        if tokens and tokens[-1] in self.stop_tokens:
            tokens = tokens[:-1]
        text: str = self.tokenizer.decode(list(tokens))
        return text

    def ends(self, tokens: list[int], stop: Sequence[str]) -> bool:
        """Whether the last token ends a completion: a stop token, or one that completes a stop string."""
        return tokens[-1] in self.stop_tokens or (bool(stop) and self.ends_with_stop(tokens, stop))

    def ends_with_stop(self, tokens: list[int], stop: Sequence[str]) -> bool:
        """Whether the last token completes one of the stop strings.

        Only the tail is decoded. A token holds at least one byte, so that a stop string of n bytes lies in
        the last n tokens; a few more, because a cut-off character at their start decodes to something else.
        """
        tail = self.decode(tokens[-(max(len(text.encode()) for text in stop) + 4) :])
        return any(text in tail for text in stop)

    @cached_property
    def identity(self) -> Identity:
        """Of the base model; taken before anything trains."""
        architecture = str(self.architecture.get("model_type", "unknown"))
        return identify(self.name, architecture, self.model, self.tokenizer.get_vocab())


def load_policy(config: ModelConfig, *, seed: int, dtype: str | None = None) -> Policy:
    """Load a model as the configuration describes it, adapter included, and ready to train.

    Args:
        config: Section [model].
        seed: Initialises a new adapter.
        dtype: Overrides config.dtype.

    Raises:
        ModelError: unusable folder, or the hub could not be reached.
        ConfigError: an adapter setting that does not fit this model, or all weights are to be trained
            and they are quantised.
    """
    policy = load_base(config, dtype=dtype)
    if policy.has_adapter:
        add_adapter(policy.model, config, seed)
    elif is_quantized(policy.model):
        raise ConfigError(
            f'model.fine_tune_type: {config.model_name} has quantised weights, so that "full" could train nothing but '
            'its norms and biases; set fine_tune_type = "lora" (an adapter beside them), or name the unquantised model'
        )
    else:
        policy.model.unfreeze()
    policy.model.eval()
    mx.eval(policy.model.parameters())
    return policy


def load_base(config: ModelConfig, *, dtype: str | None = None) -> Policy:
    """Load a model with nothing in it that trains, in base_bits if the configuration wants that.

    Args:
        config: Section [model].
        dtype: Overrides config.dtype; `AS_STORED`: none.

    Raises:
        ModelError: as `load_policy`.
        ConfigError: base_bits for a model that is quantised already.
    """
    location = locate(config.model_name)
    try:
        model, tokenizer, architecture = mlx_lm.utils.load(
            str(location),
            lazy=True,
            return_config=True,
            tokenizer_config={"trust_remote_code": config.trust_remote_code},
            trust_remote_code=config.trust_remote_code,
        )
        source = mlx_lm.utils._download(str(location))  # noqa: SLF001 - the one way to a hub model's folder
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        # TypeError: a setting is missing in config.json. RuntimeError: mlx cannot read a weights file.
        raise ModelError(
            f"model.model_name: {config.model_name!r} cannot be loaded: {first_line(error)}"
        ) from error
    if config.base_bits:
        if is_quantized(model):
            raise ConfigError(
                f"model.base_bits: must be 0 for {config.model_name}, which is quantised already, got {config.base_bits}"
            )
        # Before the change of type: the base is then the same one under every model.dtype, and the one that
        # mlx_lm.convert writes. Before anything is evaluated: the whole model is never in memory.
        quantize(model, config.base_bits)
    if dtype != AS_STORED:
        model.set_dtype(resolve_dtype(dtype or config.dtype, architecture))
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    return Policy(config.model_name, model, tokenizer, architecture, Path(source), config)


def resolve_dtype(name: str, architecture: Mapping[str, Any]) -> mx.Dtype:
    """The type of the weights; "auto" is float32 on a CPU (half precision crawls there), else the file's own."""
    if name != "auto":
        return DTYPES[name]
    if mx.default_device().type == mx.DeviceType.cpu:
        return mx.float32
    stored = str(architecture.get("torch_dtype") or architecture.get("dtype") or "bfloat16")
    return DTYPES.get(stored, mx.bfloat16)


def same_logits(one: mx.array, other: mx.array) -> bool:
    """Whether two rows of logits differ by no more than rounding.

    In half precision that is a few percent of their deviation; another text, or position, makes about all of it.
    """
    one, other = one.astype(mx.float32), other.astype(mx.float32)
    return bool(mx.abs(one - other).mean() < 0.2 * mx.std(other))
