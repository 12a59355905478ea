"""Records one run of a model on fake tensors as an fx graph at the level of the torch API."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode

from fxlora.errors import TraceError
from fxlora.facts import Frame, Source
from fxlora.trace import known, operators, sizes
from fxlora.trace.likeness import Maker
from fxlora.trace.regions import AutocastRegions, GradRegions
from fxlora.trace.shell import tree

# What asks for a tensor's gradient (transformers' enable_input_require_grads does, in a hook).
_ASKS = (torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
_SKIP = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))


def model_line() -> Source | None:
    """Returns the innermost line of the stack that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(_SKIP) and not code.co_filename.startswith("<"):
            return Source(code.co_filename, frame.f_lineno, code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yields every tensor in a nest of lists, tuples, dicts and slices."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from tensors_in(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from tensors_in(v)
    elif isinstance(value, slice):
        yield from tensors_in((value.start, value.stop, value.step))


def _storage(tensor: torch.Tensor) -> int:
    """Returns what tells the memory of a tensor from that of others."""
    strided = tensor.layout is torch.strided and not tensor.is_nested
    return tensor.untyped_storage()._cdata if strided else id(tensor)


def _is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def _place(given: tuple[Any, Any], storage: int) -> tuple[Any, ...] | None:
    """Returns where among positional and named arguments the first tensor in this memory is."""
    args, kwargs = given
    for key, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, torch.Tensor):
            if _storage(value) == storage:
                return (key,)
        elif isinstance(value, (list, tuple)):
            inner = _place((value, {}), storage)
            if inner is not None:
                return (key, *inner)
    return None


