"""The tokens between two turns of the policy: a message as the chat template puts it there.

Tokens that were sampled are never tokenised again: the new ones go on from them. What they are is read off a
conversation that is made up, by its template's text from where the assistant's words end to where it speaks again.
So a template may do with earlier turns what it likes (Qwen3 takes the thoughts out of them): the policy goes on from what
it wrote, and the learner computes with the same tokens.
"""

from collections.abc import Mapping

from jinja2 import TemplateError

from grpo_actors.errors import ModelError
from grpo_actors.policy.model import Policy

#: What the assistant is made to have said; no template has it.
_SAID = "\N{WHITE SQUARE}said\N{WHITE SQUARE}"


def encode_reply(policy: Policy, message: Mapping[str, str], *, after_stop_token: bool) -> list[int]:
    """Token ids from the end of the assistant's words to the beginning of its next turn, `message` in between.

    Args:
        policy: Its tokenizer's chat template is used.
        message: A role that the template knows, and a content.
        after_stop_token: The turn ended with a stop token, which is then not among the ids; else it ended with a stop
            string, and the template's token for the end of a turn is.

    Raises:
        ModelError: there is no chat template, it refuses the message, or an assistant's turn does not end with a
            token that ends a completion.
    """
    if policy.tokenizer.chat_template is None:
        raise ModelError(f"{policy.name}: its tokenizer has no chat template, which data.environment needs")
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SAID}, dict(message)]
    try:
        text: str = policy.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ModelError(
            f"{policy.name}: its chat template refuses a turn of role {message['role']!r} after the assistant's ({error})"
        ) from error
    _, said, after = text.partition(_SAID)
    # It begins with a token of its own, so that it is tokenised as it would be within the whole.
    ids: list[int] = policy.tokenizer.encode(after, add_special_tokens=False)
    if not said or not ids or ids[0] not in policy.stop_tokens:
        raise ModelError(
            f"{policy.name}: its chat template does not end an assistant's turn with a token that ends a completion, "
            f"which data.environment needs, got {after[:40]!r}"
        )
    return ids[1:] if after_stop_token else ids
