"""Repeated blocks: run one of each kind, copy its nodes for the rest.

A block is a child of an nn.ModuleList. Its nodes may be copied for another child when nothing
that the first run could have looked at differs: the module tree, its classes, hooks, training
flags and aliases; the metadata of every parameter and buffer; the arguments (structure, shapes,
dtypes, which of them are the same object, requires_grad); and every attribute the first run read.
What is not covered is state outside the modules (a global counter, a class attribute that
changes per call): `fxlora.trace(..., replay=False)` runs everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.fx import Node
from torch.fx.node import map_arg

from fxlora.facts import Frame
from fxlora.trace import sizes
from fxlora.trace.paths import Paths
from fxlora.trace.recorder import Recorder, tensors_in

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, type)


class _NotPlain(Exception):
    """An argument or attribute whose equality says nothing about its behaviour."""


@dataclass
class _Block:
    """One recorded run of a block."""

    module: nn.Module
    path: str
    nodes: list[Node]
    inputs: list[torch.Tensor]
    out: Any
    reads: dict[tuple[str, str], Any]
    calls: dict[str, int]
    mode_reads: list[str]


def _size_key(size: Any) -> Any:
    return str(sizes.expression(size)) if isinstance(size, torch.SymInt) else size


def _tensor_key(t: torch.Tensor) -> tuple[Any, ...]:
    strides = tuple(map(_size_key, t.stride())) if t.layout is torch.strided else ()
    shape = tuple(map(_size_key, t.shape))
    return (shape, strides, t.dtype, t.device, t.requires_grad, type(t).__name__)


class Replay:
    """Calls blocks, and copies the nodes of those that equal an earlier one.

    Attributes:
        count: the number of calls that were copied.
        notes: what the run should tell the reader.
    """

    def __init__(self, model: nn.Module, recorder: Recorder, paths: Paths, enabled: bool) -> None:
        self.count = 0
        self.notes: list[str] = []
        self._recorder = recorder
        self._paths = paths
        self._blocks: dict[Any, list[_Block]] = {}
        self._members: set[int] = set()
        if enabled:
            for m in model.modules():
                if isinstance(m, nn.ModuleList) and len(m) > 1:
                    self._members.update(id(child) for child in m)

    def call(
        self,
        forward: Callable[..., Any],
        module: nn.Module,
        path: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Calls a module that is not a leaf, by running it or by copying an equal run."""
        recorder = self._recorder
        if id(module) not in self._members:
            return self._run(forward, module, path, args, kwargs)
        inputs = list(tensors_in((args, kwargs)))
        try:
            key = self._key(module, args, kwargs, inputs)
        except _NotPlain:
            return self._run(forward, module, path, args, kwargs)
        for block in self._blocks.get(key, ()):
            if _same_reads(block, module):
                self.count += 1
                return self._copy(block, path, inputs)
        start = len(recorder.graph.nodes)
        last = next(iter(reversed(recorder.graph.nodes)), None)
        mode_reads = len(recorder.mode_reads)
        state = _state(module)
        reads: dict[tuple[str, str], Any] = {}
        with _watching(module, reads):
            out = self._run(forward, module, path, args, kwargs)
        if len(recorder.graph.nodes) == start or last is None or _state(module) != state:
            return out
        block = _Block(
            module, path, _after(last), inputs, out, reads, {}, recorder.mode_reads[mode_reads:]
        )
        if self._is_closed(block):
            self._blocks.setdefault(key, []).append(block)
        return out

    def _run(
        self,
        forward: Callable[..., Any],
        module: nn.Module,
        path: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        recorder = self._recorder
        recorder.stack.append(recorder.frame(module, path))
        try:
            return forward(module, *args, **kwargs)
        except Exception:
            if recorder.failed is None:
                recorder.failed = path
            raise
        finally:
            recorder.stack.pop()

    # ---- may it be copied? ---------------------------------------------------------------------

    def _key(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: list[torch.Tensor],
    ) -> Any:
        numbers: dict[int, int] = {}
        for t in inputs:
            numbers.setdefault(id(t), len(numbers))
        nodes: dict[Node, int] = {}
        same_node = tuple(nodes.setdefault(self._recorder.node_of(t), len(nodes)) for t in inputs)
        return (
            _structure(module),
            _plain((args, kwargs), numbers),
            same_node,
            torch.is_grad_enabled(),
        )

    def _is_closed(self, block: _Block) -> bool:
        """Whether everything the block read came from its inputs, itself, or the head."""
        inside = set(block.nodes)
        given = {self._recorder.node_of(t) for t in block.inputs}
        prefix = block.path + "."
        for node in block.nodes:
            for used in node.all_input_nodes:
                if used not in inside and used not in given and used.meta.get("module_stack"):
                    return False
            changed = node.meta.get("mutates", ())
            if any(n not in inside for n in changed):
                return False
            if node.op in ("get_attr", "call_module") and not str(node.target).startswith(prefix):
                return False
        storages = {t.untyped_storage()._cdata for t in block.inputs}
        for t in tensors_in(block.out):
            given_back = any(t is i for i in block.inputs)
            if not given_back and t.untyped_storage()._cdata in storages:
                return False
            if not given_back and self._recorder.node_of(t) not in inside:
                return False
        return _is_rebuildable(block.out)

    # ---- copying -------------------------------------------------------------------------------

    def _copy(self, block: _Block, path: str, inputs: list[torch.Tensor]) -> Any:
        recorder = self._recorder
        new: dict[Node, Node] = {
            recorder.node_of(a): recorder.node_of(b)
            for a, b in zip(block.inputs, inputs, strict=True)
        }
        old_prefix, prefix = block.path, path
        stacks: dict[tuple[Frame, ...], tuple[Frame, ...]] = {}
        frames: dict[Frame, Frame] = {}
        depth = len(recorder.stack)

        def moved(name: str) -> str:
            inside = name == old_prefix or name.startswith(old_prefix + ".")
            return prefix + name[len(old_prefix) :] if inside else name

        def frame(f: Frame) -> Frame:
            if f not in frames:
                p = moved(f.path)
                n = recorder._calls.get(p, 0)
                recorder._calls[p] = n + 1
                frames[f] = Frame(p, f.type, n)
            return frames[f]

        def stack(old: tuple[Frame, ...]) -> tuple[Frame, ...]:
            if old not in stacks:
                stacks[old] = tuple(recorder.stack) + tuple(frame(f) for f in old[depth:])
            return stacks[old]

        graph = recorder.graph
        for node in block.nodes:
            target = node.target
            if node.op in ("get_attr", "call_module"):
                target = moved(str(target))
            args = map_arg(node.args, lambda n: new.get(n, n))
            kwargs = map_arg(node.kwargs, lambda n: new.get(n, n))
            copy = graph.create_node(node.op, target, args, kwargs)
            copy.meta.update(node.meta)
            copy.meta["module_stack"] = stack(node.meta["module_stack"])
            if "mutates" in node.meta:
                copy.meta["mutates"] = tuple(new.get(n, n) for n in node.meta["mutates"])
            new[node] = copy
        recorder.copied({n: new[n] for n in block.nodes})
        recorder.mode_reads += [moved(p) for p in block.mode_reads]
        given = {id(a): b for a, b in zip(block.inputs, inputs, strict=True)}
        return self._out(block.out, new, given)

    def _out(self, value: Any, new: dict[Node, Node], given: dict[int, torch.Tensor]) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) in given:
                return given[id(value)]
            with self._recorder.hold():
                fresh = (
                    value.clone()
                    if value.requires_grad
                    else torch.empty_strided(
                        value.shape, value.stride(), dtype=value.dtype, device=value.device
                    )
                )
            self._recorder.bind(fresh, new[self._recorder.node_of(value)])
            return fresh
        if isinstance(value, dict):
            return type(value)({k: self._out(v, new, given) for k, v in value.items()})
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._out(v, new, given) for v in value))
        if isinstance(value, (list, tuple)):
            return type(value)(self._out(v, new, given) for v in value)
        return value


