"""Inputs as placeholders and back: how a call of the model becomes the signature of a graph."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from fxlora.errors import TraceError


@dataclasses.dataclass
class Leaf:
    """One tensor among the inputs: what a reader calls it, the tensor, and its node."""

    name: str
    tensor: torch.Tensor
    node: Node


@dataclasses.dataclass
class Bound:
    """The arguments of one call, bound to the names of `forward`.

    Attributes:
        arguments: every argument by name, in the order of the signature; `*args` get names of
            their own.
        by_position: the names of those that were passed by position.
    """

    arguments: dict[str, Any]
    by_position: list[str]


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
    """Binds a call to `model.forward`, with torch.export's convention.

    Raises:
        TraceError: when the arguments do not fit the signature of `forward`.
    """
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as e:
        raise TraceError(
            f"{type(model).__name__}.forward{signature} does not take these example inputs: {e}"
        ) from None
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            arguments.update({f"{name}_{i}": v for i, v in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        else:
            arguments[name] = value
    # The model is called as the user called it: its hooks see what theirs would.
    return Bound(arguments, list(arguments)[: len(args)])


def _parts(value: Any) -> list[tuple[str, Callable[..., Any], Any, Any]] | None:
    """Returns (text, accessor, key, part) of a container; None for anything else."""
    if isinstance(value, dict):
        return [(f"[{k!r}]", operator.getitem, k, v) for k, v in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{k}", getattr, k, getattr(value, k)) for k in value._fields]
    if isinstance(value, (list, tuple)):
        return [(f"[{i}]", operator.getitem, i, v) for i, v in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        return [(f".{k}", getattr, k, getattr(value, k)) for k in names]
    return None


def holds_tensor(value: Any) -> bool:
    """Whether a nest of containers holds a tensor anywhere."""
    if isinstance(value, torch.Tensor):
        return True
    return any(holds_tensor(p[3]) for p in _parts(value) or ())


def _rebuild(value: Any, parts: dict[Any, Any]) -> Any:
    """Returns a copy of a container with new parts."""
    if isinstance(value, dict):
        new = copy.copy(value)
        for k, v in parts.items():
            new[k] = v
        return new
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(**parts)
    if isinstance(value, (list, tuple)):
        return type(value)(parts.values())
    new = copy.copy(value)
    for k, v in parts.items():
        object.__setattr__(new, k, v)
    return new


class Placeholders:
    """Adds one placeholder per argument and collects the tensors inside them."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.leaves: list[Leaf] = []
        self.constants: dict[str, tuple[Any, Node]] = {}
        self._optional = False

    def add(self, name: str, value: Any, fake: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """Adds the placeholder of one argument; returns the value with fakes in place of tensors."""
        if holds_tensor(value):
            # After a parameter with a default every later one needs a default too; the guard
            # turns a None that arrives there into "missing".
            default: tuple[Any, ...] = (None,) if self._optional else ()
            node = self._graph.create_node("placeholder", name, default)
        else:
            self._optional = True
            node = self._graph.create_node("placeholder", name, (value,))
        return self._walk(name, value, node, fake, top=True)

    def _walk(
        self,
        text: str,
        value: Any,
        node: Node,
        fake: Callable[[torch.Tensor], torch.Tensor],
        top: bool = False,
    ) -> Any:
        if isinstance(value, torch.Tensor):
            made = fake(value)
            self.leaves.append(Leaf(text, made, node))
            return made
        if not holds_tensor(value):
            if top or value is None or isinstance(value, (bool, int, float, str)):
                self.constants[text] = (value, node)
            return value
        parts = {}
        for suffix, accessor, key, part in _parts(value) or ():
            if holds_tensor(part):
                child = self._graph.call_function(accessor, (node, key))
                child.meta["module_stack"] = ()
                parts[key] = self._walk(text + suffix, part, child, fake)
            else:
                parts[key] = part
        return _rebuild(value, parts)


class Rebuild:
    """Puts tensors back into a copy of an output object fx has no words for (a cache, say)."""

    __module__ = __name__

    def __init__(self, template: Any, slots: list[tuple[Any, str | int]]) -> None:
        self.template = template
        self.slots = slots
        self.__name__ = self.__qualname__ = f"rebuild_{type(template).__name__}"

    def __call__(self, *leaves: Any) -> Any:
        """Returns the object with these tensors inside."""
        memo: dict[int, Any] = {}
        for (holder, key), leaf in zip(self.slots, leaves, strict=True):
            memo[id(_get(holder, key))] = leaf
        return copy.deepcopy(self.template, memo)


def _get(holder: Any, key: str | int) -> Any:
    parts: Any = holder
    return parts[key] if isinstance(holder, (dict, list, tuple)) else getattr(holder, str(key))


def find_tensors(value: Any) -> list[tuple[Any, str | int]]:
    """Returns (holder, key) of every tensor inside an arbitrary object, each tensor once."""
    found: list[tuple[Any, str | int]] = []
    seen: set[int] = set()
    todo = [value]
    while todo:
        holder = todo.pop(0)
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        if isinstance(holder, dict):
            items = list(holder.items())
        elif isinstance(holder, (list, tuple)):
            items = list(enumerate(holder))
        else:
            items = list(getattr(holder, "__dict__", {}).items())
        for key, part in items:
            if isinstance(part, torch.Tensor):
                if id(part) not in seen:
                    seen.add(id(part))
                    found.append((holder, key))
            elif not isinstance(part, (str, int, float, bool, type(None), nn.Module, type)):
                todo.append(part)
    return found


def tensors_inside(value: Any) -> list[torch.Tensor]:
    """Returns every tensor inside an arbitrary object, each once."""
    return [_get(holder, key) for holder, key in find_tensors(value)]


def _is_plain_dataclass(value: Any) -> bool:
    """Whether an object is a dataclass that its fields alone make again."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return False
    return all(f.init for f in dataclasses.fields(value))


def output_args(value: Any, arg: Callable[[Any], Any], call: Callable[..., Node]) -> Any:
    """Turns what the model returned into the argument of the output node.

    Args:
        value: the return value, holding fake tensors.
        arg: turns a tensor or a plain value into a node argument.
        call: adds a call_function node.
    """

    def again(v: Any) -> Any:
        return output_args(v, arg, call)

    if isinstance(value, torch.Tensor) or value is None:
        return arg(value)
    if isinstance(value, dict) and type(value) is not dict:
        # transformers' ModelOutput, and any mapping class that is built from its items.
        return call(type(value), (), {k: again(v) for k, v in value.items()})
    if isinstance(value, dict):
        return {k: again(v) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(again(v) for v in value))
    if isinstance(value, torch.Size):
        return call(torch.Size, (tuple(again(v) for v in value),), {})
    if isinstance(value, (list, tuple)):
        return type(value)(again(v) for v in value)
    if _is_plain_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return call(type(value), (), {k: again(v) for k, v in fields.items()})
    slots = find_tensors(value)
    if slots:
        return call(Rebuild(value, slots), tuple(arg(_get(h, k)) for h, k in slots), {})
    return arg(value)
