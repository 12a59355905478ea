"""Repeated blocks: run one of each kind, let its nodes stand for the rest.

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
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.fx import Node

from fxlora.facts import Frame
from fxlora.trace import sizes
from fxlora.trace.likeness import HOOKS, PLAIN, NotPlain, another, plain, tensor_key
from fxlora.trace.paths import Paths
from fxlora.trace.recorder import Recorder, tensors_in
from fxlora.trace.repeats import Block, Repeat, moved, part
from fxlora.trace.shell import tree


@dataclass
class _Run:
    """One run of a block, and all it depended on.

    Attributes:
        block: its nodes.
        inputs: the tensors it was given.
        out: what it returned.
        reads: (number of the module in its tree, attribute, value) of everything it read.
        mode_reads: the modules that asked for the mode.
    """

    block: Block
    inputs: list[torch.Tensor]
    out: Any
    reads: list[tuple[int, str, Any]]
    mode_reads: list[str]


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
        self._runs: dict[Any, list[_Run]] = {}
        self._members: set[int] = set()
        if enabled:
            for _, m in tree(model):
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
        inner = tree(module)
        try:
            with torch._C.DisableTorchFunction():
                key = self._key(inner, args, kwargs, inputs)
        except NotPlain:
            self._say_why(path, args, kwargs)
            return self._run(forward, module, path, args, kwargs)
        for run in self._runs.get(key, ()):
            if _same_reads(run, inner):
                self.count += 1
                return self._repeat(run, path, inputs)
        last = next(iter(reversed(recorder.graph.nodes)), None)
        mode_reads = len(recorder.mode_reads)
        state = _state(module)
        reads: dict[tuple[int, str], Any] = {}
        with _watching(inner, reads):
            out = self._run(forward, module, path, args, kwargs)
        nodes = [] if last is None else _after(last)
        if not nodes or _state(module) != state:
            return out
        outs = self._outs(nodes, inputs, out)
        if outs is not None and self._is_closed(nodes, path, inputs):
            given = [recorder.node_of(t) for t in inputs]
            block = Block(path, nodes, given, outs, len(recorder.stack))
            read = [(i, name, value) for (i, name), value in reads.items()]
            kept = _Run(block, inputs, out, read, recorder.mode_reads[mode_reads:])
            self._runs.setdefault(key, []).append(kept)
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

    def _say_why(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes which argument keeps a list of blocks from being run once and copied."""
        odd = next((v for v in (*args, *kwargs.values()) if not _is_rebuildable(v)), None)
        if odd is None:
            return
        kind = type(odd).__name__
        way = " (pass use_cache=False)" if kind.endswith("Cache") else ""
        note = (
            f"{path.rpartition('.')[0]}: every block was run, because each is given a {kind}, which "
            f"may change between two calls; without it one is run and the others are copied{way}"
        )
        if note not in self.notes:
            self.notes.append(note)

    def _key(
        self,
        inner: list[tuple[str, nn.Module]],
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
            _structure(inner),
            plain((args, kwargs), numbers),
            same_node,
            torch.is_grad_enabled(),
        )

    def _is_closed(self, nodes: list[Node], path: str, inputs: list[torch.Tensor]) -> bool:
        """Whether everything a block read came from its inputs, itself, or the head."""
        inside = set(nodes)
        given = {self._recorder.node_of(t) for t in inputs}
        prefix = path + "."
        for node in nodes:
            for used in node.all_input_nodes:
                if used not in inside and used not in given and used.meta.get("module_stack"):
                    return False
            changed = node.meta.get("mutates", ())
            if any(n not in inside for n in changed):
                return False
            target = node.target.path if isinstance(node.target, Repeat) else node.target
            named = node.op in ("get_attr", "call_module") or isinstance(node.target, Repeat)
            if named and not str(target).startswith(prefix):
                return False
        return True

    def _outs(self, nodes: list[Node], inputs: list[torch.Tensor], out: Any) -> list[Node] | None:
        """Returns the nodes of a block's own results; None where they cannot be made again."""
        if not _is_rebuildable(out):
            return None
        inside = set(nodes)
        found: dict[Node, None] = {}
        with torch._C.DisableTorchFunction():
            storages = {t.untyped_storage()._cdata for t in inputs}
            for t in tensors_in(out):
                if any(t is i for i in inputs):
                    continue
                node = self._recorder.node_of(t)
                # What follows from sizes alone has a value, and a repeated block computes none.
                known = self._recorder.is_known(t)
                if t.untyped_storage()._cdata in storages or node not in inside or known:
                    return None
                found[node] = None
        return list(found)

    # ---- repeating -----------------------------------------------------------------------------

    def _repeat(self, run: _Run, path: str, inputs: list[torch.Tensor]) -> Any:
        """Adds the node that stands for a block's nodes under another path."""
        recorder, block = self._recorder, run.block
        frames = {}
        for f in block.frames:
            at = moved(f.path, block.path, path)
            n = recorder._calls.get(at, 0)
            recorder._calls[at] = n + 1
            frames[f] = Frame(at, f.type, n)
        recorder.mode_reads += [moved(p, block.path, path) for p in run.mode_reads]
        given = tuple(recorder.node_of(t) for t in inputs)
        with torch._C.DisableTorchFunction():
            graph, stack = recorder.graph, tuple(recorder.stack)
            node = graph.create_node("call_function", Repeat(block, path, frames), given)
            node.meta["module_stack"] = stack
            parts = {}
            for i, out in enumerate(block.outs):
                parts[out] = graph.create_node("call_function", part, (node, i))
                parts[out].meta["module_stack"] = stack
        same = {id(a): b for a, b in zip(run.inputs, inputs, strict=True)}
        return self._out(run.out, parts, same)

    def _out(self, value: Any, parts: dict[Node, Node], same: dict[int, torch.Tensor]) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in same:
                with self._recorder.hold(), torch._C.DisableTorchFunction():
                    # The memory is that of the run; nothing known follows from what is in it.
                    fresh = another(value)
                self._recorder.bind(fresh, parts[self._recorder.node_of(value)])
                same[id(value)] = fresh
            return same[id(value)]
        if isinstance(value, dict):
            return type(value)({k: self._out(v, parts, same) for k, v in value.items()})
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._out(v, parts, same) for v in value))
        if isinstance(value, (list, tuple)):
            return type(value)(self._out(v, parts, same) for v in value)
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
    return isinstance(value, (torch.Tensor, *PLAIN)) or sizes.is_symbolic(value)


