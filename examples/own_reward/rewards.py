"""A reward of your own: it checks the work, not the answer.

It runs in a process of its own: if it hangs or crashes, the run goes on.
"""

import re

#: A calculation with its result, as in 7*3=21.
EQUATION = re.compile(r"(\d{1,4})([-+*])(\d{1,4})=(\d{1,8})")


def checked_work(completions, operands, log_metric, **columns):
    """Return one value for each completion: how much of its work is right, from 0 to 1.

    Args:
        completions: What the model wrote. The problems are chats, so each is a chat; its last turn is the model's.
        operands: A column of the data, once for each completion: the numbers of the problem.
        log_metric: Logs a number; its mean over an update is `logged` in metrics.jsonl.
        columns: All other columns; `answer` is among them, and this reward does not need it.
    """
    values = [value_of(completion[-1]["content"], given) for completion, given in zip(completions, operands)]
    log_metric("no_work", sum(value == 0 for value in values) / len(values))
    return values


def value_of(text, numbers):
    """Return the share of equations that hold, times the share of the problem's numbers that these use."""
    equations = EQUATION.findall(text)
    right = [equation for equation in equations if holds(*equation)]
    if not right:
        return 0.0
    used = {int(number) for left, _, other, _ in right for number in (left, other)}
    return len(right) / len(equations) * sum(number in used for number in numbers) / len(numbers)


def holds(left, operator, other, result):
    """Return whether an equation, given as four texts, is true."""
    a, b = int(left), int(other)
    return {"+": a + b, "-": a - b, "*": a * b}[operator] == int(result)
