"""Load a model, and let it answer: what ``grpo generate`` does."""

import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack, overload

from grpo_actors.api.run import Run
from grpo_actors.errors import ConfigError, DataError, nearest
from grpo_actors.generate.command_line import check, parser
from grpo_actors.generate.opening import generator_of, open_model
from grpo_actors.generate.prompts import Prompt as Encodable
from grpo_actors.generate.prompts import as_prompt, is_encodable, with_system
from grpo_actors.tasks.chat import read_chat
from grpo_actors.tasks.lines import excerpt

if TYPE_CHECKING:
    from grpo_actors.generate.generator import Generator
    from grpo_actors.policy.decoding.sampling import Submission
    from grpo_actors.policy.model import Policy

#: A text, or a chat: messages with ``role`` and ``content``, of which the user has the last.
Prompt: TypeAlias = str | Sequence[Mapping[str, str]]
#: What can be named as a model: a model folder, a checkpoint, an adapter, a run (its best checkpoint), a hub id, ``"tiny"``.
ModelName: TypeAlias = str | os.PathLike[str] | Run


class Sampling(TypedDict, total=False):
    """How `generate` samples; what is left out is as in ``grpo generate``."""

    #: Most tokens of an answer (512).
    max_tokens: int
    #: 0: always the likeliest token (0.7).
    temperature: float
    #: Only the likeliest tokens, up to this share of the probability together (1).
    top_p: float
    #: Only this many likeliest tokens; 0: all (0).
    top_k: int
    #: Only tokens with at least this share of the likeliest token's probability (0).
    min_p: float
    #: Above 1, tokens that are already in prompt or answer become less likely (1).
    repetition_penalty: float
    #: Tokens of thinking, after which it is ended; 0: no bound (0).
    think_tokens: int
    #: Most tokens of prompt and answer together; 0: the model's own limit (0).
    max_context: int
    #: Equal seeds give equal answers (0).
    seed: int
    #: Whether to continue the text as it is, without a chat template (False).
    raw: bool
    #: Answers that are sampled side by side (32).
    batch_size: int


#: Type of an option -> what it takes, NumPy's numbers included, and its name in an error.
_KINDS: Mapping[type, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
}


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model, with the prompt that it was trained with. `load` makes it."""

    #: Its folder or hub id.
    name: str
    #: The system prompt of every chat that has none; empty: none.
    system: str
    _policy: "Policy"

    @property
    def module(self) -> Any:
        """The ``mlx.nn.Module``: token ids [B, T] to logits [B, T, V]."""
        return self._policy.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, in mlx-lm's wrapper."""
        return self._policy.tokenizer

    def __repr__(self) -> str:
        return f"<Model {self.name}>"


