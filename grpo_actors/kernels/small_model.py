"""A small model that needs the same kernels as a run's model: the same architecture, types and heads, random weights.

Kernels do not depend on the number of layers, on the width of an MLP or on the size of the vocabulary. The sizes of heads
and the width of the model stay.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from mlx import nn

from grpo_actors.config import ModelConfig
from grpo_actors.policy.locate import EMBEDDED, locate
from grpo_actors.policy.model import Policy, prepare_base, prepare_training

LAYERS, MOST_LAYERS = 2, 8
#: Width of an MLP: a multiple of every size of quantised groups.
WIDTH = 1152
#: Tokens of the vocabulary. The remainder by 128 stays, because kernels treat the last block of tokens by itself.
VOCABULARY, BLOCK = 4096, 128
#: Begins the name of a module that is in one layer only.
_IN_LAYER = re.compile(r"^.*?\blayers\.\d+\.")


def small_policy(config: ModelConfig, seed: int) -> Policy:
    """Make the policy of section [model] in small, ready to train.

    Raises:
        ConfigError: as `load_policy`.
        ValueError: mlx-lm does not know the architecture.
    """
    # Of a model on the hub this loads no more than config.json.
    folder = mlx_lm.utils._download(str(locate(config.model_name)), allow_patterns=["config.json"])  # noqa: SLF001
    architecture = in_small(json.loads((folder / "config.json").read_text()))
    model_class, arguments = mlx_lm.utils._get_classes(architecture)  # noqa: SLF001
    mx.random.seed(seed)
    model: Any = model_class(arguments.from_dict(architecture))
    if hasattr(model, "sanitize") and architecture.get("tie_word_embeddings", True):
        with contextlib.suppress(KeyError):
            model.sanitize({})  # here gemma3 learns that it has no head of its own
    _quantize_as_stored(model, architecture.get("quantization"))
    tokenizer = mlx_lm.utils.load_tokenizer(EMBEDDED)  # its text does not matter
    policy = Policy(config.model_name, model, lambda: tokenizer, architecture, Path(folder), config)
    prepare_base(policy, config.dtype)
    policy.config = config.model_copy(
        update={
            "adapter_path": "",  # its arrays have the real model's sizes
            "lora_layers": -1,  # of fewer layers, all alike
            "lora_keys": tuple(sorted({_IN_LAYER.sub("", key) for key in config.lora_keys})),
        }
    )
    prepare_training(policy, seed)
    return policy


def in_small(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of config.json with fewer layers, narrower MLPs and a smaller vocabulary.

    Enough layers are kept to have one of each kind.
    """
    layers = architecture.get("num_hidden_layers", LAYERS)
    each = {key for key, value in architecture.items() if isinstance(value, list) and len(value) == layers}
    periods = (architecture.get(key) for key in ("sliding_window_pattern", "full_attention_interval"))
    kinds = (architecture[key] for key in each)
    needed = (max(map(values.index, values), default=0) + 1 for values in kinds)
    kept = min(layers, MOST_LAYERS, max(LAYERS, *needed, *(p for p in periods if isinstance(p, int)), 0))
    small = {key: value[:kept] if key in each else value for key, value in architecture.items()}
    small["num_hidden_layers"] = kept
    for key in ("intermediate_size", "moe_intermediate_size"):
        if isinstance(small.get(key), int):
            small[key] = min(small[key], WIDTH)
    if isinstance(text := small.get("text_config"), Mapping):
        small["text_config"] = in_small(text)
    vocabulary = small.get("vocab_size")
    if isinstance(vocabulary, int):
        small["vocab_size"] = min(vocabulary, VOCABULARY + vocabulary % BLOCK)
    return small


def _quantize_as_stored(model: nn.Module, stored: Mapping[str, Any] | None) -> None:
    """Quantise what a stored model has quantised; its config.json may have settings of single modules."""
    if stored is None:
        return

    def choice(path: str, module: nn.Module) -> Any:
        fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % stored["group_size"] == 0
        return fits and stored.get(path, True)

    nn.quantize(
        model, stored["group_size"], stored["bits"], mode=stored.get("mode", "affine"), class_predicate=choice
    )
