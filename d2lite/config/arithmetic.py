"""Values that YAML files give as Python arithmetic, evaluated without running any code."""

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

_MAX_LENGTH = 1000
_MAX_EXPONENT = 64

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_UNARY: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def evaluate_arithmetic(expression: str) -> Any:
    """Evaluates an expression such as `[[x, x * 2**(1.0/3)] for x in [32, 64]]`.

    Args:
        expression: made of numbers, lists, tuples, `+ - * / **` between numbers, and comprehensions of one
            variable over a list or tuple. Nothing else is understood: no names, calls, attributes or strings.

    Returns:
        A number, or lists and tuples of numbers.

    Raises:
        ValueError: if it contains anything else, or a result is not a finite number.
    """
    if len(expression) > _MAX_LENGTH:
        raise ValueError(f"an expression of more than {_MAX_LENGTH} characters is not evaluated")
    try:
        return _evaluate(ast.parse(expression.strip(), mode="eval").body, {})
    except (SyntaxError, ArithmeticError) as e:
        raise ValueError(f"{expression!r} cannot be evaluated: {e}") from None


def _evaluate(node: ast.expr, names: dict[str, float]) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        values = [_evaluate(element, names) for element in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    if isinstance(node, ast.ListComp):
        return _comprehension(node, names)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_number(node.operand, names))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _binary(node, names)
    raise ValueError(
        f"{ast.unparse(node)!r} is not plain arithmetic: only numbers, lists, tuples, + - * / ** and a list "
        "comprehension over a list are evaluated"
    )


def _number(node: ast.expr, names: dict[str, float]) -> float:
    value = _evaluate(node, names)
    if not isinstance(value, (int, float)):
        raise ValueError(f"{ast.unparse(node)!r} must be a number to be calculated with")
    return value


def _binary(node: ast.BinOp, names: dict[str, float]) -> float:
    left, right = _number(node.left, names), _number(node.right, names)
    # A tower of powers of integers would take all time and memory.
    if isinstance(node.op, ast.Pow) and (abs(right) > _MAX_EXPONENT or abs(left) > 1e6):
        raise ValueError(f"{ast.unparse(node)!r} is too large a power")
    result = _BINARY[type(node.op)](left, right)
    if isinstance(result, complex) or not math.isfinite(result):
        raise ValueError(f"{ast.unparse(node)!r} is not a finite number")
    return result


def _comprehension(node: ast.ListComp, names: dict[str, float]) -> list[Any]:
    if len(node.generators) != 1:
        raise ValueError(f"{ast.unparse(node)!r} must have a single 'for'")
    loop = node.generators[0]
    if loop.ifs or loop.is_async or not isinstance(loop.target, ast.Name):
        raise ValueError(f"{ast.unparse(node)!r} must be of the form [... for x in [...]]")
    if not isinstance(loop.iter, (ast.List, ast.Tuple)):
        raise ValueError(f"{ast.unparse(node)!r} must loop over a list that is written out")
    values = (_number(element, names) for element in loop.iter.elts)
    return [_evaluate(node.elt, {**names, loop.target.id: value}) for value in values]
