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
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from grpo_actors.config import ModelConfig
from grpo_actors.errors import ConfigError, ModelError
from grpo_actors.policy.adapter import add_adapter
from grpo_actors.policy.architectures import architecture_of, refusal_of, require_divisible
from grpo_actors.policy.casting import cast
from grpo_actors.policy.chat_template import ChatTemplate
from grpo_actors.policy.config_dtype import stored_dtype
from grpo_actors.policy.device import on_cuda
from grpo_actors.policy.embedding import embedding_rows
from grpo_actors.policy.foreign import refuse_foreign
from grpo_actors.policy.identity import Excerpt, Identity, excerpts_of, identify
from grpo_actors.policy.locate import locate
from grpo_actors.policy.quantization import is_quantized, quantize
from grpo_actors.policy.sharding import Group, Sharding, check_fit, partial_gradients
from grpo_actors.policy.start import load_adapter_start, merge_adapter_start
from grpo_actors.policy.thinking import Thinking, thinking_of
from grpo_actors.policy.tokenizer import as_model_error, read_beside

#: Passed as `dtype`: the weights keep the type that they have in their files.
AS_STORED = "as stored"
#: Tokens of a prompt that are long enough for an opening tag and white space after it.
TAG_TOKENS = 16
#: Texts of different lengths to try a model with, long and varied enough that a wrong position shows in each.
RAGGED = [[(5 * i + 1) * i % 29 + 1 for i in range(length)] for length in (40, 12, 31, 23, 5)]
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
    #: How it is divided among ranks; None: this process has all of it.
    sharding: Sharding | None = None
    #: Excerpts of the base model before it was divided; None: take them from the model.
    excerpts: dict[str, Excerpt] | None = None

    @property
    def has_adapter(self) -> bool:
        """Whether only an adapter trains."""
        return self.config.fine_tune_type != "full"

    @cached_property
    def partial_gradients(self) -> frozenset[str]:
        """Names of the trained arrays of whose gradient this process computes a part; none of a model that is whole."""
        return frozenset() if self.sharding is None else partial_gradients(self.model)

    @cached_property
    def tokenizer(self) -> Any:
        """mlx-lm's wrapper of the tokenizer."""
        return self.read_tokenizer()

    @cached_property
    def chat(self) -> ChatTemplate:
        """How conversations become tokens."""
        return ChatTemplate(self.name, lambda: self.tokenizer, self.check_readable)

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """All token ids that end a completion: the model's own, and the one with which only the chat template ends a turn."""
        own, end = frozenset(self.tokenizer.eos_token_ids), self.chat.turn_end
        return own if end is None else own | {end}

    @cached_property
    def thinking(self) -> Thinking:
        """The tags between which it thinks."""
        return thinking_of(self.tokenizer)

    @cached_property
    def vocabulary(self) -> int:
        """Number of token ids that the model can predict; a tokenizer may have fewer tokens."""
        return int(self.model(mx.array([[1]])).shape[-1])  # nothing is computed: a shape needs no values

    @cached_property
    def readable(self) -> int:
        """Number of token ids that the model can read: the rows of its embedding, whatever config.json says.

        Raises:
            ModelError: it can predict tokens that it cannot read.
        """
        rows = embedding_rows(self.model) or self.vocabulary
        if rows < self.vocabulary:
            raise ModelError(
                f"{self.name}: its head predicts {self.vocabulary} token ids, but its embedding has {rows} rows; "
                "correct its weights, or choose another model"
            )
        return rows

    def check_readable(self, ids: Sequence[int], what: str) -> None:
        """Check that the embedding has a row for each id: MLX checks no index, and would read other memory.

        Raises:
            ModelError: it has not; the text begins with `what` these ids are.
        """
        low, high = min(ids, default=0), max(ids, default=0)
        if low < 0 or high >= self.readable:
            raise ModelError(
                f"{self.name}: {what} has the token id {low if low < 0 else high}, but the embedding has "
                f"{self.readable} rows; use the tokenizer and chat template that belong to these weights"
            )

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
        if self.sharding is not None:
            arrays = self.sharding.own(arrays)
            mx.eval(arrays)  # now, because until then the whole arrays are held
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
        """Shapes of the trainable arrays by name, before any `quantize` and before they were divided."""
        whole = {} if self.sharding is None else self.sharding.shapes
        return {name: whole.get(name, array.shape) for name, array in self.trainable().items()}

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

    def begins_thinking(self, before: Sequence[int]) -> bool:
        """Return whether a turn begins within its thinking; `before`: the tokens before it, such as the prompt's."""
        text: str = self.tokenizer.decode(list(before[-TAG_TOKENS:]))
        return self.thinking.opened_by(text)

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
        excerpts = excerpts_of(self.model) if self.excerpts is None else self.excerpts
        return identify(self.name, architecture, excerpts, self.tokenizer.get_vocab())


