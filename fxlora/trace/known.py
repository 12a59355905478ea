"""Values that follow from sizes alone: what a branch on them decides, a trace may decide too.

`torch.arange(n)` holds no data of the model or its inputs. When a model asks something of such a
tensor ("are these positions one unbroken sequence?"), the answer can be computed at the traced
sizes, and eager would have computed the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import _disable_current_modes

_ASKS = frozenset("__bool__ __int__ __float__ __index__ item".split())
# Draws that leave a number behind, and draws into memory or over a tensor.
RANDOM = frozenset("rand randn randint randperm rand_like randn_like bernoulli multinomial".split())
_DRAWS = frozenset(
    "uniform_ normal_ random_ bernoulli_ exponential_ geometric_ cauchy_ log_normal_ trunc_normal_ "
    "kaiming_uniform_ dropout dropout_ alpha_dropout feature_dropout".split()
)


class NotKnown(Exception):
    """The value depends on data."""


def asks(func: Any) -> bool:
    """Whether a torch call turns a tensor's value into a Python value."""
    return getattr(func, "__name__", "") in _ASKS


class Known:
    """Computes, on the CPU, the nodes that depend on sizes alone.

    Attributes:
        writers: node -> the in-place calls so far that wrote into its memory.
    """

    def __init__(self) -> None:
        self._values: dict[Node, Any] = {}
        self.writers: dict[Node, list[Node]] = {}

    def answer(self, node: Node, hints: dict[Node, int], question: str | None = None) -> Any:
        """Returns what a question (`__bool__`, `item`, ...) of a node's value gives.

        Raises:
            NotKnown: when the value depends on data.
        """
        with _disable_current_modes():
            value = self.value(node, hints)
            return value if question is None else getattr(value, question)()

    def value(self, node: Node, hints: dict[Node, int]) -> Any:
        """Returns the value of a node, given the sizes the input dimensions had in the trace.

        Raises:
            NotKnown: when it depends on data.
        """
        needed = self._needed(node, hints)
        if not needed.keys() & self.writers.keys():
            for n in needed:
                if n not in self._values:
                    self._values[n] = self._compute(n, hints, self._values)
            return self._values[node]
        # What was written into has no one value: run it all again, in the order of the graph, and
        # into memory of its own.
        values: dict[Node, Any] = {}
        for n in sorted(needed):
            values[n] = self._compute(n, hints, values)
        return values[node]

    def _needed(self, node: Node, hints: dict[Node, int]) -> dict[Node, None]:
        """Returns the nodes that a node's value follows from, inputs first, itself last."""
        needed: dict[Node, None] = {}
        entered: set[Node] = set()
        todo = [node]
        while todo:
            at = todo[-1]
            if at in needed or at in entered:
                needed.setdefault(todo.pop())
                continue
            entered.add(at)
            plain = at in hints or is_device(at)
            before = [] if plain else [*at.all_input_nodes, *self.writers.get(at, ())]
            todo += [n for n in before if n not in entered]
        return needed

    def _compute(self, node: Node, hints: dict[Node, int], values: dict[Node, Any]) -> Any:
        if node in hints:
            return hints[node]
        if is_device(node):
            return torch.device("cpu")
        name = getattr(node.target, "__name__", node.target)
        if node.op not in ("call_function", "call_method") or name in _DRAWS:
            raise NotKnown
        if name in RANDOM:
            return self._random_bound(node)
        args = _on_cpu(map_arg(node.args, values.__getitem__))
        kwargs = _on_cpu(map_arg(node.kwargs, values.__getitem__))
        if any(isinstance(v, Range) for v in (*args, *kwargs.values())):
            return _compare(str(name), args)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _random_bound(self, node: Node) -> Any:
        # Of a random number only its range is known: rand() is in [0, 1).
        if getattr(node.target, "__name__", "") != "rand":
            raise NotKnown
        return Range()


class Range:
    """A number somewhere in [0, 1)."""


def _compare(name: str, args: tuple[Any, ...]) -> bool:
    """Decides `rand() < c` for the constants where every draw gives the same answer."""
    if len(args) == 2 and isinstance(args[0], Range) and isinstance(args[1], (int, float)):
        if (name in ("lt", "le") and args[1] < 0) or (name == "lt" and args[1] == 0):
            return False
        if name in ("lt", "le") and args[1] >= 1:
            return True
        if name in ("gt", "ge") and args[1] >= 1:
            return False
    raise NotKnown


def is_device(node: Node) -> bool:
    """Whether a node reads the device of an input."""
    return node.target is getattr and node.args[1] == "device"


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, (tuple, list)):
        return type(value)(_on_cpu(v) for v in value)
    if isinstance(value, dict):
        return {k: _on_cpu(v) for k, v in value.items()}
    return value
