"""Constraints of a search space: expressions over a trial's settings, evaluated without `eval`.

Names are dotted keys of the student's config, defaults included, `teacher` or `variant`; there are literals, + - * /,
comparisons, `in`, `is`, `and`, `or`, `not`. A key that a trial does not have is None, so `teacher is None` holds for a
student without one.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from kdecs.errors import ConfigError

_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: lambda left, right: left is right if right is None else left == right,
    ast.IsNot: lambda left, right: left is not right if right is None else left != right,
    ast.In: lambda item, values: item in values,
    ast.NotIn: lambda item, values: item not in values,
}


def holds(constraint: str, values: Mapping[str, Any]) -> bool:
    """Whether a constraint holds for the nested config `values` with `teacher` and `variant` beside its keys.

    Raises ConfigError for an expression that does not parse, or that the values do not fit.
    """
    try:
        parsed = ast.parse(constraint.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise ConfigError(f"constraints: {constraint!r} is no expression") from None
    try:
        return bool(_value(parsed, values))
    except (TypeError, ArithmeticError, ValueError) as error:
        missing = [key for key in _keys(parsed) if _lookup(key, values) is None]
        hint = f" ({', '.join(missing)}: None for this trial)" if missing else ""
        raise ConfigError(f"constraints: {constraint!r}: {error}{hint}") from None


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value):
            return value
        case ast.List(items) | ast.Tuple(items):
            return [_value(item, values) for item in items]
        case ast.Name() | ast.Attribute():
            return _lookup(_dotted(node), values)
        case ast.BoolOp(kind, parts):
            found = (_value(part, values) for part in parts)
            return all(found) if isinstance(kind, ast.And) else any(found)
        case ast.UnaryOp(ast.Not(), operand):
            return not _value(operand, values)
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand, values)
        case ast.BinOp(left, kind, right) if type(kind) in _OPERATORS:
            return _OPERATORS[type(kind)](_value(left, values), _value(right, values))
        case ast.Compare(left, kinds, rights):
            sides = [_value(side, values) for side in (left, *rights)]
            pairs = zip(kinds, sides, sides[1:], strict=False)
            return all(_OPERATORS[type(kind)](a, b) for kind, a, b in pairs)
    raise ValueError(f"{ast.unparse(node)} is not understood; known are keys, values, + - * /, comparisons")


def _keys(node: ast.expr) -> list[str]:
    """The dotted keys of an expression, in order."""
    if isinstance(node, ast.Name | ast.Attribute):
        return [_dotted(node)] if _is_key(node) else []
    inner = [
        key for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr) for key in _keys(child)
    ]
    return list(dict.fromkeys(inner))


def _is_key(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and _is_key(node.value))


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError(f"{ast.unparse(node)} is no key")


def _lookup(key: str, values: Mapping[str, Any]) -> Any:
    found: Any = values
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found
