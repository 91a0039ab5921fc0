"""A reward for one source of a mixture: the other sources do not name it, so it does not apply to them."""


def three_steps(completions, **columns):
    """Return 1 for a completion with three calculations, which the sum of four digits takes, else 0.

    A problem from a file is a text, so a completion is one too; those of the built-in task are chats.
    """
    return [float(text.count("=") == 3) for text in completions]
