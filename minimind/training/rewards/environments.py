"""What answers a model's turns in a conversation: an object with `reset` and `step`, and a calculator as the example.

Imports nothing but Python's own library, as rewards.
"""

import ast
import json
import operator
import re
from collections.abc import Callable
from typing import Protocol


class Environment(Protocol):
    """One conversation. It may run again from its reset, so what it says must follow from what it was told."""

    def reset(self, prompt: str) -> None:
        """A conversation begins with `prompt`, the text that the model reads, with the marks of the chat template."""

    def step(self, text: str) -> str | None:
        """What a tool says to what the model wrote; None: that was its answer."""


class Calculator:
    """A tool `calculator` with one argument, an arithmetic `expression`."""

    def reset(self, prompt: str) -> None:
        """Nothing: every call stands for itself."""

    def step(self, text: str) -> str | None:
        """The value of the expression in the last call, or what is wrong with it; None without a call."""
        calls = re.findall(r"<tool_call>(.*?)</tool_call>", text, re.S)
        if not calls:
            return None
        try:
            return f"{calculate(json.loads(calls[-1])['arguments']['expression']):g}"
        except (ArithmeticError, KeyError, RecursionError, SyntaxError, TypeError, ValueError) as error:
            return f"error: {type(error).__name__}"


_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def calculate(expression: str) -> float:
    """The value of numbers, signs, + - * / and brackets. Raises `ValueError` for anything else."""

    def value(node: ast.AST) -> float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return float(number)
            case ast.BinOp() if type(node.op) in _OPERATORS:
                return _OPERATORS[type(node.op)](value(node.left), value(node.right))
            case ast.UnaryOp() if type(node.op) in _OPERATORS:
                return _OPERATORS[type(node.op)](value(node.operand))
        raise ValueError("no arithmetic")

    return value(ast.parse(expression.strip(), mode="eval").body)