def load(
    model: ModelName,
    *,
    adapter: str | os.PathLike[str] | None = None,
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Model:
    """Load a model into this process, to `generate` with it more than once.

    Args:
        model: A model folder, a checkpoint, an adapter, a run or its folder (the best checkpoint), a hub id, or ``"tiny"``.
        adapter: An adapter folder, mlx-lm's or PEFT's, to apply to the model.
        system: The system prompt; None: the one that the model was trained with, ``""``: none.
        chat_template_kwargs: Variables of the chat template; None: those that the model was trained with.

    Raises:
        ModelError: There is no usable model.
        ConfigError: The adapter does not fit the model.

    Example:
        >>> model = load("tiny")
        >>> generate(model, "What is 2 + 3?", temperature=0, max_tokens=1)
        '<reasoning>'
    """
    options = parser().parse_args([])
    options.model, options.system, options.no_system = name_of(model), system or None, system == ""
    options.adapter = None if adapter is None else os.fspath(adapter)
    options.chat_template_kwargs = None if chat_template_kwargs is None else dict(chat_template_kwargs)
    check(options)
    policy = open_model(options)
    return Model(options.adapter or options.model, options.system, policy)


def name_of(model: ModelName) -> str:
    """Return what the commands call a model."""
    return str(model.folder) if isinstance(model, Run) else os.fspath(model)


@overload
def generate(  # type: ignore[overload-overlap] # a text is a sequence of texts, too: it has the first overload
    model: Model | ModelName, prompt: str, **sampling: Unpack[Sampling]
) -> str: ...
@overload
def generate(
    model: Model | ModelName, prompt: Sequence[Mapping[str, str]], **sampling: Unpack[Sampling]
) -> str: ...
@overload
def generate(
    model: Model | ModelName, prompt: Sequence[Prompt], **sampling: Unpack[Sampling]
) -> list[str]: ...
def generate(
    model: Model | ModelName, prompt: Prompt | Sequence[Prompt], **sampling: Unpack[Sampling]
) -> str | list[str]:
    """Answer one prompt, or many at a time.

    Args:
        model: What `load` has returned, or a name that `load` takes.
        prompt: A text or a chat, or a list of them. A text becomes the user's turn; the system prompt and the template's
            settings of the training apply.
        **sampling: `Sampling`: ``max_tokens`` (512), ``temperature`` (0.7), ``top_p``, ``top_k``, ``min_p``,
            ``repetition_penalty``, ``think_tokens``, ``max_context``, ``seed`` (0), ``raw``, ``batch_size`` (32), with the
            meanings and defaults of ``grpo generate``.

    Returns:
        The answer, or a list of answers in the order of the prompts. Equal prompts of a list get different answers, and
        equal calls equal ones.

    Raises:
        ConfigError: An option is unknown, of another type or out of bounds.
        DataError: A prompt is no text and no chat, or too long.
        ModelError: There is no usable model, or it has no chat template.

    Example:
        >>> generate("tiny", ["What is 2 + 3?", "What is 4 + 4?"], temperature=0, max_tokens=1)
        ['<reasoning>', '<reasoning>']
    """
    options = _options(sampling)
    if not isinstance(prompt, Sequence):
        raise DataError(f"prompt: must be a text, a chat, or a list of them, got {excerpt(prompt)}")
    loaded = model if isinstance(model, Model) else load(model)
    is_single = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], Mapping))
    system = "" if options.raw else loaded.system
    encodable = [
        _checked(one, system, f"prompt {number}", raw=options.raw)
        for number, one in enumerate([prompt] if is_single else prompt)
    ]
    answers = _answers(generator_of(loaded._policy, options), encodable, options.batch_size)  # noqa: SLF001
    return answers[0] if is_single else answers


def _options(sampling: Mapping[str, Any]) -> Namespace:
    options = parser().parse_args([])
    for name, value in sampling.items():
        if name not in Sampling.__annotations__:
            raise ConfigError(f"argument: {name} is no option{nearest(name, Sampling.__annotations__)}")
        kind = Sampling.__annotations__[name]
        accepted, rule = _KINDS[kind]
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"argument: {name} must be {rule}, got {value!r}")
        setattr(options, name, kind(value))
    check(options)
    return options


def _checked(prompt: object, system: str, where: str, *, raw: bool) -> Encodable:
    if isinstance(prompt, str) and prompt.strip() and is_encodable(prompt):
        return as_prompt(prompt, system, raw=raw)
    try:
        chat = read_chat(list(prompt) if isinstance(prompt, tuple) else prompt)
    except DataError:
        chat = ()
    if raw or not chat or chat[-1]["role"] != "user":
        rule = "a text" if raw else "a text, or a chat that ends with the user"
        raise DataError(f"{where}: must be {rule}, got {excerpt(prompt)}")
    return with_system(chat, system)


def _answers(generator: "Generator", prompts: Sequence[Encodable], rows: int) -> list[str]:
    from grpo_actors.policy.decoding.sampling import Submission, sample_in_turn  # noqa: PLC0415

    def submissions() -> "Iterator[Submission]":
        for index, prompt in enumerate(prompts):
            ids = generator.encode_fitting(prompt, f"prompt {index}")
            yield Submission(index, ids, generator.seeds(index, 1))

    answers = [""] * len(prompts)
    for index, [sample] in sample_in_turn(generator.policy, submissions(), generator.params, rows):
        answers[index] = generator.policy.decode(sample.tokens)
    return answers
