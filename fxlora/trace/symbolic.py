"""Symbolic tracing: torch.fx's own tracer, for models that need no example inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.fx import Graph, Node, Tracer, _symbolic_trace

from fxlora.errors import TraceError
from fxlora.facts import Frame
from fxlora.trace.operators import tensor_type
from fxlora.trace.paths import Paths
from fxlora.trace.recorder import model_line
from fxlora.trace.shell import is_leaf


class _Tracer(Tracer):
    """torch.fx's tracer with our leaves, aliases apart, and module stacks and lines in meta."""

    def __init__(self, paths: Paths) -> None:
        super().__init__()
        self.stack: list[Frame] = []
        self._paths = paths
        self._calls: dict[str, int] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        """Whether `m` stays one node (fx's rule, and every module PEFT adapts)."""
        return is_leaf(m)

    def path_of_module(self, mod: nn.Module) -> str:
        """Returns the name `mod` was reached by."""
        path = self._paths.of(mod)
        return super().path_of_module(mod) if path is None else path

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Records a call, with one more frame on the stack."""
        path = self.path_of_module(m)
        n = self._calls.get(path, 0)
        self._calls[path] = n + 1
        self.stack.append(Frame(path, type(m).__name__, n))
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.stack.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        """Creates a node that knows its modules and its line."""
        node = super().create_node(*args, **kwargs)
        node.meta["module_stack"] = (
            () if node.op in ("placeholder", "output") else (self._root_frame, *self.stack)
        )
        source = model_line()
        if source is not None:
            node.meta["source"] = source
        return node

    def create_arg(self, a: Any) -> Any:
        """Turns a call's argument into a node argument."""
        name = tensor_type(a)
        return super().create_arg(a) if name is None else name

    @property
    def _root_frame(self) -> Frame:
        return Frame("", type(self.root).__name__, 0)


@dataclass
class Recording:
    """One finished symbolic run: the graph, the constants it lifted, who asked for the mode."""

    graph: Graph
    constants: dict[str, torch.Tensor]
    mode_reads: tuple[str, ...]


class _Training:
    """Lets `self.training` read as one mode in every module, and notes who asked."""

    def __init__(self, mode: bool, reads: list[str]) -> None:
        self._mode, self._reads = mode, reads

    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        if module is None:
            return self
        self._reads.append(type(module).__name__)
        return self._mode

    def __set__(self, module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value


def record(model: nn.Module, mode: bool) -> Recording:
    """Returns the graph of a model traced without example inputs.

    Args:
        model: the model; read, never changed.
        mode: the value `self.training` reads as.

    Raises:
        TraceError: when the model's code looks at its inputs, with what to pass instead.
    """
    reads: list[str] = []
    constants: dict[str, torch.Tensor] = {}
    attributes = dict(model.__dict__)
    try:
        with (
            Paths(model) as paths,
            # torch.fx looks attributes up through its own reference to __getattr__; let it use
            # the one that is in place now, which notes by what name a module was reached.
            mock.patch.object(_symbolic_trace, "_orig_module_getattr", nn.Module.__getattr__),
            mock.patch.object(nn.Module, "training", _Training(mode, reads), create=True),
        ):
            graph = _Tracer(paths).trace(model)
    except Exception as e:
        said = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise TraceError(
            f"{type(model).__name__} cannot be traced without example inputs: {said}. "
            "Pass some, as the model takes them: fxlora.trace(model, args, kwargs)"
        ) from e
    finally:
        # torch.fx hangs lifted constants on the model it traces; they belong to the graph.
        for name in [k for k in model.__dict__ if k not in attributes]:
            constants[name] = model.__dict__.pop(name)
    for node in graph.nodes:
        if node.op == "get_attr":
            value = constants.get(str(node.target), _attribute(model, str(node.target)))
            if isinstance(value, torch.Tensor):
                node.meta["shape"], node.meta["dtype"] = tuple(value.shape), value.dtype
    return Recording(graph, constants, tuple(reads))


def _attribute(model: nn.Module, target: str) -> Any:
    value: Any = model
    for name in target.split("."):
        value = getattr(value, name, None)
    return value
