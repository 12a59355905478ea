"""Symbolic sizes as graph nodes, Python text and numbers: one lowering of sympy, three targets."""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

Apply = Callable[[Callable[..., Any], tuple[Any, ...]], Any]


def ceil_div(a: int, b: int) -> int:
    """Returns a/b rounded up, for ints."""
    return -(-a // b)


def choose(condition: bool, a: Any, b: Any) -> Any:
    """Returns `a` when `condition` holds, else `b` (sympy's Piecewise, one step)."""
    return a if condition else b


def logical_and(*terms: bool) -> bool:
    """Returns whether every term holds."""
    return all(terms)


def logical_or(*terms: bool) -> bool:
    """Returns whether any term holds."""
    return any(terms)


def modular_indexing(a: int, b: int, c: int) -> int:
    """Returns (a // b) % c, torch's ModularIndexing."""
    return (a // b) % c


_BY_NAME: dict[str, Callable[..., Any]] = {
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "CeilDiv": ceil_div,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "ModularIndexing": modular_indexing,
    "Max": max,
    "Min": min,
    "Equality": operator.eq,
    "Unequality": operator.ne,
    "StrictLessThan": operator.lt,
    "StrictGreaterThan": operator.gt,
    "LessThan": operator.le,
    "GreaterThan": operator.ge,
    "And": logical_and,
    "Or": logical_or,
    "Not": operator.not_,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "ToFloat": float,
    "TruncToInt": math.trunc,
    "TruncToFloat": math.trunc,
    "FloorToInt": math.floor,
    "CeilToInt": math.ceil,
    "RoundToInt": round,
    "RoundDecimal": round,
    "floor": math.floor,
    "ceiling": math.ceil,
    "Abs": abs,
    "PowByNatural": pow,
    "FloatPow": pow,
    "OpaqueUnaryFn_sqrt": math.sqrt,
    "OpaqueUnaryFn_log": math.log,
    "OpaqueUnaryFn_log2": math.log2,
    "OpaqueUnaryFn_exp": math.exp,
}


_UNORDERED = frozenset(("Max", "Min", "And", "Or"))


def lower(expr: Any, symbol: Callable[[str], Any], apply: Apply) -> Any:
    """Rewrites a sympy expression in terms of `symbol` leaves and `apply`-ed Python functions.

    Args:
        expr: a sympy expression over the symbols of a ShapeEnv.
        symbol: called with each symbol's name.
        apply: called with a Python function and its lowered arguments.

    Raises:
        NotImplementedError: for a sympy function torch has not produced so far.
    """

    def go(e: Any) -> Any:
        return lower(e, symbol, apply)

    if isinstance(expr, sympy.Symbol):
        return symbol(str(expr))
    if expr is sympy.true or expr is sympy.false:
        return bool(expr)
    if expr.is_Integer:
        return int(expr)
    if expr.is_Rational:
        return apply(operator.truediv, (int(expr.p), int(expr.q)))
    if expr.is_Float:
        return float(expr)
    if expr.is_Add or expr.is_Mul:
        combine: Callable[..., Any] = operator.add if expr.is_Add else operator.mul
        # sympy's own order, and its default_sort_key, follow from what else was computed before.
        terms = sorted(expr.args, key=_rank)
        out = go(terms[0])
        for term in terms[1:]:
            out = apply(combine, (out, go(term)))
        return out
    if expr.is_Pow:
        return apply(pow, (go(expr.base), go(expr.exp)))
    if isinstance(expr, sympy.Piecewise):
        out = go(expr.args[-1][0])
        for value, condition in reversed(expr.args[:-1]):
            out = apply(choose, (go(condition), go(value), out))
        return out
    function = _BY_NAME.get(type(expr).__name__)
    if function is None:
        raise NotImplementedError(f"no Python form for {type(expr).__name__} in {expr}")
    args = sorted(expr.args, key=_rank) if type(expr).__name__ in _UNORDERED else expr.args
    return apply(function, tuple(go(a) for a in args))


def _rank(term: Any) -> tuple[bool, int, str]:
    said = text(term)
    return term.is_number, len(said), said


_INFIX = {
    operator.add: "+",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.truediv: "/",
    operator.mod: "%",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}


@functools.lru_cache(maxsize=4096)
def text(expr: Any) -> str:
    """Returns an expression as Python text.

    >>> s = sympy.Symbol("s0", integer=True)
    >>> text(2 * s + 1)
    's0*2 + 1'
    """

    def apply(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
        sign = _INFIX.get(function)
        if sign is None:
            return f"{function.__name__}({', '.join(map(str, args))})"
        closed = [str(a) if re.fullmatch(r"-?\w+", str(a)) else f"({a})" for a in args]
        if sign == "*":
            return "*".join(
                str(a) if "*" in str(a) and " " not in str(a) else c
                for a, c in zip(args, closed, strict=True)
            )
        return f" {sign} ".join(map(str, args) if sign in "+ == != < <= > >=".split() else closed)

    return str(lower(expr, lambda name: name, apply))


class DataDependentSizeError(Exception):
    """A size that follows from a tensor's values, not from the inputs' sizes."""


class SizeNodes:
    """Builds the nodes that compute sizes at the head of a graph, each expression once.

    Attributes:
        origins: symbol -> (input node, dimension).
        symbols: symbol -> the node that reads it, once it was needed.
        after: the node behind which the next size node goes.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.origins: dict[str, tuple[Node, int]] = {}
        self.after: Node | None = None
        self.symbols: dict[str, Node] = {}
        self._made: dict[Any, Any] = {}

    def node(self, expr: Any) -> Any:
        """Returns the node (or plain number) that holds the value of `expr`."""
        if expr not in self._made:
            self._made[expr] = lower(expr, self._symbol, self._apply)
        return self._made[expr]

    def head(self, op: str, target: Any, args: tuple[Any, ...]) -> Node:
        """Adds a node at the head of the graph, behind the inputs."""
        assert self.after is not None
        with self._graph.inserting_after(self.after):
            node = self._graph.create_node(op, target, args)
        node.meta["module_stack"] = ()
        self.after = node
        return node

    def _symbol(self, name: str) -> Any:
        if name not in self.symbols:
            if name not in self.origins:
                raise DataDependentSizeError(name)
            origin, dimension = self.origins[name]
            self.symbols[name] = self.head("call_method", "size", (origin, dimension))
        return self.symbols[name]

    def _apply(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if not any(isinstance(a, Node) for a in args):
            return function(*args)
        key = (function, args)
        if key not in self._made:
            self._made[key] = self.head("call_function", function, args)
        return self._made[key]


def is_symbolic(x: Any) -> bool:
    """Whether `x` is one of torch's symbolic numbers."""
    return isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool))


def expression(x: Any) -> Any:
    """Returns the simplified sympy expression behind a symbolic number."""
    node = x.node
    return node.shape_env.simplify(node.expr) if node.shape_env is not None else node.expr


def dimension(x: Any) -> int | str:
    """Returns a dimension as an int, or as text when it follows an input's size."""
    if not isinstance(x, torch.SymInt):
        return int(x)
    expr = expression(x)
    return int(expr) if expr.is_number else text(expr)
