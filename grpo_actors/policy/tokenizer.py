"""Read a model's tokenizer, which splits text as the model's folder says. Knows no arrays.

transformers 5 chooses a class by the model's type, and some classes replace the rules of tokenizer.json by their own.
The model was trained with those of the file, and other programs read the file.
"""

import contextlib
import gc
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx_lm.utils
from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken, Tokenizer

from grpo_actors.config import ModelConfig
from grpo_actors.errors import ModelError
from grpo_actors.policy.foreign import load_fault
from grpo_actors.policy.tokenizer_files import CONFIG, OLDER_TEMPLATE

#: Letters of four scripts, digits, code and runs of blanks, which are hard for tokenizers.
PROBE = (
    "Héllo, wörld! 12345 + 0.50\n\n\tdef f(x):\n    return x**2  # naïve — 你好 🙂 It's DON'T  \r\n e\u0301"
)


def read_beside(folder: Path, config: ModelConfig) -> Callable[[], Any]:
    """Begin to read the tokenizer in `folder` in a thread; return a function that waits for it and returns it.

    A vocabulary of 150,000 tokens takes about two CPU seconds, beside what needs no text: the weights, the first use of the
    device. The function raises ModelError if the tokenizer is unusable, and so does this one if config.json is.
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
    except StrictDataclassError as error:  # transformers reads all of config.json for its tokenizer
        reason = " ".join(str(error).split())
        raise ModelError(
            f"model.model_name: {config.model_name!r} cannot be loaded: transformers refuses its config.json: {reason}"
        ) from error
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError) as error:
        # TypeError, AttributeError: a setting is missing in config.json. RuntimeError: mlx cannot read a weights file, or
        # has a kernel for another back end only.
        raise ModelError(
            f"model.model_name: {config.model_name!r} cannot be loaded: {load_fault(error)}"
        ) from error


def _read(folder: Path, config: ModelConfig, end_tokens: int | list[int] | None) -> Any:
    with _without_garbage_collection():
        return load_tokenizer(folder, trust_remote_code=config.trust_remote_code, end_tokens=end_tokens)


def load_tokenizer(
    folder: Path, *, trust_remote_code: bool, end_tokens: int | list[int] | None = None
) -> mlx_lm.tokenizer_utils.TokenizerWrapper:
    """Return mlx-lm's wrapper of transformers' tokenizer, with the splitting rules of the folder's tokenizer.json.

    Args:
        folder: A model folder.
        trust_remote_code: Whether a tokenizer may run code of its own.
        end_tokens: Ids that end a completion, besides the tokenizer's own.

    Raises:
        ModelError: transformers gives other ids than the file does, and cannot take its rules.
        Exception: what mlx-lm and transformers raise at an unusable folder; see `as_model_error`.
    """
    wrapper = mlx_lm.utils.load_tokenizer(
        folder, {"trust_remote_code": trust_remote_code}, eos_token_ids=end_tokens
    )
    tokenizer = wrapper._tokenizer  # noqa: SLF001 - mlx-lm has no public name for what it wraps
    if (folder / "tokenizer.json").is_file():
        _follow_file(tokenizer, folder / "tokenizer.json")
    older = folder / OLDER_TEMPLATE
    if (
        not wrapper.has_chat_template and older.is_file()
    ):  # models that take images: transformers' processors read it
        tokenizer.chat_template = json.loads(older.read_text("utf-8"))["chat_template"]
        wrapper.has_chat_template = True
    return wrapper


def _follow_file(tokenizer: Any, file: Path) -> None:
    """Replace the rules of a tokenizer by those of a tokenizer.json, where they differ."""
    rules = getattr(tokenizer, "_tokenizer", None)
    if not isinstance(rules, Tokenizer):  # written in Python
        _compare(tokenizer, file)
        return
    if _same_rules(rules, json.loads(file.read_text("utf-8"))):
        return
    own = Tokenizer.from_file(str(file))
    # Whether BOS and EOS frame a text is a setting of tokenizer_config.json, and so are some added tokens.
    own.post_processor = rules.post_processor
    own.encode_special_tokens = rules.encode_special_tokens
    own.add_tokens(
        [
            token
            for _, token in sorted(rules.get_added_tokens_decoder().items())
            if own.token_to_id(token.content) is None
        ]
    )
    if own.get_vocab() != rules.get_vocab():
        raise ModelError(f"{file}: transformers' {type(tokenizer).__name__} gives its tokens other ids")
    tokenizer._tokenizer = own  # noqa: SLF001 - `backend_tokenizer` is read-only


def _compare(tokenizer: Any, file: Path) -> None:
    """Refuse a class of transformers that reads a trial text otherwise than the file; one of the model's authors may."""
    of_file = Tokenizer.from_file(str(file)).encode(PROBE, add_special_tokens=False).ids
    is_theirs = type(tokenizer).__module__.startswith("transformers.")
    if is_theirs and tokenizer.encode(PROBE, add_special_tokens=False) != of_file:
        raise ModelError(
            f"{file}: transformers' {type(tokenizer).__name__} splits text otherwise; set tokenizer_class in "
            f'{CONFIG} to "PreTrainedTokenizerFast", which reads the file'
        )


def _same_rules(rules: Tokenizer, described: dict[str, Any]) -> bool:
    """Return whether rules are written as in a tokenizer.json: then they split alike. Takes no second vocabulary."""
    steps = ("normalizer", "pre_tokenizer", "decoder")
    if any(_content(getattr(rules, step)) != described.get(step) for step in steps):
        return False
    model = dict(described["model"])
    vocabulary, _, _ = model.pop("vocab"), model.pop("merges", None), model.pop("type", None)
    if rules.get_vocab_size(with_added_tokens=False) != len(vocabulary):
        return False
    if any((getattr(rules.model, key, None) or None) != (value or None) for key, value in model.items()):
        return False
    added = {number: _state(token) for number, token in rules.get_added_tokens_decoder().items()}
    return all(
        added.get(token["id"]) == {key: value for key, value in token.items() if key != "id"}
        for token in described.get("added_tokens", ())
    )


def _content(step: Any) -> Any:
    return None if step is None else json.loads(step.__getstate__())


def _state(token: AddedToken) -> dict[str, Any]:
    state: dict[str, Any] = token.__getstate__()
    return state


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
