"""The functions an optimized graph calls: what modules and pairs of nodes did, in one Python frame."""

from __future__ import annotations

import math
from typing import Any

import torch

# F.linear itself, without the Python name in front of it.
linear = torch._C._nn.linear
_addmm, _add, _F32 = torch.addmm, torch.add, torch.float32
_HALVES = (torch.bfloat16, torch.float16)
MOST = 128  # the longest inner dimension the BLAS sums up in one go
_MANY = 1 << 15  # below, one more node of autograd's graph costs more than a pass over the output


def is_power_of_two(s: float) -> bool:
    """Whether multiplying by a number changes the exponent only.

    >>> is_power_of_two(0.5), is_power_of_two(2.0), is_power_of_two(1.5), is_power_of_two(-4.0)
    (True, True, False, True)
    """
    return s != 0 and abs(math.frexp(s)[0]) == 0.5


def conv1d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Returns what transformers' Conv1D computes: x W + b, with W stored as (in, out)."""
    flat = _addmm(bias, x.view(-1, x.size(-1)), weight)
    return flat.view(*x.shape[:-1], weight.shape[1])


def by_mode(module: Any) -> Any:
    """Returns the constant a `ByMode` module holds for the mode it is in."""
    return module.train_value if module.training else module.eval_value


def dropout(x: torch.Tensor, module: Any) -> torch.Tensor:
    """Returns what a Dropout module makes of x in the mode it is in."""
    return torch.dropout(x, module.p, True) if module.training else x


def cast_for_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns x in the dtype a matrix product with `weight` needs.

    Under autocast the product casts by itself: casting x up to the weight's dtype first, as peft
    does, makes autocast cast it down again. The pair is the identity, forward and backward.
    """
    if x.dtype == weight.dtype:
        return x
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == x.dtype:
        return x
    return x.to(weight.dtype)


def add_product(
    y: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Returns y + alpha * h W^T in the wider of their dtypes, by one addmm where bits allow it.

    They do where the adapter computes in float32: its product is summed up from zero and then added
    to y, or to y cast to float32, which adding the two does as well. In bfloat16 the addmm rounds
    once where the two steps round twice.
    """
    if y.dtype is _F32 and h.dtype is _F32 and h.ndim == 2:
        return _addmm(y, h, weight.t(), alpha=alpha)
    # A size that is asked for while torch compiles or exports becomes a condition of the program.
    wide = h.dtype is _F32 and (
        y.dtype is _F32
        or (y.dtype in _HALVES and not torch.compiler.is_compiling() and y.numel() >= _MANY)
    )
    if wide and h.ndim == 2:
        return _sum(y, h, weight, alpha)
    if wide and h.ndim == 3 and h.is_contiguous() and y.is_contiguous():
        flat = _sum(y.view(-1, y.size(-1)), h.view(-1, h.size(-1)), weight, alpha)
        return flat.view(y.shape)
    return _add(y, linear(h, weight), alpha=alpha)


def _sum(y: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    if y.dtype is _F32:
        return _addmm(y, h, weight.t(), alpha=alpha)
    # The cast is a tensor of our own, so the sum may be written into it.
    return y.to(_F32).addmm_(h, weight.t(), alpha=alpha)


class _Again(torch.autograd.Function):
    """A cast whose result is there already: forward hands it on, backward casts the gradient."""

    @staticmethod
    def forward(x: torch.Tensor, cast: torch.Tensor) -> torch.Tensor:  # noqa: ARG004  backward's
        """Returns the tensor x was cast to before."""
        return cast.view_as(cast)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004  torch's signature
        """Keeps the dtype gradients are cast to."""
        ctx.dtype, ctx.cast = inputs[0].dtype, inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Casts each sibling's gradient by itself, so that they add up in the order peft's do."""
        return grads[0].to(ctx.dtype), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Casts the tangent, for forward-mode differentiation."""
        return tangents[0].to(ctx.cast)


def cast_again(x: torch.Tensor, weight: torch.Tensor, cast: torch.Tensor) -> torch.Tensor:
    """Returns `cast_for_product(x, weight)`, given what it returned for a sibling.

    Args:
        x: the tensor both siblings read.
        weight: what this one is multiplied by.
        cast: what x was cast to for the sibling.
    """
    if torch.compiler.is_compiling() or cast is x or cast.dtype != weight.dtype:
        return cast_for_product(x, weight)
    if x.numel() < _MANY:  # a function of Python's in autograd's graph takes longer than the cast
        return cast_for_product(x, weight)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return cast
    again: torch.Tensor = _Again.apply(x, cast.detach())  # type: ignore[no-untyped-call]
    return again


# So that a saved GraphModule, which torch.fx traces again when it is loaded, keeps them whole.
for _name in (
    "conv1d",
    "by_mode",
    "dropout",
    "cast_for_product",
    "add_product",
    "cast_again",
):
    torch.fx.wrap(_name)
