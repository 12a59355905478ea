"""A second module tree over the same tensors: what a graph owns of the model it was traced from."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

ParameterView = Callable[[nn.Parameter], nn.Parameter]

# PEFT adapts these as modules, so a subclass with its own forward stays one call as well.
_ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class GraphHelper(nn.Module):
    """A module that only a graph has (a guard, a train/eval constant); always one node."""


def is_conv1d(module_type: type) -> bool:
    """Whether a class is transformers' Conv1D, told by name: the core never imports transformers."""
    return any(
        c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"
        for c in module_type.__mro__
    )


def is_leaf(module: nn.Module) -> bool:
    """Whether a module stays one `call_module` node.

    Leaves are the modules PEFT adapts as modules, and torch.nn's own modules without children
    (so train/eval, dropout, hooks and quantized linears keep working), and modules that hold
    nothing and ask for the mode (stochastic depth). nn.MultiheadAttention and
    nn.TransformerEncoderLayer are traced through: they read their children's weights directly.
    """
    if isinstance(module, _CONTAINERS):
        return False
    if isinstance(module, GraphHelper):
        return True
    if isinstance(module, _ADAPTABLE) or is_conv1d(type(module)):
        return True
    if type(module).__name__ == "BlockDiagonalLinear":  # peft's, for BD-LoRA: one linear map
        return True
    if module._modules:
        return False
    own = type(module).__module__.startswith(("torch.nn.", "torch.ao.nn."))
    idle = not module._parameters and not module._buffers
    return own or (idle and _asks_mode(type(module)))  # type: ignore[arg-type]


@functools.cache
def _asks_mode(module_type: Any) -> bool:
    """Whether the forward of a class mentions `training`: stochastic depth and its like.

    Such a module does one thing in train mode and another in eval mode. Kept whole, it goes on
    doing both.
    """
    code = getattr(inspect.unwrap(getattr(module_type, "forward")), "__code__", None)  # noqa: B009
    return code is not None and "training" in code.co_names


def _copy_leaf(module: nn.Module) -> nn.Module:
    new: nn.Module = object.__new__(type(module))
    new.__dict__.update(module.__dict__)
    # Hooks live in dicts: adding one to the graph's copy must not reach the model.
    for name, value in module.__dict__.items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            # copy.copy of an OrderedDict takes ten times as long, and a leaf has a dozen.
            new.__dict__[name] = value.copy() if isinstance(value, dict) else copy.copy(value)
    return new


def shell(module: nn.Module, view: ParameterView | None = None) -> nn.Module:
    """Returns a module tree with the same names and the same tensors as `module`.

    Leaves are shallow copies that still run; every other module becomes a bare container. So
    `train()`, hooks and flags set on the result never reach the model. Shared modules stay
    shared, and a parameter used twice stays one parameter.

    Args:
        module: the root of the tree; read, never changed.
        view: maps each parameter to the one the new tree holds; called once per parameter.
            Without it the very same parameters are held.
    """
    modules: dict[int, nn.Module] = {}
    parameters: dict[int, nn.Parameter] = {}

    def viewed(p: nn.Parameter | None) -> nn.Parameter | None:
        if p is None or view is None:
            return p
        if id(p) not in parameters:
            parameters[id(p)] = view(p)
        return parameters[id(p)]

    def build(old: nn.Module, inside: bool = False) -> nn.Module:
        if id(old) in modules:
            return modules[id(old)]
        # A leaf runs as itself, and so needs its children (parametrizations) as they are.
        inside = inside or is_leaf(old)
        if inside or isinstance(old, _CONTAINERS[3:]):
            new = _copy_leaf(old)
        else:
            new = nn.Module()
            new.__dict__["training"] = old.training
        modules[id(old)] = new
        # Not by setattr, which asks of everything whether it is a parameter or a module.
        own, its = new.__dict__, old.__dict__
        own["_parameters"] = {k: viewed(p) for k, p in its["_parameters"].items()}
        own["_buffers"] = dict(its["_buffers"])
        own["_non_persistent_buffers_set"] = set(its["_non_persistent_buffers_set"])
        own["_modules"] = {
            k: None if m is None else build(m, inside) for k, m in its["_modules"].items()
        }
        return new

    return build(module)


def tree(model: nn.Module, remove_duplicate: bool = False) -> list[tuple[str, nn.Module]]:
    """Returns what `model.named_modules` yields, without its generator per level."""
    out: list[tuple[str, nn.Module]] = []
    seen: set[nn.Module] = set()

    def walk(m: nn.Module, name: str, prefix: str) -> None:
        if remove_duplicate:
            if m in seen:
                return
            seen.add(m)
        out.append((name, m))
        for key, child in m.__dict__["_modules"].items():
            if child is not None:
                inner = prefix + key
                walk(child, inner, inner + ".")

    walk(model, "", "")
    return out


def module_types(model: nn.Module) -> dict[str, type]:
    """Returns the class of every module by every one of its names."""
    return {name: type(m) for name, m in tree(model)}


def frozen_view(p: nn.Parameter) -> nn.Parameter:
    """Returns a parameter over the same storage with `requires_grad=False`.

    Quantized parameters (bitsandbytes' Params4bit, ...) carry state of their own and are never
    trainable: they are passed on as they are.
    """
    if type(p) is not nn.Parameter:
        if not p.requires_grad:
            return p
        copied: Any = copy.copy(p)
        copied.requires_grad = False
        made: nn.Parameter = copied
        return made
    return nn.Parameter(p.detach(), requires_grad=False)


def device_of(model: nn.Module) -> torch.device | None:
    """Returns the one device of a model's parameters and buffers; None when there are several."""
    held = [d for _, m in tree(model) for d in (m._parameters, m._buffers)]
    devices = {t.device for d in held for t in d.values() if t is not None}
    return devices.pop() if len(devices) == 1 else None
