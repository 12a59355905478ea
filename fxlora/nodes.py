"""The tools a rewrite inserts nodes with: each with its role, its site and its adapter."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from fxlora.plan import PlannedSite
from fxlora.trace.bulk import create_after

Entry = tuple[str, PlannedSite]  # an active adapter's name, and the site it adapts
_ARITHMETIC = frozenset(("add", "sub", "mul", "div"))
_COPIED = ("module_stack", "source", "grad_enabled", "autocast")


class Inserter:
    """Adds nodes of one site, each with its role, behind one another."""

    def __init__(self, graph: Graph, site: str, like: Node, layer: str = "") -> None:
        assert like.graph is graph
        self._site, self._like = site, like
        self._layer = layer or site
        self.adapter = ""
        self.last = like

    def add(
        self, role: str, op: str, target: Any, args: tuple[Any, ...], shape: Any, dtype: Any,
        kwargs: dict[str, Any] | None = None,
    ) -> Node:  # fmt: skip
        """Adds a node; `shape` and `dtype` may be None where the trace knows none."""
        node = create_after(self.last, op, target, args, kwargs or {})
        meta = node.meta
        for key in _COPIED:
            if key in self._like.meta:
                meta[key] = self._like.meta[key]
        meta["role"], meta["site"], meta["adapter"] = role, self._site, self.adapter
        if self._layer != self._site:
            meta["layer"] = self._layer
        if "use" in self._like.meta:
            meta["use"] = self._like.meta["use"]
        if shape is not None:
            meta["shape"] = shape
        if dtype is not None:
            meta["dtype"] = autocast_dtype(node) or dtype
        self.last = node
        return node

    def parameter(self, role: str, path: str, value: torch.Tensor) -> Node:
        """Adds the reading of a parameter."""
        return self.add(role, "get_attr", path, (), tuple(value.shape), value.dtype)

    def method(
        self, role: str, name: str, args: tuple[Any, ...], like: Node, **kwargs: Any
    ) -> Node:
        """Adds a method call whose result has the shape of `like`, and its dtype.

        Arithmetic widens: the result is in the widest dtype of what it reads. (None of ours reads a
        tensor of no dimensions in another dtype, which would not widen it.)
        """
        shape, dtype = like.meta.get("shape"), like.meta.get("dtype")
        if name in _ARITHMETIC:
            dtype = functools.reduce(
                wide, (n.meta.get("dtype") for n in args if isinstance(n, Node))
            )
        return self.add(role, "call_method", name, args, shape, dtype, kwargs)


def autocast_dtype(node: Node) -> torch.dtype | None:
    """Returns the dtype torch.autocast gives an adapter's product; None outside, and for other nodes.

    Args:
        node: one that a rewrite inserted, with its meta.
    """
    region = node.meta.get("autocast")
    if region is None or node.op != "call_module":
        return None
    if node.meta.get("role") not in ("lora_A", "lora_B"):
        return None
    found: torch.dtype = getattr(torch, region[1].removeprefix("torch."))
    return found


def attribute(root: nn.Module, path: str) -> Any:
    """Returns the parameter or module at a path."""
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def input_of(call: Node) -> Any:
    """Returns the input of a layer's call."""
    return call.args[0] if call.args else next(iter(call.kwargs.values()))


def redirect(users: Sequence[Node], old: Node, new: Node) -> None:
    """Lets `users` read `new` where they read `old`."""
    # What the trace recorded of the nodes behind holds only then.
    assert new.meta.get("dtype") == old.meta.get("dtype"), (old, new)
    for user in users:
        user.replace_input_with(old, new)
        if old in user.meta.get("mutates", ()):
            user.meta["mutates"] = tuple(new if n is old else n for n in user.meta["mutates"])


def wide(a: Any, b: Any) -> Any:
    """Returns the dtype of a sum of two; None where one is not known."""
    return None if a is None or b is None else torch.promote_types(a, b)
