"""The autograd functions of memory mode: they keep what cannot be computed again, once.

group    y_i = x W_i^T + b_i + s_i * (dropout_i(x) A_i^T) B_i^T, for siblings i that read one x
         keeps x in the base's dtype, and a byte for every number a dropout drew; the cast of x, and
         h_i = dropout_i(x) A_i^T, are made again
swiglu   z = silu(gate) * up; keeps gate and up; silu(gate) is made again
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fxlora.optimize.functions import (
    MOST,
    add_product,
    cast_for_product,
    dropout,
    is_power_of_two,
    linear,
)

_Site = tuple[Any, Any, Any, Any, float, Any]  # weight, bias, A, B, scaling, its Dropout or None


class _Plan(NamedTuple):
    """What a group does besides its tensors: a scaling and a dropout probability a site.

    `thin`: the scaling is a power of two, so it may be applied where the tensors are thin; not in
    float16, whose products may leave the range that their scaled factors keep to.
    """

    scaling: float
    p: float
    thin: bool


def lora_group(x: torch.Tensor, sites: Sequence[_Site]) -> tuple[torch.Tensor, ...]:
    """Returns the outputs of adapted layers that read the same x.

    Args:
        x: what they read.
        sites: weight, bias or None, A, B, scaling, and a Dropout module or None, of each.
    """
    base = [t for s in sites for t in s[:2] if t is not None]
    if not torch.is_grad_enabled() or any(t.requires_grad for t in base):
        return tuple(plain_site(x, *site) for site in sites)
    plan = tuple(_plan(*s[4:]) for s in sites)
    if any(one.p >= 1 for one in plan):
        return tuple(plain_site(x, *site) for site in sites)
    flat = [t for s in sites for t in s[:4]]
    made: tuple[torch.Tensor, ...] = _Group.apply(x, plan, *flat)  # type: ignore[no-untyped-call]
    return made


def _plan(scaling: float, drop: Any) -> _Plan:
    p = drop.p if drop is not None and drop.training else 0.0
    return _Plan(scaling, p, is_power_of_two(scaling))


def plain_site(
    x: torch.Tensor, weight: Any, bias: Any, a: Any, b: Any, scaling: float, drop: Any
) -> torch.Tensor:
    """Returns the output of one adapted layer by peft's steps."""
    y = linear(x, weight, bias)
    given = x if x.dtype == a.dtype else x.to(a.dtype)
    h = linear(given if drop is None else dropout(given, drop), a)
    total = torch.add(y, linear(h, b), alpha=scaling)
    return total if total.dtype == y.dtype else total.to(y.dtype)


class _Group(torch.autograd.Function):
    """Siblings in one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: tuple[_Plan, ...], *flat: Any) -> Any:
        """Computes peft's steps in peft's order."""
        masks: list[torch.Tensor] = []
        out = []
        for i, one in enumerate(plan):
            weight, bias, a, b = flat[4 * i : 4 * i + 4]
            y = linear(x, weight, bias)
            if one.p:
                given = x if x.dtype == a.dtype else x.to(a.dtype)
                noise = torch.empty_like(given).bernoulli_(1 - one.p)
                masks.append(noise.bool())
                given = given * noise.div_(1 - one.p)
            else:
                given = cast_for_product(x, a)
            h = linear(given, a)
            if one.thin and b.shape[1] <= MOST:
                total = add_product(y, h, b, one.scaling)
            else:
                total = torch.add(y, linear(h, b), alpha=one.scaling)
            total = total if total.dtype == y.dtype else total.to(y.dtype)
            # `add_product` gives a view where there are more than two dimensions, and autograd lets
            # nobody write into a view that a function of several results returns.
            out.append(
                torch.ops.aten._unsafe_view.default(total, total.shape) if y.ndim > 2 else total
            )
            ctx.compute = h.dtype
        ctx.plan = plan
        ctx.set_materialize_grads(False)  # what no loss reads has no gradient, as in peft
        ctx.save_for_backward(x, *(t for i in range(len(plan)) for t in _three(flat, i)), *masks)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        """Adds gradients up from the last sibling to the first, as autograd does peft's."""
        x, *rest = ctx.saved_tensors
        count = len(ctx.plan)
        masks = list(rest[3 * count :])
        found: list[Any] = [None] * (4 * count)
        total: torch.Tensor | None = None
        with torch.autocast(x.device.type, enabled=False):
            wide = x.reshape(-1, x.shape[-1])
            for i in reversed(range(count)):
                one, (weight, a, b) = ctx.plan[i], rest[3 * i : 3 * i + 3]
                mask = masks.pop() if one.p else None
                if grads[i] is None:
                    continue
                site = _SiteGrad(wide, grads[i], weight, a, b, one, mask, ctx.compute)
                found[4 * i + 2], found[4 * i + 3] = site.adapters(
                    ctx.needs_input_grad[2 + 4 * i :]
                )
                if ctx.needs_input_grad[0]:
                    for more in site.inputs():
                        total = more if total is None else total + more
        return (None if total is None else total.view(x.shape), None, *found)


