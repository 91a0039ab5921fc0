"""Try a finished model folder: load it and sample one answer.

This happens once after a conversion, with the same mlx-lm and transformers that training will use.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import mlx_lm
from mlx.utils import tree_flatten

from grpo_actors.errors import ModelError
from grpo_actors.policy.quantization import parameter_count, storage
from grpo_actors.policy.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Trial:
    """A greedy answer with the model's size and speed; `tokens_per_s` counts only decoding."""

    parameters: int
    weight_bytes: int
    stored: str
    prompt: str
    answer: str
    tokens: int
    tokens_per_s: float


def try_model(folder: Path, prompt: str, max_tokens: int, *, trust_remote_code: bool = False) -> Trial:
    """Load `folder` and answer `prompt` greedily, through the chat template if there is one.

    Raises:
        ModelError: mlx-lm refuses the folder.
    """
    try:
        model, config = mlx_lm.utils.load_model(folder, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(
            folder, trust_remote_code=trust_remote_code, end_tokens=config.get("eos_token_id")
        )
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise ModelError(f"{folder}: mlx-lm does not load it: {error}") from error
    encoded: str | list[int] = prompt
    if tokenizer.has_chat_template:
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True
        )
    answer, last, began = "", None, time.perf_counter()
    for last in mlx_lm.stream_generate(model, tokenizer, encoded, max_tokens=max_tokens):
        answer += last.text
    elapsed = time.perf_counter() - began
    tokens = last.generation_tokens if last else 0
    return Trial(
        parameters=parameter_count(model),
        weight_bytes=sum(array.nbytes for _, array in tree_flatten(model.parameters())),
        stored=storage(model),
        prompt=prompt,
        answer=answer.strip(),
        tokens=tokens,
        tokens_per_s=last.generation_tps if last and tokens > 1 else tokens / elapsed,
    )