class Recorder(TorchFunctionMode):
    """Turns what a model does to tensors into nodes.

    Identity is the map: a tensor object that came out of a recorded call stands for its node.
    Every tensor seen is kept alive while recording, or a freed object's id would be reused.

    Args:
        model: the model being run; its parameters become `get_attr` nodes.
        graph: the graph to fill.
        device: the model's one device; a mention of it becomes the device of the first input, so
            the graph can move.
        results: of the calls recorded before, in this run and the run in the other mode.
    """

    def __init__(
        self, model: nn.Module, graph: Graph, device: torch.device | None, results: Maker
    ) -> None:
        super().__init__()
        self.model = model
        self.graph = graph
        self.results = results
        self.size_nodes = sizes.SizeNodes(graph)
        self.stack: list[Frame] = []
        self.constants: dict[str, torch.Tensor] = {}
        self.paused = 0
        self.asked: list[torch.Tensor] = []
        self.in_op = 0
        self.mode_reads: list[str] = []
        self.failed: str | None = None
        self.decisions: list[tuple[Any, bool]] = []
        self.op_guards: list[tuple[int, int, str]] = []
        self.shape_env: Any = None
        self.hints: dict[str, int] = {}
        self._device = device
        self._device_node: Node | None = None
        self._nodes: dict[int, Node] = {}
        self._keep: list[Any] = []
        self._calls: dict[str, int] = {}
        self._regions = GradRegions()
        self.autocast = AutocastRegions()
        self._known = known.Known()
        self._sharing: dict[int, list[Node]] = {}
        self._names: dict[int, list[str]] = {}
        inside = tree(model)
        for held in ("_parameters", "_buffers"):
            for name, m in inside:
                for key, t in m.__dict__[held].items():
                    if t is not None:
                        at = f"{name}.{key}" if name else key
                        self._names.setdefault(id(t), []).append(at)

    # ---- what a tensor is called -------------------------------------------------------------

    def bind(self, tensor: torch.Tensor, node: Node) -> bool:
        """Lets `tensor` stand for `node` from now on; says whether others share its memory."""
        self._keep.append(tensor)
        self._nodes[id(tensor)] = node
        sharing = self._sharing.setdefault(_storage(tensor), [])
        sharing.append(node)
        return len(sharing) > 1

    def rename(self, tensor: torch.Tensor, fake: torch.Tensor) -> None:
        """Lets a fake go by the names of the buffer it stands in for."""
        self._keep.append(fake)
        self._names[id(fake)] = self._names[id(tensor)]

    def node_of(self, tensor: torch.Tensor) -> Node:
        """Returns the node a tensor stands for; parameters and constants get one when first read.

        Raises:
            TraceError: for a tensor made by an operation torch did not tell the recorder about.
        """
        node = self._nodes.get(id(tensor))
        if node is not None:
            return node
        names = self._names.get(id(tensor))
        if names:
            return self._get_attr(self._nearest(names), tensor)
        if isinstance(tensor, FakeTensor) and tensor.constant is None:
            raise TraceError(
                "a tensor reached this line without any torch call fxlora could see: "
                f"{self.where()}. It was made outside the model's forward or by an extension that "
                "bypasses torch; pass it as an input, or register it as a buffer"
            )
        return self._lift(tensor)

    def _lift(self, tensor: torch.Tensor) -> Node:
        number = len(self.constants)
        while hasattr(self.model, f"_tensor_constant{number}"):
            number += 1
        name = f"_tensor_constant{number}"
        self.constants[name] = tensor
        return self._get_attr(name, tensor)

    def _nearest(self, names: list[str]) -> str:
        # A tied weight has several names; the module that reads it knows it by its own.
        if len(names) > 1:
            for frame in reversed(self.stack):
                for name in names:
                    if frame.path and name.startswith(frame.path + "."):
                        return name
        return names[0]

    def _get_attr(self, name: str, tensor: torch.Tensor) -> Node:
        with _quiet():
            node = self.graph.create_node("get_attr", name)
        self._describe(node, tensor)
        if name not in self.constants and len(self._names[id(tensor)]) > 1:
            self._keep.append(tensor)  # read again under another name: do not bind
            self._sharing.setdefault(_storage(tensor), []).append(node)
        else:
            self.bind(tensor, node)
        return node

    # ---- values to node arguments ------------------------------------------------------------

    def arg(self, value: Any) -> Any:
        """Turns a call's argument into a node argument."""
        if isinstance(value, torch.Tensor):
            return self.node_of(value)
        if sizes.is_symbolic(value):
            expr = sizes.expression(value)
            return self.size_nodes.node(expr)
        if isinstance(value, torch.Size):
            return tuple(self.arg(v) for v in value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.arg(v) for v in value))
        if isinstance(value, (list, tuple)):
            return type(value)(self.arg(v) for v in value)
        if isinstance(value, dict):
            return {k: self.arg(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(self.arg(value.start), self.arg(value.stop), self.arg(value.step))
        if isinstance(value, range):
            return list(value)
        if isinstance(value, torch.device) and value == self._device:
            return self._here(value)
        if type(value).__module__ == "numpy" and type(value).__name__ != "ndarray":
            return (
                value.item()
            )  # a scalar prints as np.float64(2.0), which a graph's code cannot read
        return value

    def _here(self, device: torch.device) -> Any:
        if self._device_node is None:
            first = next((n for n, _ in self.size_nodes.origins.values()), None)
            if first is None:
                return device
            self._device_node = self.size_nodes.head("call_function", getattr, (first, "device"))
        return self._device_node

    # ---- recording -----------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one torch call and records it."""
        kwargs = kwargs or {}
        if self.paused:
            if func in _ASKS and {*args[1:], *kwargs.values()} <= {True}:
                self.asked.append(args[0])  # by a hook of a leaf, or inside it
            return func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            before = torch.is_grad_enabled()
            self._regions.switch(self.create, self.graph, before, args[0])
            return func(*args)
        func, args, kwargs = operators.normal(func, args, kwargs)
        if operators.is_silent(func):
            return func(*args, **kwargs)
        if known.asks(func) and self.is_known(args[0]):
            return self._known.answer(self.node_of(args[0]), self._hints(), func.__name__)
        iterating = func is torch.Tensor.__iter__
        if iterating:
            func = torch.Tensor.unbind
        out = self.run(func, args, kwargs, lambda: operators.spelling(func, args), func.__name__)
        return iter(out) if iterating else out

    def run(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        spelling: Callable[[], tuple[str, Any]],
        name: str,
    ) -> Any:
        """Runs a call once, adds its node, and binds its results.

        A call that returns an argument unchanged (`x.to(x.dtype)`, nn.Identity) gets a fresh
        object to stand for it: the call may do something at another dtype, and those who read
        the argument must go on reading the argument.
        """
        inputs = list(tensors_in((args, kwargs)))
        if not inputs and any(type(a).__name__ == "ndarray" for a in args):
            return self._from_numpy(function, args, kwargs)
        versions = [t._version for t in inputs]
        before = len(self.shape_env.guards) if self.shape_env is not None else 0
        self.in_op += 1
        try:
            with self.hold():
                with torch._C.DisableTorchFunction():
                    key = self.results.key(function, args, kwargs, inputs, self.autocast.current)
                    out = None if key is None else self.results.get(key)
                again = out is not None
                if not again:
                    out = operators.on_fakes(function)(*args, **kwargs)
        finally:
            self.in_op -= 1
        if self._guarded(before):
            self.op_guards.append((before, len(self.shape_env.guards), name))
        changed = [t for t, v in zip(inputs, versions, strict=True) if t._version != v]
        if key is not None and not again and not changed and not self._guarded(before):
            with torch._C.DisableTorchFunction():
                self.results.keep(key, out, inputs)
        results = list(tensors_in(out))
        if not results and not changed and not operators.has_effect(function):
            return out
        op, target = spelling()
        node_args = self.arg(tuple(args[1:] if op == "call_module" else args))
        node_kwargs = self.arg(kwargs)
        node = self.create(op, target, node_args, node_kwargs)
        if changed:
            node.meta["mutates"] = tuple(dict.fromkeys(self.node_of(t) for t in changed))
            self._overwrite(changed, node)
        if name == "requires_grad_" and id(inputs[0]) not in self._names:
            changed = inputs[:1]  # a tensor of the run's own stays a leaf
        if id(out) in map(id, inputs):
            node.meta["handed_on"] = True
        if self.asked:
            if any(t is out for t in self.asked):
                node.meta["requires_grad"] = True
            self.asked.clear()
        out = self._fresh(out, inputs, changed)
        given = (args[1:] if op == "call_module" else args, kwargs)
        self._bind_results(out, node, given if all(map(_is_fake, inputs)) else None)
        return out

    def _guarded(self, before: int) -> bool:
        """Whether a condition on the sizes was added since there were `before`."""
        return self.shape_env is not None and len(self.shape_env.guards) > before

    def _overwrite(self, changed: list[torch.Tensor], writer: Node) -> None:
        """Notes that an in-place call wrote into whatever shares memory with these tensors."""
        for storage in {_storage(t) for t in changed}:
            for node in self._sharing.get(storage, ()):
                self._known.writers.setdefault(node, []).append(writer)

    def _from_numpy(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Makes a tensor out of an array, which fx has no words for, a constant of the graph."""
        with self.hold():
            with torch.utils._python_dispatch._disable_current_modes():
                constant = function(*args, **kwargs)
            out = function(*args, **kwargs)
        self.bind(out, self._lift(constant))
        return out

    def create(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        """Adds a node that knows its modules and its line."""
        with _quiet():
            node = self.graph.create_node(op, target, args, kwargs)
        self._describe(node, None)
        return node

    def _describe(self, node: Node, value: Any) -> None:
        meta = node.meta
        meta["module_stack"] = tuple(self.stack)
        source = model_line()
        if source is not None:
            meta["source"] = source
        if not torch.is_grad_enabled():
            meta["grad_enabled"] = False
        if self.autocast.current is not None:
            meta["autocast"] = self.autocast.current
        if isinstance(value, torch.Tensor):
            meta["shape"] = tuple(sizes.dimension(d) for d in value.shape)
            meta["dtype"] = value.dtype

    def _fresh(self, out: Any, inputs: list[torch.Tensor], changed: list[torch.Tensor]) -> Any:
        ids = {id(t) for t in inputs} - {id(t) for t in changed}
        if isinstance(out, torch.Tensor):
            if id(out) not in ids:
                return out
            with self.hold():
                return torch.ops.aten.alias(out)
        if isinstance(out, tuple) and hasattr(out, "_fields"):
            return out
        if isinstance(out, (list, tuple)) and type(out) in (list, tuple):
            return type(out)(self._fresh(o, inputs, changed) for o in out)
        return out

    def _bind_results(self, out: Any, node: Node, given: tuple[Any, Any] | None) -> None:
        """Binds the results of a call.

        Args:
            out: what it gave.
            node: its node, or that of a part of it.
            given: its positional and named arguments; None where one is a parameter, whose memory
                is not the one torch lets fake results share.
        """
        if isinstance(out, torch.Tensor):
            meta = node.meta
            meta["shape"] = tuple(sizes.dimension(d) for d in out.shape)
            meta["dtype"] = out.dtype
            shares = self.bind(out, node)
            if given is not None:
                meta["alias"] = _place(given, _storage(out)) if shares else None
        elif isinstance(out, dict):
            for k, v in out.items():
                self._bind_part(v, node, k, given)
        elif isinstance(out, (list, tuple)):
            for i, v in enumerate(out):
                self._bind_part(v, node, i, given)

    def _bind_part(self, value: Any, node: Node, key: Any, given: Any) -> None:
        if next(tensors_in(value), None) is None:
            return
        with _quiet():
            part = self.graph.call_function(operators.getitem, (node, key))
        part.meta.update({k: v for k, v in node.meta.items() if k not in ("mutates", "shape")})
        self._bind_results(value, part, given)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Runs torch calls without recording them."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    # ---- modules -------------------------------------------------------------------------------

    def frame(self, module: nn.Module, path: str) -> Frame:
        """Returns the frame of one more call of `path`."""
        n = self._calls.get(path, 0)
        self._calls[path] = n + 1
        return Frame(path, type(module).__name__, n)

    def leaf(
        self,
        forward: Callable[..., Any],
        module: nn.Module,
        path: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Records the call of a leaf module as one `call_module` node."""
        spelling = lambda: ("call_module", path)  # noqa: E731
        return self.run(forward, (module, *args), kwargs, spelling, type(module).__name__)

    def read_mode(self) -> None:
        """Notes that the model's own code asked for the mode."""
        self.mode_reads.append(self.stack[-1].path if self.stack else "")

    def is_known(self, tensor: Any) -> bool:
        """Whether the value of a tensor follows from sizes alone."""
        node = self._nodes.get(id(tensor))
        if node is None:
            return False
        try:
            self._known.answer(node, self._hints())
        except known.NotKnown:
            return False
        return True

    def _hints(self) -> dict[Node, int]:
        return {node: self.hints[name] for name, node in self.size_nodes.symbols.items()}

    def where(self) -> str:
        """Returns the current line of the model's code and the module it runs in."""
        line = model_line()
        path = self.stack[-1].path if self.stack else ""
        inside = f", in module {path!r}" if path else ""
        return f"{line}{inside}: `{line.text}`" if line else "an unknown line"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Graph.create_node builds torch objects in a few places; none of that is the model's.
    with torch._C.DisableTorchFunction():
        yield
