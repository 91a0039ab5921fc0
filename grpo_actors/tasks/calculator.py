"""A calculator as an environment: the policy writes ``<tool>12*7</tool>``, the reply is ``84``.

It supports numbers, + − * / and parentheses. Nothing is executed: the text is parsed, and each node of the tree is
looked up in a table. A node that is not in the table is an error, and the policy reads the error as the reply.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from grpo_actors.tasks.task import Message

#: Most characters of an expression; this also bounds the depth of its tree and the digits of its numbers.
MAX_CHARACTERS = 200
#: A result with a larger absolute value is not written out.
MAX_VALUE = 10**15

_CALL = re.compile(r"<tool>([^<]*)</tool>")
_CHARACTERS = re.compile(r"[0-9.+\-*/() ]*")

_BINARY: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_UNARY: Mapping[type[ast.unaryop], Callable[[Fraction], Fraction]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def calculator(messages: Sequence[Message], answer: str, **columns: Any) -> str | None:
    """Return the value of the last expression in tool tags in the last turn; None if there is none."""
    del answer, columns
    calls = _CALL.findall(messages[-1]["content"])
    return calculate(calls[-1]) if calls else None


def calculate(expression: str) -> str:
    """Return the value, exact if it is whole and else to ten digits; or ``error: `` and the reason."""
    if len(expression) > MAX_CHARACTERS:
        return f"error: longer than {MAX_CHARACTERS} characters"
    if not _CHARACTERS.fullmatch(expression):
        return "error: only numbers, + - * / and parentheses"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError):
        return "error: not an expression"
    if abs(value) > MAX_VALUE:
        return "error: too large"
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number):
            return Fraction(str(number))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left), _value(right))
    raise ValueError(f"not allowed: {type(node).__name__}")