def _three(flat: Sequence[Any], i: int) -> tuple[Any, Any, Any]:
    return flat[4 * i], flat[4 * i + 2], flat[4 * i + 3]


class _SiteGrad:
    """The backward pass of one site."""

    def __init__(
        self, x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, a: torch.Tensor,
        b: torch.Tensor, one: _Plan, mask: torch.Tensor | None, compute: torch.dtype,
    ) -> None:  # fmt: skip
        self._x, self._weight, self._a, self._b, self._one = x, weight, a, b, one
        self._grad = grad.reshape(-1, grad.shape[-1])
        self._compute = compute
        self._wide = compute if mask is None else a.dtype
        self._noise = None
        if mask is not None:
            # The division of ones and zeros, as in the forward pass, bit for bit.
            flat = mask.reshape(x.shape).to(a.dtype)
            self._noise = flat.div_(1 - one.p)
        self._out = self._grad.to(compute)
        self._is_thin = one.thin and compute is not torch.float16
        if not self._is_thin and one.scaling != 1:
            self._out = self._out * one.scaling
        self._inner = self._thin(self._out @ b.to(compute))

    def _thin(self, t: torch.Tensor) -> torch.Tensor:
        return t.mul_(self._one.scaling) if self._is_thin and self._one.scaling != 1 else t

    def adapters(self, needed: Sequence[bool]) -> tuple[Any, Any]:
        """Returns the gradients of A and B, where they are wanted."""
        given = self._x.to(self._wide)
        if self._noise is not None:
            given = given * self._noise
        given = given.to(self._compute)
        of_a = of_b = None
        if needed[2]:
            of_a = (self._inner.t() @ given).to(self._a.dtype)
        if needed[3]:
            h = given @ self._a.to(self._compute).t()
            of_b = self._thin(self._out.t() @ h).to(self._b.dtype)
        return of_a, of_b

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what goes to x through the adapter, and through the base."""
        through = self._inner @ self._a.to(self._compute)
        if self._noise is not None:
            through = through.to(self._wide) * self._noise
        base = self._grad @ self._weight.to(self._grad.dtype)
        return through.to(self._x.dtype), base.to(self._x.dtype)


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up, without keeping silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Computes the two steps."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Makes silu(gate) again."""
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(grad * up, gate) if ctx.needs_input_grad[0] else None
        of_up = grad * F.silu(gate) if ctx.needs_input_grad[1] else None
        return of_gate, of_up


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Returns silu(gate) * up; keeps its two inputs only."""
    if not torch.is_grad_enabled() or gate.shape != up.shape or gate.dtype != up.dtype:
        return F.silu(gate) * up
    made: torch.Tensor = _SwiGlu.apply(gate, up)  # type: ignore[no-untyped-call]
    return made


torch.fx.wrap("lora_group")
torch.fx.wrap("swiglu")
