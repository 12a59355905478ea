"""A pass: calls of torch.nn's modules become calls of the functions they call.

    self.q_proj(x)  ->  F.linear(x, self.q_proj.weight, self.q_proj.bias)

Bits stay: a module's forward is that function. A call of nn.Module costs about a microsecond of
Python for hooks that are not there. What has hooks, a forward of its own or packed weights is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F

from fxlora.optimize import functions
from fxlora.optimize.edit import read, replaced, why_not_plain
from fxlora.optimize.report import Refusal, Step
from fxlora.trace.guards import ByMode
from fxlora.trace.shell import is_conv1d

_Made = tuple[Any, tuple[Any, ...], dict[str, Any]]
_Read = Callable[[str], Any]


def flatten(graph: Graph, root: nn.Module) -> Step:
    """Replaces calls of plain modules; a call of more than one input, or by name, stays."""
    changed, left = 0, []
    for node in [n for n in graph.nodes if n.op == "call_module"]:
        path = str(node.target)
        module = root.get_submodule(path)
        make = _maker(module)
        if make is None:
            continue
        why = why_not_plain(module)
        if not why and (node.kwargs or len(node.args) != _arity(module)):
            why = "it is called with other arguments than one tensor"
        if why:
            left.append(Refusal(path, why))
            continue

        def reading(name: str, node: Node = node, path: str = path) -> Node:
            return read(graph, node, root, f"{path}.{name}" if name else path)

        target, args, kwargs = make(module, node.args[0] if node.args else None, reading)
        replaced(graph, node, target, args, **kwargs)
        changed += 1
    return Step("flatten", changed, tuple(left))


def _arity(module: nn.Module) -> int:
    return 0 if isinstance(module, ByMode) else 1


def _maker(module: nn.Module) -> Callable[[Any, Any, _Read], _Made] | None:
    if is_conv1d(type(module)) and type(module).__name__ == "Conv1D":
        return _conv1d
    return _MAKERS.get(type(module))


def _held(module: Any, reading: _Read, name: str) -> Any:
    return None if getattr(module, name) is None else reading(name)


def _linear(module: Any, x: Any, reading: _Read) -> _Made:
    bias = () if module.bias is None else (reading("bias"),)
    return F.linear, (x, reading("weight"), *bias), {}


def _conv1d(_: Any, x: Any, reading: _Read) -> _Made:
    return functions.conv1d, (x, reading("weight"), reading("bias")), {}


def _embedding(module: Any, x: Any, reading: _Read) -> _Made:
    rest = (
        module.padding_idx,
        module.max_norm,
        module.norm_type,
        module.scale_grad_by_freq,
        module.sparse,
    )
    return F.embedding, (x, reading("weight"), *rest), {}


def _layer_norm(module: Any, x: Any, reading: _Read) -> _Made:
    weight, bias = _held(module, reading, "weight"), _held(module, reading, "bias")
    return F.layer_norm, (x, module.normalized_shape, weight, bias, module.eps), {}


def _relu(module: Any, x: Any, _: _Read) -> _Made:
    return (torch.relu_ if module.inplace else torch.relu), (x,), {}


def _silu(module: Any, x: Any, _: _Read) -> _Made:
    return F.silu, (x,), {"inplace": True} if module.inplace else {}


def _gelu(module: Any, x: Any, _: _Read) -> _Made:
    return F.gelu, (x,), {"approximate": module.approximate}


def _function(target: Any) -> Callable[[Any, Any, _Read], _Made]:
    return lambda _module, x, _reading: (target, (x,), {})


def _by_mode(_module: Any, _x: Any, reading: _Read) -> _Made:
    return functions.by_mode, (reading(""),), {}


_MAKERS: dict[type, Callable[[Any, Any, _Read], _Made]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.ReLU: _relu,
    nn.SiLU: _silu,
    nn.GELU: _gelu,
    nn.Tanh: _function(torch.tanh),
    nn.Sigmoid: _function(torch.sigmoid),
    ByMode: _by_mode,
}
