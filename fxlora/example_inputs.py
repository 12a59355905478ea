"""Example inputs when the caller gives none: from a transformers config, or the first layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxlora.errors import TraceError
from fxlora.trace import examples, trace


def for_model(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the given example inputs, or builds some.

    Raises:
        TraceError: when there is nothing to build them from.
    """
    if args or kwargs:
        return tuple(args), dict(kwargs or {})
    if examples.is_transformers(model):
        return (), examples.inputs(model)
    graph = trace(model).graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    if len(inputs) == 1:
        for user in inputs[0].users:
            if user.op == "call_module":
                made = _for_layer(model.get_submodule(str(user.target)))
                if made is not None:
                    return (made,), {}
    raise TraceError(
        f"no example inputs for {type(model).__name__}, and its first layer does not tell their "
        "shape; pass args or kwargs as the model takes them"
    )


def _for_layer(layer: nn.Module) -> torch.Tensor | None:
    p = next(layer.parameters(), None)
    if p is None:
        return None
    # randn draws; the caller's random state is not ours to move.
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        shape: tuple[int, ...] = (2, layer.in_features)
    elif isinstance(layer, nn.Embedding):
        return torch.zeros(2, 4, dtype=torch.long, device=p.device)
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        shape = (2, layer.in_channels, *(32 for _ in layer.kernel_size))
    else:
        return None
    return torch.randn(shape, generator=generator).to(p.device, p.dtype)
