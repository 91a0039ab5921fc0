"""Read a model's tokenizer in a thread, beside what needs no text: reading the weights, the first use of the device.

A vocabulary of 150,000 tokens takes about two CPU seconds. Knows no arrays.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx_lm.utils

from grpo_actors.config import ModelConfig
from grpo_actors.errors import ModelError, first_line


def read_beside(folder: Path, config: ModelConfig) -> Callable[[], Any]:
    """Begin to read the tokenizer in `folder`; return a function that waits for it and returns it.

    The function raises ModelError if the tokenizer is unusable, and so does this one if config.json is.
    """
    with as_model_error(config):
        end_tokens = mlx_lm.utils.load_config(folder).get("eos_token_id")
    pool = ThreadPoolExecutor(1, "tokenizer")
    reading = pool.submit(_read, folder, config, end_tokens)
    pool.shutdown(wait=False)  # it ends with its only task

    def wait() -> Any:
        with as_model_error(config):
            return reading.result()

    return wait


@contextlib.contextmanager
def as_model_error(config: ModelConfig) -> Iterator[None]:
    """Turn what mlx-lm and transformers raise at an unusable model into a ModelError of one line."""
    try:
        yield
    except SystemExit as error:  # of a module of mlx-lm that lacks another package; it has printed which
        raise ModelError(
            f"model.model_name: {config.model_name!r} cannot be loaded: its module of mlx-lm needs another package"
        ) from error
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError) as error:
        # TypeError, AttributeError: a setting is missing in config.json. RuntimeError: mlx cannot read a weights file, or
        # has a kernel for another back end only.
        raise ModelError(
            f"model.model_name: {config.model_name!r} cannot be loaded: {first_line(error)}"
        ) from error


def _read(folder: Path, config: ModelConfig, end_tokens: int | list[int] | None) -> Any:
    with _without_garbage_collection():
        return mlx_lm.utils.load_tokenizer(
            folder, {"trust_remote_code": config.trust_remote_code}, eos_token_ids=end_tokens
        )


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Keep Python from looking through a vocabulary's half a million objects again and again while they are made.

    It takes a fifth of the time of reading them. All threads do without it for this second.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