def _after(last: Node) -> list[Node]:
    out = []
    node = last.next
    while node.op != "root":
        out.append(node)
        node = node.next
    return out


def _is_rebuildable(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_rebuildable(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_rebuildable(v) for v in value)
    return isinstance(value, (torch.Tensor, *_PLAIN)) or sizes.is_symbolic(value)


def _plain(value: Any, numbers: dict[int, int]) -> Any:
    """Returns a hashable image of an argument; raises `_NotPlain` where there is none."""
    if isinstance(value, torch.Tensor):
        return ("tensor", numbers[id(value)], _tensor_key(value))
    if sizes.is_symbolic(value):
        return ("size", str(sizes.expression(value)))
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(_plain(v, numbers) for v in value))
    if isinstance(value, dict):
        return (type(value), tuple((k, _plain(v, numbers)) for k, v in value.items()))
    raise _NotPlain


_HOOKS = (
    "_forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks _state_dict_hooks"
).split()


def _structure(module: nn.Module) -> Any:
    """Returns what two blocks must share before their attributes are looked at."""
    seen: dict[int, int] = {}
    out = []
    for name, m in module.named_modules(remove_duplicate=False):
        if any(m.__dict__.get(h) for h in _HOOKS[:4]):
            raise _NotPlain
        tensors = tuple(
            (k, None if t is None else (seen.setdefault(id(t), len(seen)), _tensor_key(t)))
            for d in (m._parameters, m._buffers)
            for k, t in d.items()
        )
        identity = seen.setdefault(id(m), len(seen))
        settings = frozenset(m.__dict__)
        out.append((name, type(m), identity, tensors, m.__dict__["training"], settings))
    return tuple(out)


