"""What of a call can change the metadata of its result, and results made again from earlier ones.

A fake tensor has a shape and no data. So a call gives the same as an earlier one when function,
constants and the metadata of the tensors are the same; then its result is made from the earlier
one's, and torch's kernels for symbolic sizes, which take milliseconds, run once per kind of call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import _disable_current_modes

from fxlora.trace import sizes

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, type)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSORS = (FakeTensor, torch.Tensor, nn.Parameter)


class NotPlain(Exception):
    """An argument or attribute whose equality says nothing about its behaviour."""


def tensor_key(t: torch.Tensor) -> tuple[Any, ...]:
    """Returns the metadata of a tensor, symbolic sizes as their expressions."""
    strides: Any = t.stride() if t.layout is torch.strided else ()
    shape: Any = t.shape
    if isinstance(t, FakeTensor):
        shape, strides = tuple(map(_size_key, shape)), tuple(map(_size_key, strides))
    return (shape, strides, t.dtype, t.device, t.requires_grad, type(t))


def _size_key(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def plain(value: Any, numbers: dict[int, int]) -> Any:
    """Returns a hashable image of an argument.

    Args:
        value: a nest of tensors and constants.
        numbers: id -> which of the call's tensors it is.

    Raises:
        NotPlain: where there is none.
    """
    if isinstance(value, torch.Tensor):
        return ("tensor", numbers[id(value)], tensor_key(value))
    if sizes.is_symbolic(value):
        return ("size", value.node.expr)
    if isinstance(value, PLAIN):
        return (type(value), value)
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(plain(v, numbers) for v in value))
    if isinstance(value, dict):
        return (type(value), tuple((k, plain(v, numbers)) for k, v in value.items()))
    raise NotPlain


class Fresh(torch.autograd.Function):
    """Gives a tensor a gradient without recording what it was computed from."""

    @staticmethod
    def forward(ctx: Any, like: torch.Tensor, made: list[torch.Tensor]) -> torch.Tensor:  # noqa: ARG004
        """Returns the one tensor in `made`, as a function of `like`."""
        return made.pop()


def another(value: torch.Tensor) -> torch.Tensor:
    """Returns another tensor over a tensor's memory, and a result of calls when that one is.

    That is `value.data`, which a fake tensor hands through torch's dispatcher: a tenth of its time.
    """
    if type(value) is FakeTensor:
        with torch._C._DisableTorchDispatch():
            made = value.detach()
        fresh: torch.Tensor = FakeTensor(value.fake_mode, made, value.fake_device)
    else:
        fresh = value.data
    if value.requires_grad:
        fresh = Fresh.apply(value, [fresh])  # type: ignore[no-untyped-call]
    return fresh


@dataclass(frozen=True)
class _Result:
    """The metadata of a result: sizes as numbers, or as expressions with the example's number."""

    shape: tuple[Any, ...]
    strides: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


# What a call gave, by what that followed from.
Results = dict[Any, _Result]


class Maker:
    """Makes the results of one run's calls from those of earlier calls of the trace.

    Args:
        results: read and added to; the run in the other mode goes on with them.
        fake_mode: of this run.
    """

    def __init__(self, results: Results, fake_mode: FakeTensorMode) -> None:
        self._results, self._fake_mode = results, fake_mode
        self._sizes: dict[Any, Any] = {}

    def key(
        self, function: Callable[..., Any], args: Any, kwargs: Any, inputs: Sequence[torch.Tensor],
        autocast: Any,
    ) -> Any:  # fmt: skip
        """Returns what the metadata of a call's result follows from; None where that is not known."""
        if not inputs or not all(_is_ordinary(t) for t in inputs):
            return None
        numbers: dict[int, int] = {}
        for t in inputs:
            numbers.setdefault(id(t), len(numbers))
        state = (torch.is_grad_enabled(), torch.get_default_dtype(), autocast)
        try:
            if args and isinstance(args[0], nn.Module):
                made = (function, _linear(args[0]), plain((args[1:], kwargs), numbers), state)
            else:
                made = (function, None, plain((args, kwargs), numbers), state)
            hash(made)  # a size of another trace, inside this one, has none
        except (NotPlain, TypeError):
            return None
        return made

    def get(self, key: Any) -> torch.Tensor | None:
        """Returns a new tensor with the metadata kept under a key, and memory of its own."""
        like = self._results.get(key)
        if like is None:
            return None
        shape, strides = (tuple(map(self._size, s)) for s in (like.shape, like.strides))
        with _disable_current_modes():
            made = torch.empty_strided(shape, strides, dtype=like.dtype, device="meta")
            out: torch.Tensor = FakeTensor(self._fake_mode, made, like.device)
            # Any tensor that requires grad will do to make this one a result and no leaf.
            needed = (
                torch.empty(0, device="meta", requires_grad=True) if like.requires_grad else None
            )
        return out if needed is None else Fresh.apply(needed, [out])  # type: ignore[no-untyped-call]

    def _size(self, size: Any) -> Any:
        if isinstance(size, int):
            return size
        if size not in self._sizes:
            env: Any = self._fake_mode.shape_env
            self._sizes[size] = env.create_symintnode(size[0], hint=size[1])
        return self._sizes[size]

    def keep(self, key: Any, out: Any, inputs: Sequence[torch.Tensor]) -> None:
        """Keeps a result, when it is one new tensor."""
        if type(out) is not FakeTensor or not _is_ordinary(out):
            return
        if out.requires_grad and out.is_leaf:
            return
        memory = out.untyped_storage()._cdata
        if any(t.untyped_storage()._cdata == memory for t in inputs):
            return
        if not all(map(_is_known, (*out.shape, *out.stride()))):
            return
        shape, strides = (tuple(map(_kept_size, s)) for s in (out.shape, out.stride()))
        self._results[key] = _Result(shape, strides, out.dtype, out.fake_device, out.requires_grad)


def _is_known(size: Any) -> bool:
    # A size that depends on values (`nonzero`) is another one at every call.
    return not isinstance(size, torch.SymInt) or size.node.hint is not None


def _kept_size(size: Any) -> Any:
    return (size.node.expr, int(size.node.hint)) if isinstance(size, torch.SymInt) else size


def _is_ordinary(t: torch.Tensor) -> bool:
    if type(t) not in _TENSORS or t.layout is not torch.strided or t.is_conj() or t.is_neg():
        return False
    return not isinstance(t, FakeTensor) or t.constant is None


def _linear(module: nn.Module) -> Any:
    """Returns what a linear layer's result follows from; of other layers that is not known."""
    own = module.__dict__
    hooked = any(own[h] for h in HOOKS) or nn_module._has_any_global_hook()  # type: ignore[no-untyped-call]
    if type(module) is not nn.Linear or "forward" in own or hooked:
        raise NotPlain
    held = (*own["_parameters"].values(), *own["_buffers"].values(), *own["_modules"].values())
    if not all(t is None or (isinstance(t, torch.Tensor) and _is_ordinary(t)) for t in held):
        raise NotPlain
    return tuple(None if t is None else tensor_key(t) for t in held)