def load_policy(
    config: ModelConfig,
    *,
    seed: int,
    dtype: str | None = None,
    tokenizer_later: bool = False,
    group: Group | None = None,
) -> Policy:
    """Load a model as the configuration describes it, including its adapter, ready to train.

    Args:
        config: Section [model].
        seed: Seed of a new adapter's initial values.
        dtype: Overrides config.dtype.
        tokenizer_later: As in `load_base`.
        group: As in `load_base`.

    Raises:
        ModelError: the folder is unusable, or the hub could not be reached; or it cannot be divided.
        ConfigError: an adapter setting does not fit this model, or all weights are to be trained but are quantised.
    """
    policy = load_base(config, dtype=dtype, tokenizer_later=tokenizer_later, group=group)
    prepare_training(policy, seed)
    return policy


def prepare_training(policy: Policy, seed: int) -> None:
    """Make all weights of a base trainable, or add its adapter, from its start; raises as `load_policy` does."""
    config = policy.config
    if policy.has_adapter:
        add_adapter(policy.model, config, seed)
        if policy.sharding is not None:
            check_fit(policy.model, policy.sharding, config)
        try:
            policy.model(mx.array([[1]]))  # nothing is computed
        except AttributeError as error:  # a layer reads the weight of one of its linear modules itself
            raise ConfigError(
                f"model.lora_keys: {config.model_name} has modules that an adapter does not fit ({error}); name only others, "
                'such as "self_attn.q_proj"'
            ) from error
        if config.adapter_path:
            load_adapter_start(policy.model, config)
    elif is_quantized(policy.model):
        raise ConfigError(
            f'model.fine_tune_type: {config.model_name} has quantised weights, so that "full" could train nothing but '
            'its norms and biases; set fine_tune_type = "lora" (an adapter next to them), or name the unquantised model'
        )
    else:
        # Of a divided model it has been tried where it is whole.
        if policy.sharding is None and (changed := changed_by_loading(policy.model)):
            raise ConfigError(
                f'model.fine_tune_type: must be "lora" or "dora" for {config.model_name}, got "full": mlx-lm changes '
                f"{', '.join(changed)} whenever it loads the model, so that a checkpoint would not be what was trained"
            )
        if config.adapter_path:
            merge_adapter_start(policy.model, config, seed)
        policy.model.unfreeze()
    policy.model.eval()
    mx.eval(policy.model.parameters())


def source_folder(config: ModelConfig) -> Path:
    """Return the folder of a model; one of the hub is downloaded if it is not there.

    Raises:
        ModelError: there is no such model.
    """
    location = str(locate(config.model_name))
    with as_model_error(config):
        folder: Path = mlx_lm.utils._download(location)  # noqa: SLF001 - the only way to get a hub model's folder
    return folder


def changed_by_loading(model: Any) -> list[str]:
    """Return the names of arrays whose trained values mlx-lm would change at loading: it scales their rows to length 1."""
    if not hasattr(model, "sanitize"):
        return []
    trained = {
        name: 1.5 * array if mx.issubdtype(array.dtype, mx.floating) else array
        for name, array in tree_flatten(model.parameters())
    }
    # Without a head of its own, Gemma 3's module takes the weights for those of an unloaded model, and changes itself.
    loaded = model.sanitize({"lm_head.weight": mx.zeros((1, 1)), **trained})
    # What is the same object needs no comparison.
    return [
        name
        for name, array in trained.items()
        if loaded.get(name, array) is not array and not mx.array_equal(loaded[name], array)
    ]