def _state(module: nn.Module) -> Any:
    return [
        (k, id(v))
        for m in module.modules()
        for d in (m.__dict__, m._parameters, m._buffers, m._modules)
        for k, v in d.items()
    ]


_NOT_SETTINGS = frozenset(("_parameters", "_buffers", "_modules", "training", *_HOOKS))


class _Watch:
    """A `__getattribute__` that notes which instance attributes a run reads."""

    def __init__(self, names: dict[int, str], reads: dict[tuple[str, str], Any]) -> None:
        self._names, self._reads = names, reads

    def reader(self) -> Callable[[nn.Module, str], Any]:
        names, reads, plain = self._names, self._reads, object.__getattribute__

        def read(module: nn.Module, name: str) -> Any:
            value = plain(module, name)
            at = names.get(id(module))
            if at is not None and name[:2] != "__" and name not in _NOT_SETTINGS:
                own = plain(module, "__dict__")
                if name in own:
                    # The content as it was: a container may be written to between two blocks.
                    reads.setdefault((at, name), _snapshot(own[name]))
            return value

        return read


def _watching(module: nn.Module, reads: dict[tuple[str, str], Any]) -> Any:
    names = {id(m): name for name, m in module.named_modules()}
    outer = nn.Module.__dict__.get("__getattribute__")
    inner = _Watch(names, reads).reader()

    def both(m: nn.Module, name: str) -> Any:
        if outer is not None:
            outer(m, name)  # a block inside a block: both keep their own list
        return inner(m, name)

    return mock.patch.object(nn.Module, "__getattribute__", both, create=True)


def _snapshot(value: Any) -> Any:
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_snapshot(v) for v in value)
    if type(value) is dict:
        return {k: _snapshot(v) for k, v in value.items()}
    return value


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, (torch.Tensor, nn.Module)):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (set, frozenset, *_PLAIN)):
        return bool(a == b)
    # The same bound method of the matching module, or an equal object of a class that says so.
    return False


def _same_reads(block: _Block, module: nn.Module) -> bool:
    there = dict(module.named_modules())
    for (at, name), value in block.reads.items():
        own = there[at].__dict__
        if name not in own or not _same(value, own[name]):
            return False
    return True
