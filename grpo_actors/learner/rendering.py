"""The rendered prompt, as the model reads it, and where its system prompt comes from."""

import json
import re
from collections.abc import Sequence

from grpo_actors.config.data import DataConfig
from grpo_actors.learner.exchange.supply import Supply
from grpo_actors.policy.model import Policy
from grpo_actors.tasks.answers import FORMAT_REQUEST
from grpo_actors.tasks.task import Message

#: Words before the first turn's text from which on a template is taken to add a system prompt: headers have fewer.
_WORDS = 5
#: A user's text that no template contains.
_PROBE = "grpoactorsprobe"
#: Characters of a long prompt that are shown: of its beginning, and of its end, where the answer begins.
_FIRST_CHARACTERS, _LAST_CHARACTERS = 1500, 500


def first_prompt(policy: Policy, data: DataConfig, supply: Supply) -> str:
    """Return one line with the first prompt that a run poses, in JSON's notation, and where its system prompt comes from."""
    position = next(supply.posed())
    _, problem = supply.problem(position)
    tokens = supply.prompt(position)
    text, origin = rendered(policy, tokens), system_origin(policy, data, problem.messages)
    left_out = len(text) - _FIRST_CHARACTERS - _LAST_CHARACTERS
    if left_out > 0:
        text = f"{text[:_FIRST_CHARACTERS]} … {left_out:,} characters … {text[-_LAST_CHARACTERS:]}"
    quoted = json.dumps(text, ensure_ascii=False)
    return f"first prompt ({len(tokens)} tokens; system prompt: {origin}): {quoted}"


def rendered(policy: Policy, prompt: Sequence[int]) -> str:
    """Return the text of a prompt's tokens, with special tokens."""
    text: str = policy.tokenizer.decode(list(prompt), skip_special_tokens=False)
    return text


def system_origin(policy: Policy, data: DataConfig, messages: Sequence[Message]) -> str:
    """Return where the system prompt of a problem comes from, in words.

    Args:
        policy: Its chat template may add a system prompt of its own.
        data: Section [data].
        messages: The problem's chat.
    """
    if any(message["role"] == "system" for message in messages):
        if data.system_prompt:
            return "data.system_prompt"
        is_own = not data.path or any(message["content"] == FORMAT_REQUEST for message in messages)
        return f"the task {data.task}" if is_own else "the data"
    return "the model's chat template" if _template_adds_one(policy) else "none"


def _template_adds_one(policy: Policy) -> bool:
    """Return whether the template writes sentences of its own before the text of a single user turn."""
    text = rendered(policy, policy.chat.encode([{"role": "user", "content": _PROBE}]))
    head = text.partition(_PROBE)[0]
    for special in policy.tokenizer.all_special_tokens:
        head = head.replace(special, " ")
    return len(re.findall(r"\w+", head)) >= _WORDS