def load_base(
    config: ModelConfig,
    *,
    dtype: str | None = None,
    tokenizer_later: bool = False,
    group: Group | None = None,
) -> Policy:
    """Load a model without trainable arrays, quantised to base_bits if that is set.

    Args:
        config: Section [model].
        dtype: Overrides config.dtype; `AS_STORED` keeps the types in the files.
        tokenizer_later: Do not wait for the tokenizer. Its first use waits, and raises the ModelError.
        group: The ranks among which it is divided; None: it is not.

    Raises:
        ModelError: as `load_policy`.
        ConfigError: base_bits is set for a model that is already quantised.
    """
    source = source_folder(config)
    read_tokenizer = read_beside(source, config)
    with as_model_error(config):
        refuse_foreign(f"model.model_name: {config.model_name!r}", mlx_lm.utils.load_config(source))
        model, architecture = mlx_lm.utils.load_model(
            source, lazy=True, trust_remote_code=config.trust_remote_code
        )
        policy = Policy(config.model_name, model, read_tokenizer, architecture, source, config)
        if reason := refusal_of(model):
            raise ModelError(f"model.model_name: {config.model_name!r} cannot be used: {reason}")
        # A model that cannot run on this machine, or that MLX cannot train, fails here. No name may hold its arrays: they are
        # to be freed one by one.
        _ = policy.readable
        model.trainable_parameters()
    prepare_base(policy, dtype or config.dtype, group)
    if not tokenizer_later:
        _ = policy.tokenizer
    return policy


def prepare_base(policy: Policy, dtype: str, group: Group | None = None) -> None:
    """Quantise the weights as read to base_bits, give them their type, freeze and evaluate them.

    Args:
        policy: Not evaluated yet, so that the whole model is never in memory.
        dtype: As in section [model], or `AS_STORED`.
        group: As in `load_base`.

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
        cast(model, resolve_dtype(dtype, policy.architecture))
    if group is not None:
        _divide(policy, group)
    model.freeze()
    model.eval()
    mx.eval(model.parameters())


def _divide(policy: Policy, group: Group) -> None:
    """Divide a model that is not evaluated yet, and evaluate it: whole arrays are in memory one after the other."""
    require_divisible(policy.name, policy.architecture, group.size(), "the number of ranks")
    policy.excerpts = excerpts_of(policy.model)
    policy.sharding = Sharding(policy.model, group)
    for name, array in tree_flatten(policy.model.parameters()):
        mx.eval(array, *([policy.excerpts[name].values] if name in policy.excerpts else []))


def resolve_dtype(name: str, architecture: Mapping[str, Any]) -> mx.Dtype:
    """Return the type of the weights; "auto" is float32 on a CPU (half precision is slow there), else the file's type."""
    if name != "auto":
        return DTYPES[name]
    if mx.default_device().type == mx.DeviceType.cpu:
        return mx.float32
    return DTYPES.get(stored_dtype(architecture) or "", mx.bfloat16)


def whole_texts(model: Any, tokens: mx.array, body: Callable[..., mx.array] | None = None) -> mx.array:
    """Return the outputs [N, T, …] of a model, or of its `body`, for texts [N, T] without a past."""
    run = body or model
    if architecture_of(model).shares_keys_by_cache:
        return run(tokens, cache=make_prompt_cache(model))
    return run(tokens)


def logits_alone(model: Any, texts: Sequence[Sequence[int]]) -> mx.array:
    """Return the logits [n, T, V] of each text by itself, for a trial; those after the end of a text mean nothing.

    They are computed side by side, padded on the right, where a causal model does not look: on CUDA each new shape would
    cost a quarter of a second.
    """
    padded = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    return whole_texts(model, mx.array(padded))


def deviation(one: mx.array, other: mx.array) -> float:
    """Return the mean difference of two rows of logits, in standard deviations of the logits.

    Another text or position differs by about 1. In half precision, rounding is a few percent, and on CUDA so is that of
    float32, whose products are computed with fewer bits; else it is far below 0.001.
    """
    one, other = one.astype(mx.float32), other.astype(mx.float32)
    return float(mx.abs(one - other).mean() / mx.std(other))


def same_logits(one: mx.array, other: mx.array) -> bool:
    """Return whether two rows of logits differ by no more than rounding."""
    return deviation(one, other) < (0.005 if one.dtype == mx.float32 and not on_cuda() else 0.2)
