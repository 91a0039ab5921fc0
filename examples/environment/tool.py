"""An environment: a calculator that writes the result behind every ``=`` of the model."""

import re

#: A calculation that waits for its result, at the end of a turn.
ASKED = re.compile(r"(\d{1,6})([-+*])(\d{1,6})=$")


def result(messages, **columns):
    """Reply to the turn that has just ended, the last of `messages`; None ends the completion.

    It must be a function of its arguments: a group may be sampled again after a crash, and has to come out the same.
    """
    asked = ASKED.search(messages[-1]["content"])
    if asked is None:
        return None
    left, operator, right = int(asked[1]), asked[2], int(asked[3])
    value = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return {"role": "tool", "content": str(value)}
