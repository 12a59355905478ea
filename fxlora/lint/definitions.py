"""Where the code of a model makes a layer: the lines of an assignment, or of an entry of a container."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_REGISTERING = frozenset(("register_module", "add_module", "register_parameter"))


class Lines(NamedTuple):
    """Lines of a file, the first and the last one among them."""

    file: str
    first: int
    last: int


@dataclass(frozen=True)
class _Made:
    """The code that makes an attribute: its lines, what is assigned, and the line before line 1."""

    lines: Lines
    value: ast.expr | None
    before: int


def definition(model: nn.Module, name: str) -> Lines | None:
    """Returns the lines that make a layer; None where the code does not say it plainly.

    `self.x = ...`, also several at once, `self.register_module("x", ...)`, and the entry of an
    `nn.Sequential`, `nn.ModuleList` or `nn.ModuleDict` that is written out where it is made.

    Args:
        model: the model the layer is part of.
        name: the layer's name in it.
    """
    found = _made(model, name)
    return None if found is None else found.lines


def _made(model: nn.Module, name: str) -> _Made | None:
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    for cls in type(module).__mro__:
        if cls in (nn.Module, object):
            break
        found = _assignments(cls).get(last)
        if found is not None:
            return found
    if not owner or type(module) not in _CONTAINERS:
        return None
    holder = _made(model, owner)
    entry = None if holder is None else _entry(holder.value, module, last)
    return None if holder is None or entry is None else _at(entry, holder.lines.file, holder.before)


def _at(node: ast.expr | ast.stmt, file: str, before: int, value: ast.expr | None = None) -> _Made:
    lines = Lines(file, before + node.lineno, before + (node.end_lineno or node.lineno))
    return _Made(lines, node if isinstance(node, ast.expr) else value, before)


# ---- assignments -------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _assignments(cls: type) -> dict[str, _Made]:
    """Returns attribute -> where a class's own code makes it."""
    try:
        file = inspect.getsourcefile(cls)
        source, start = inspect.getsourcelines(cls)
        tree = ast.parse(textwrap.dedent("".join(source)))
    except (OSError, TypeError, SyntaxError):
        return {}
    found: dict[str, _Made] = {}
    if file is None:
        return found
    for method in _methods(tree.body[0]):
        me = method.args.args[0].arg if method.args.args else ""
        for node in ast.walk(method):
            for name, where, value in _of_statement(node, me):
                found.setdefault(name, _at(where, file, start - 1, value))
    return found


def _methods(node: ast.AST) -> Iterator[ast.FunctionDef]:
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.FunctionDef):
            yield inner
        elif not isinstance(inner, ast.ClassDef):
            yield from _methods(inner)


_Found = tuple[str, "ast.expr | ast.stmt", "ast.expr | None"]


def _of_statement(node: ast.AST, me: str) -> Iterator[_Found]:
    """Yields (attribute, what its lines are, what it is) of what a statement makes."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            yield from _of_target(target, node, node.value, me)
    elif isinstance(node, ast.AnnAssign):
        yield from _of_target(node.target, node, node.value, me)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        name, value = _registered(node.value, me)
        if name is not None:
            yield name, node, value


def _of_target(
    target: ast.expr, statement: ast.stmt, value: ast.expr | None, me: str
) -> Iterator[_Found]:
    if isinstance(target, ast.Attribute):
        if _is(target.value, me):
            yield target.attr, statement, value
    elif isinstance(target, (ast.Tuple, ast.List)):
        # Each has the lines of its own part, where the parts are written out too.
        parts = _written_out(value)
        apart = len(parts) == len(target.elts) and not any(
            isinstance(e, ast.Starred) for e in (*parts, *target.elts)
        )
        for i, inner in enumerate(target.elts):
            if isinstance(inner, ast.Attribute) and _is(inner.value, me):
                yield inner.attr, parts[i] if apart else statement, parts[i] if apart else None


def _is(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _registered(call: ast.Call, me: str) -> tuple[str | None, ast.expr | None]:
    """Returns what `self.register_module(name, value)` or `setattr(self, name, value)` make."""
    args = [*call.args, *(k.value for k in call.keywords)]
    if isinstance(call.func, ast.Attribute):
        registers = call.func.attr in _REGISTERING and _is(call.func.value, me)
    else:
        registers = _is(call.func, "setattr") and bool(args) and _is(args[0], me)
        args = args[1:]
    if not registers or len(args) != 2:
        return None, None
    return _text(args[0]), args[1]


def _text(node: ast.expr | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


# ---- entries of containers ---------------------------------------------------------------------


def _entry(made: ast.expr | None, container: nn.Module, key: str) -> ast.expr | None:
    """Returns the code of one entry of a container that is written out where it is made."""
    kind = type(container)
    if not isinstance(made, ast.Call) or made.keywords or _callee(made) != kind.__name__:
        return None
    names = list(container._modules)
    if kind is nn.Sequential and not _is_table(made.args):
        return _by_place(made.args, names, key)
    if len(made.args) != 1:
        return None
    if kind is nn.ModuleList:
        return _by_place(_elements(made.args[0]), names, key)
    return _by_key(made.args[0], key)


def _callee(call: ast.Call) -> str:
    f = call.func
    return f.attr if isinstance(f, ast.Attribute) else f.id if isinstance(f, ast.Name) else ""


def _is_table(args: list[ast.expr]) -> bool:
    return len(args) == 1 and isinstance(args[0], ast.Call) and _callee(args[0]) == "OrderedDict"


def _written_out(node: ast.expr | None) -> list[ast.expr]:
    return node.elts if isinstance(node, (ast.List, ast.Tuple)) else []


def _elements(node: ast.expr) -> list[ast.expr]:
    """Returns the entries of a list; of a comprehension, the comprehension in a star."""
    if isinstance(node, (ast.ListComp, ast.GeneratorExp)):
        return [ast.Starred(node)]
    return _written_out(node)


def _by_place(written: list[ast.expr], names: list[str], key: str) -> ast.expr | None:
    """Returns the entry at a place; of one that is repeated by a comprehension, what it repeats.

    Only where the code and the container agree in their number: one that was appended to, or cut,
    may hold something else there.
    """
    if key not in names or names != [str(i) for i in range(len(names))]:
        return None
    i, stars = names.index(key), [j for j, e in enumerate(written) if isinstance(e, ast.Starred)]
    if not stars:
        return written[i] if len(written) == len(names) else None
    if len(stars) > 1 or len(names) < len(written) - 1:
        return None
    star, after = stars[0], len(written) - 1 - stars[0]
    if i < star:
        return written[i]
    if i >= len(names) - after:
        return written[i - len(names)]
    repeated = written[star].value  # type: ignore[attr-defined]
    return repeated.elt if isinstance(repeated, (ast.ListComp, ast.GeneratorExp)) else None


def _by_key(node: ast.expr, key: str) -> ast.expr | None:
    """Returns the value under a key of a dict, or of an OrderedDict of pairs, that is written out."""
    if isinstance(node, ast.Call) and _callee(node) == "OrderedDict" and len(node.args) == 1:
        node = node.args[0]
    if isinstance(node, ast.DictComp):
        return node.value
    if isinstance(node, ast.Dict):
        pairs = list(zip(node.keys, node.values, strict=True))
    else:
        pairs = [(p[0], p[1]) for e in _written_out(node) if len(p := _written_out(e)) == 2]
    return next((value for k, value in pairs if _text(k) == key), None)
