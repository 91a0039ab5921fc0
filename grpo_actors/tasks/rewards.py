"""The interface of rewards, and the six built-in rewards.

A reward is a function with the signature of TRL and MLX-GRPO. It is called with keywords for the completions of one
group:

    reward(prompts, completions, answer, **columns) -> list of numbers, one for each completion

``prompts[i]`` is the chat before completion i. ``completions[i]`` is ``[{"role": "assistant", "content": text}]``, or
with an environment all turns, with the assistant's last turn at the end. ``answer[i]`` is the true answer as text. Every
further column of the data set is passed as such a list too. ``thoughts[i]`` is the text of the completion's thinking, None
if it has none that ends; ``reward.grade`` decides whether the content has it too. ``None`` or NaN instead of a number means
that the reward does not apply to that completion. What a user's own function gets besides is in `scoring`.

The built-in rewards are pure, judge the last turn and return a share between 0 and 1. The configuration or the task's
``default_rewards`` set their weights.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Protocol

from grpo_actors.errors import RewardError, nearest
from grpo_actors.tasks.answers import extract_answer, find_answer, read_number, same_answer
from grpo_actors.tasks.task import Message

Chat = Sequence[Message]

#: Larger values become infinity in the learner's float32 arrays.
FLOAT32_MAX = 3.4028234663852886e38

#: Deduction of `xml_count` for each character after ``</answer>``.
TRAILING_CHARACTER_COST = 0.002

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
# Possessive quantifiers make this linear; a part contains no tag of either kind.
_PART = r"<{0}>[^<]*+(?:<(?!/?(?:reasoning|answer)>)[^<]*+)*+</{0}>"
_STRICT = re.compile(_PART.format("reasoning") + r"\s*+" + _PART.format("answer"))


class Reward(Protocol):
    """A built-in reward, or a user's own."""

    def __call__(
        self, prompts: Sequence[Chat], completions: Sequence[Chat], answer: Sequence[str], **columns: Any
    ) -> list[float | None]:
        """Return one value for each completion, or None where the reward does not apply."""
        ...


def correctness(
    prompts: Sequence[Chat], completions: Sequence[Chat], answer: Sequence[str], **columns: Any
) -> list[float | None]:
    """Return 1 if the answer of the completion is the true one, as a number or else as text; None without a true one.

    The column ``mathematics`` says for each completion whether its answer is mathematics, if there is such a column.
    """
    del prompts
    lenient = columns.get("mathematics") or [False] * len(completions)
    return [
        float(same_answer(find_answer(text(completion), mathematics=how).text, true, mathematics=how))
        if true
        else None
        for completion, true, how in zip(completions, answer, lenient, strict=True)
    ]


def integer(
    prompts: Sequence[Chat], completions: Sequence[Chat], answer: Sequence[str], **columns: Any
) -> list[float | None]:
    """Return 1 if the answer of the completion is written as a whole number, right or wrong."""
    del prompts, answer, columns
    answers = [extract_answer(text(completion)) for completion in completions]
    return [float("." not in given and read_number(given) is not None) for given in answers]


def strict_format(
    prompts: Sequence[Chat], completions: Sequence[Chat], answer: Sequence[str], **columns: Any
) -> list[float | None]:
    """Return 1 if the completion is reasoning and answer, each in its tags, with only white space around them."""
    del prompts, answer, columns
    return [float(_STRICT.fullmatch(text(completion).strip()) is not None) for completion in completions]


def soft_format(
    prompts: Sequence[Chat], completions: Sequence[Chat], answer: Sequence[str], **columns: Any
) -> list[float | None]:
    """Return 1 if the four tags occur in order, with any text before, between and after them."""
    del prompts, answer, columns
    return [float(_in_order(text(completion))) for completion in completions]


def xml_count(
    prompts: Sequence[Chat], completions: Sequence[Chat], answer: Sequence[str], **columns: Any
) -> list[float | None]:
    """Return 0.25 for each of the four tags that occurs exactly once, minus a deduction for text after the answer.

    This is a gradual version of `strict_format`. The deduction is `TRAILING_CHARACTER_COST` for each character after
    ``</answer>``, without surrounding white space. The value never falls below 0.
    """
    del prompts, answer, columns
    return [_xml_share(text(completion)) for completion in completions]


def think_format(
    prompts: Sequence[Chat],
    completions: Sequence[Chat],
    answer: Sequence[str],
    thoughts: Sequence[str | None] = (),
    **columns: Any,
) -> list[float | None]:
    """Return 1 if the completion thinks first, ends that with its tag, and then says something."""
    del prompts, answer, columns
    return [
        float(bool(thought) and bool(text(completion).strip()))
        for completion, thought in zip(completions, thoughts or [None] * len(completions), strict=True)
    ]


def text(completion: Chat) -> str:
    """Return the text of the assistant's last turn."""
    return completion[-1]["content"]


def _in_order(written: str) -> bool:
    position = 0
    for tag in TAGS:
        position = written.find(tag, position)
        if position < 0:
            return False
        position += len(tag)
    return True


def _xml_share(written: str) -> float:
    share = 0.25 * sum(written.count(tag) == 1 for tag in TAGS)
    _, closed, trailing = written.rpartition("</answer>")
    if closed:
        share -= TRAILING_CHARACTER_COST * len(trailing.strip())
    return max(share, 0.0)


#: The built-in rewards by their names in a configuration.
REWARDS: Mapping[str, Reward] = {
    "correctness": correctness,
    "integer": integer,
    "strict_format": strict_format,
    "soft_format": soft_format,
    "xml_count": xml_count,
    "think_format": think_format,
}


def built_in(name: str, others: Collection[str] = ()) -> Reward:
    """Return the built-in reward of that name.

    Raises RewardError with the nearest name, of these and of `others`, if there is none.
    """
    if name in REWARDS:
        return REWARDS[name]
    known = [*REWARDS, *others]
    cure = nearest(name, known, show=repr, otherwise=f"; known: {', '.join(known)}")
    raise RewardError(
        f"reward.functions: {name!r} is not a built-in reward{cure} "
        '(an own one is written "file.py:function" or "module:function")'
    )


def checked_values(values: object, count: int) -> list[float | None]:
    """Return `values` as a list of `count` floats or Nones; raise RewardError with the reason if they are not valid.

    Arrays and numbers of NumPy, MLX or PyTorch are converted, and True and False count as 1 and 0. None and NaN mean that
    the reward does not apply. One bad value makes the whole list invalid: it would be unfair if only some completions of
    a group had the reward.
    """
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping | AbstractSet):
        raise RewardError(f"must return a list with one number for each completion, got {_described(values)}")
    values = list(values)
    if len(values) != count:
        raise RewardError(f"must return one value for each of the {count} completions, got {len(values)}")
    return [_checked_value(value, index) for index, value in enumerate(values)]


def _checked_value(value: Any, index: int) -> float | None:
    if value is None:
        return None
    if not isinstance(value, bool | int | float | str) and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, bool | int | float):
        raise RewardError(f"value {index} must be a number, True, False or None, got {_described(value)}")
    if isinstance(value, float) and math.isnan(value):
        return None
    if not -FLOAT32_MAX <= value <= FLOAT32_MAX:
        shown = value if isinstance(value, float) else "a whole number beyond it"
        raise RewardError(f"value {index} must be finite in float32, got {shown}")
    return float(value)


def _described(value: object) -> str:
    shown = f" ({value!r:.60})" if isinstance(value, bool | int | float | str) else ""
    return f"{type(value).__name__}{shown}"
