"""The policy: a model, its tokenizer and its trainable arrays.

mlx-lm loads it from the embedded default ("tiny"), a folder or a hub id. The reference model is not a second model: it is
this one, holding the values that its trainable arrays had at the start.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
from jinja2 import TemplateError
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from grpo_actors.config import ModelConfig
from grpo_actors.errors import ConfigError, ModelError
from grpo_actors.policy.adapter import add_adapter
from grpo_actors.policy.identity import Identity, identify
from grpo_actors.policy.locate import locate
from grpo_actors.policy.quantization import is_quantized, quantize
from grpo_actors.policy.tokenizer import as_model_error, read_beside
from grpo_actors.time_limit import time_limit

#: Passed as `dtype`: the weights keep the type that they have in their files.
AS_STORED = "as stored"
#: Longest time of a chat template in its first calls, in seconds. It takes milliseconds.
TEMPLATE_S = 5.0
#: What a chat template can raise: it is a program that came with the model.
TEMPLATE_ERRORS = (
    *(TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
    *(RecursionError, MemoryError),
)
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


@dataclass(eq=False)
class Policy:
    """A loaded model. `model` maps token ids [B, T] to logits [B, T, V]."""

    name: str
    model: nn.Module
    #: Returns the tokenizer, and waits while it is still being read; raises ModelError if it is unusable.
    read_tokenizer: Callable[[], Any]
    #: Content of the model's config.json.
    architecture: dict[str, Any]
    #: Folder of the tokenizer and generation files.
    source: Path
    config: ModelConfig

    @property
    def has_adapter(self) -> bool:
        """Whether only an adapter trains."""
        return self.config.fine_tune_type != "full"

    @cached_property
    def tokenizer(self) -> Any:
        """mlx-lm's wrapper of the tokenizer."""
        return self.read_tokenizer()

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """All token ids that end a completion."""
        return frozenset(self.tokenizer.eos_token_ids)

    @cached_property
    def vocabulary(self) -> int:
        """Number of token ids that the model can predict; a tokenizer may have fewer tokens."""
        return int(self.model(mx.array([[1]])).shape[-1])  # nothing is computed: a shape needs no values

    def trainable(self) -> dict[str, mx.array]:
        """Return name -> array of everything that the optimizer updates and the workers need."""
        return dict(tree_flatten(self.model.trainable_parameters()))

    def load_trainable(self, arrays: Mapping[str, mx.array]) -> None:
        """Replace all trainable arrays, or none: names and shapes are checked first.

        Raises:
            ModelError: a name or a shape belongs to another model.
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
        """Shapes of the trainable arrays before any `quantize`, by name."""
        return {name: array.shape for name, array in self.trainable().items()}

    def quantize(self, bits: int) -> None:
        """Quantise the weights for sampling: less memory, but a policy that is no longer exactly the learner's.

        Only for a policy that never trains; new weights are quantised as they arrive. Arrays that are already quantised
        stay unchanged.
        """
        assert self._shapes is not None  # computed now: the names and shapes that the learner will send
        quantize(self.model, bits)
        mx.eval(self.model.parameters())

    @contextlib.contextmanager
    def holding(self, arrays: Mapping[str, mx.array]) -> Iterator[None]:
        """Hold other values of the trainable arrays, such as the reference's, during the block."""
        own = self.trainable()
        self.model.update(tree_unflatten(list(arrays.items())))
        try:
            yield
        finally:
            self.model.update(tree_unflatten(list(own.items())))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the token ids of a conversation, up to the beginning of the assistant's turn.

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
        except TEMPLATE_ERRORS as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ModelError(
                f"{self.name}: its chat template refuses the turns {roles} ({error}); "
                'if it knows no system turn, leave that out (data.system_prompt = "")'
            ) from error
        return ids

    @contextlib.contextmanager
    def template_ends(self) -> Iterator[None]:
        """Limit the time of chat template calls in the block, before anything depends on them. Only in the main thread.

        Raises:
            ModelError: the template does not end; later, nothing could interrupt it.
        """
        try:
            with time_limit(TEMPLATE_S, of_computing=True):
                yield
        except TimeoutError:
            raise ModelError(
                f"{self.name}: its chat template does not end within {TEMPLATE_S:g} s; correct chat_template in its "
                "tokenizer_config.json, or choose another model"
            ) from None

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of a completion, without the stop token."""
        if tokens and tokens[-1] in self.stop_tokens:
            tokens = tokens[:-1]
        text: str = self.tokenizer.decode(list(tokens))
        return text

    def ends(self, tokens: list[int], stop: Sequence[str]) -> bool:
        """Return whether the last token ends a completion: a stop token, or one that completes a stop string."""
        return tokens[-1] in self.stop_tokens or (bool(stop) and self.ends_with_stop(tokens, stop))

    def ends_with_stop(self, tokens: list[int], stop: Sequence[str]) -> bool:
        """Return whether the last token completes one of the stop strings.

        Only the tail is decoded. A token has at least one byte, so a stop string of n bytes lies within the last n tokens.
        A few more are decoded, because a character that is cut off at the start decodes to something else.
        """
        tail = self.decode(tokens[-(max(len(text.encode()) for text in stop) + 4) :])
        return any(text in tail for text in stop)

    @cached_property
    def identity(self) -> Identity:
        """Identity of the base model; must first be read before anything trains."""
        architecture = str(self.architecture.get("model_type", "unknown"))
        return identify(self.name, architecture, self.model, self.tokenizer.get_vocab())


def load_policy(
    config: ModelConfig, *, seed: int, dtype: str | None = None, tokenizer_later: bool = False
) -> Policy:
    """Load a model as the configuration describes it, including its adapter, ready to train.

    Args:
        config: Section [model].
        seed: Seed of a new adapter's initial values.
        dtype: Overrides config.dtype.
        tokenizer_later: As in `load_base`.

    Raises:
        ModelError: the folder is unusable, or the hub could not be reached.
        ConfigError: an adapter setting does not fit this model, or all weights are to be trained but are quantised.
    """
    policy = load_base(config, dtype=dtype, tokenizer_later=tokenizer_later)
    prepare_training(policy, seed)
    return policy


def prepare_training(policy: Policy, seed: int) -> None:
    """Make all weights of a base trainable, or add its adapter; raises ConfigError, as `load_policy` does."""
    config = policy.config
    if policy.has_adapter:
        add_adapter(policy.model, config, seed)
    elif is_quantized(policy.model):
        raise ConfigError(
            f'model.fine_tune_type: {config.model_name} has quantised weights, so that "full" could train nothing but '
            'its norms and biases; set fine_tune_type = "lora" (an adapter next to them), or name the unquantised model'
        )
    else:
        policy.model.unfreeze()
    policy.model.eval()
    mx.eval(policy.model.parameters())


def load_base(config: ModelConfig, *, dtype: str | None = None, tokenizer_later: bool = False) -> Policy:
    """Load a model without trainable arrays, quantised to base_bits if that is set.

    Args:
        config: Section [model].
        dtype: Overrides config.dtype; `AS_STORED` keeps the types in the files.
        tokenizer_later: Do not wait for the tokenizer. Its first use waits, and raises the ModelError.

    Raises:
        ModelError: as `load_policy`.
        ConfigError: base_bits is set for a model that is already quantised.
    """
    location = str(locate(config.model_name))
    with as_model_error(config):
        source = mlx_lm.utils._download(location)  # noqa: SLF001 - the only way to get a hub model's folder
    read_tokenizer = read_beside(source, config)
    with as_model_error(config):
        model, architecture = mlx_lm.utils.load_model(
            source, lazy=True, trust_remote_code=config.trust_remote_code
        )
    policy = Policy(config.model_name, model, read_tokenizer, architecture, source, config)
    prepare_base(policy, dtype or config.dtype)
    if not tokenizer_later:
        _ = policy.tokenizer
    return policy


def prepare_base(policy: Policy, dtype: str) -> None:
    """Quantise the weights as read to base_bits, give them their type, freeze and evaluate them.

    Args:
        policy: Not evaluated yet, so that the whole model is never in memory.
        dtype: As in section [model], or `AS_STORED`.

    Raises:
        ConfigError: as `load_base`.
    """
    model, config = policy.model, policy.config
    if config.base_bits:
        if is_quantized(model):
            raise ConfigError(
                f"model.base_bits: must be 0 for {config.model_name}, which is quantised already, got {config.base_bits}"
            )
        # Before the change of type, so that the base is the same under every model.dtype, and the same as
        # mlx_lm.convert writes.
        quantize(model, config.base_bits)
    if dtype != AS_STORED:
        model.set_dtype(resolve_dtype(dtype, policy.architecture))
    model.freeze()
    model.eval()
    mx.eval(model.parameters())


def resolve_dtype(name: str, architecture: Mapping[str, Any]) -> mx.Dtype:
    """Return the type of the weights; "auto" is float32 on a CPU (half precision is slow there), else the file's type."""
    if name != "auto":
        return DTYPES[name]
    if mx.default_device().type == mx.DeviceType.cpu:
        return mx.float32
    stored = str(architecture.get("torch_dtype") or architecture.get("dtype") or "bfloat16")
    return DTYPES.get(stored, mx.bfloat16)


def logits_alone(model: Any, texts: Sequence[Sequence[int]]) -> mx.array:
    """Return the logits [n, T, V] of each text by itself, for a trial; those after the end of a text mean nothing.

    They are computed side by side, padded on the right, where a causal model does not look: on CUDA each new shape would
    cost a quarter of a second.
    """
    padded = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    logits: mx.array = model(mx.array(padded))
    return logits


def same_logits(one: mx.array, other: mx.array) -> bool:
    """Return whether two rows of logits differ by no more than rounding.

    In half precision, rounding is a few percent of the logits' standard deviation; another text or position differs by
    about all of it.
    """
    one, other = one.astype(mx.float32), other.astype(mx.float32)
    return bool(mx.abs(one - other).mean() < 0.2 * mx.std(other))
