"""Rewards of my task. They run in a process of their own: if one hangs or crashes, the run goes on."""


def shows_its_work(prompts, completions, answer, **columns):
    """Return one value for each completion: 1 if it has a calculation, else 0; None: does not apply.

    Args:
        prompts: The problem, once for each completion.
        completions: What the model wrote.
        answer: The true answer, once for each completion.
        columns: All other columns of the data, by name.
    """
    return [float("=" in completion) for completion in completions]