def _structure(inner: list[tuple[str, nn.Module]]) -> Any:
    """Returns what two blocks must share before their attributes are looked at."""
    seen: dict[int, int] = {}
    out = []
    for name, m in inner:
        own = m.__dict__
        if any(own.get(h) for h in HOOKS):
            raise NotPlain
        tensors = tuple(
            (k, None if t is None else (seen.setdefault(id(t), len(seen)), tensor_key(t)))
            for d in (own["_parameters"], own["_buffers"])
            for k, t in d.items()
        )
        identity = seen.setdefault(id(m), len(seen))
        out.append((name, type(m), identity, tensors, own["training"], frozenset(own)))
    return tuple(out)


def _state(module: nn.Module) -> Any:
    return [
        (k, id(v))
        for m in module.modules()
        for d in (m.__dict__, m._parameters, m._buffers, m._modules)
        for k, v in d.items()
    ]


_NOT_SETTINGS = frozenset(
    ("_parameters", "_buffers", "_modules", "training", *HOOKS, "_state_dict_hooks")
)


class _Watch:
    """A `__getattribute__` that notes which instance attributes a run reads."""

    def __init__(self, numbers: dict[int, int], reads: dict[tuple[int, str], Any]) -> None:
        self._numbers, self._reads = numbers, reads

    def reader(self) -> Callable[[nn.Module, str], Any]:
        names, reads, plain = self._numbers, self._reads, object.__getattribute__

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


def _watching(inner: list[tuple[str, nn.Module]], reads: dict[tuple[int, str], Any]) -> Any:
    numbers: dict[int, int] = {}
    for i, (_, m) in enumerate(inner):
        numbers.setdefault(id(m), i)
    outer = nn.Module.__dict__.get("__getattribute__")
    note = _Watch(numbers, reads).reader()

    def both(m: nn.Module, name: str) -> Any:
        if outer is not None:
            outer(m, name)  # a block inside a block: both keep their own list
        return note(m, name)

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
    if isinstance(a, (set, frozenset, *PLAIN)):
        return bool(a == b)
    if type(a) is partial:
        return all(_same(getattr(a, k), getattr(b, k)) for k in ("func", "args", "keywords"))
    # The same bound method of the matching module, or an equal object of a class that says so.
    return False


def _same_reads(run: _Run, inner: list[tuple[str, nn.Module]]) -> bool:
    for i, name, value in run.reads:
        own = inner[i][1].__dict__
        if name not in own or not _same(value, own[name]):
            return False
    return True
