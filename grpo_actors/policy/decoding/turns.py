"""The tokens between two turns of the policy: a message as the chat template writes it.

Sampled tokens are never tokenised again; the new tokens are appended to them. They come from an invented conversation: the
text that its template produces between the end of the assistant's words and the point where the assistant speaks again.
So it does not matter what a template does with earlier turns (Qwen3 removes the thoughts): the policy continues from
the tokens that it sampled, and the learner computes with the same tokens.
"""

from collections.abc import Mapping

from grpo_actors.errors import ModelError
from grpo_actors.policy.chat_template import PLACEHOLDER, TEMPLATE_ERRORS
from grpo_actors.policy.model import Policy


def encode_reply(policy: Policy, message: Mapping[str, str], *, after_stop_token: bool) -> list[int]:
    """Return the token ids from the end of the assistant's words to the beginning of its next turn, with `message` between.

    Args:
        policy: The policy whose chat template is used.
        message: A role that the template supports, and a content.
        after_stop_token: True if the turn ended with a stop token, which the ids then leave out. False if it ended with a
            stop string; the ids then begin with the template's token for the end of a turn.

    Raises:
        ModelError: there is no chat template, it refuses the message, it does not end an assistant's turn with a stop
            token, or it has tokens that the model cannot read.
    """
    if not policy.tokenizer.has_chat_template:
        raise ModelError(f"{policy.name}: its tokenizer has no chat template, which data.environment needs")
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PLACEHOLDER}, message]
    try:
        text = policy.chat.render(chat)
    except TEMPLATE_ERRORS as error:
        raise ModelError(
            f"{policy.name}: its chat template refuses a turn of role {message['role']!r} after the assistant's ({error})"
        ) from error
    _, found, after = text.partition(PLACEHOLDER)
    # The text begins with a special token, so it is tokenised as it would be within the whole conversation.
    ids: list[int] = policy.tokenizer.encode(after, add_special_tokens=False)
    if not found or not ids or ids[0] not in policy.stop_tokens:
        raise ModelError(
            f"{policy.name}: its chat template does not end an assistant's turn with a token that ends a completion, "
            f"which data.environment needs, got {after[:40]!r}"
        )
    policy.check_readable(ids, f"a reply of role {message['role']!r} in its chat template")
    return ids[1:] if after_stop_token else ids
