"""How an adapter's first values are drawn: peft's formulas, in peft's order of random numbers.

Every function writes into the `nn.Linear` (or convolution) it is given, and returns the base weight
the initialisation leaves behind, or None when it leaves the base as it was. Nothing here knows of
graphs; the base weight itself is never changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from fxlora.errors import ConfigError


class _Draw(NamedTuple):
    """What an initialisation from the base weight works with: `initialise`'s arguments."""

    how: str
    a: nn.Module
    b: nn.Module
    base: torch.Tensor
    r: int
    scaling: float


_SVD_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def initialise(
    how: str | bool, a: nn.Module, b: nn.Module, base: torch.Tensor, r: int, scaling: float
) -> torch.Tensor | None:
    """Draws lora_A and lora_B.

    Args:
        how: `init_lora_weights` as `fxlora.config.init_name` spells it.
        a, b: freshly constructed lora_A and lora_B; written.
        base: the base weight as (out, in); read.
        r: rank.
        scaling: the factor on B A.

    Returns:
        The new base weight, (out, in), in the dtype of `base`; None when it stays.

    Raises:
        ConfigError: when the rank or the dtype does not go with the initialisation.

    Source: peft.tuners.lora.layer.LoraLayer.update_layer and its `*_init` methods.
    """
    if how is False:
        return None
    if isinstance(how, str) and how not in ("gaussian", "orthogonal"):
        _check_dtype(how, base)
        factor = _FROM_BASE[how.partition("_niter_")[0]]
        return factor(_Draw(how, a, b, base, r, scaling))
    if how == "orthogonal":
        _orthogonal(a, b, base, r)
        return None
    weight_a, weight_b = _weight(a), _weight(b)
    if how is True:
        nn.init.kaiming_uniform_(weight_a, a=math.sqrt(5))
    else:
        nn.init.normal_(weight_a, std=1 / r)
    nn.init.zeros_(weight_b)
    if isinstance(b.bias, torch.Tensor):
        nn.init.zeros_(b.bias)
    return None


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _check_dtype(how: str, base: torch.Tensor) -> None:
    if base.dtype not in _SVD_DTYPES:
        raise ConfigError(
            f"init_lora_weights={how!r} factors the base weight, which is {base.dtype}; it needs "
            "float32, float16 or bfloat16"
        )


def _pissa(d: _Draw) -> torch.Tensor:
    """PiSSA (arXiv 2404.02948): the principal part trains, the rest is the new base."""
    weight = d.base.detach().to(torch.float32)
    if d.how == "pissa":
        v, s, uh = torch.linalg.svd(weight, full_matrices=False)
        v, s, uh = v[:, : d.r], s[: d.r], uh[: d.r]
        s = s / d.scaling
    else:
        v, s, u = torch.svd_lowrank(weight, d.r, niter=int(d.how.rpartition("_")[2]))
        s = s / d.scaling
        uh = u.t()
    new_a = torch.diag(torch.sqrt(s)) @ uh
    new_b = v @ torch.diag(torch.sqrt(s))
    d.a.weight = nn.Parameter(new_a)
    d.b.weight = nn.Parameter(new_b)
    left: torch.Tensor = weight - d.scaling * new_b @ new_a
    return left.to(d.base.dtype)


def _olora(d: _Draw) -> torch.Tensor:
    """OLoRA (arXiv 2406.01775): lora_B orthonormal, from the QR of the base weight."""
    weight = d.base.detach().to(torch.float32)
    q, upper = torch.linalg.qr(weight)
    new_a, new_b = upper[: d.r].contiguous(), q[:, : d.r].contiguous()
    d.a.weight = nn.Parameter(new_a)
    d.b.weight = nn.Parameter(new_b)
    # In place on a copy, as peft does: for a float32 base `-=` and `-` round alike.
    left: torch.Tensor = weight - d.scaling * new_b @ new_a
    return left.to(d.base.dtype)


def _mica(d: _Draw) -> torch.Tensor | None:
    """MiCA (arXiv 2604.01694): lora_B is the minor left singular vectors, and stays frozen."""
    most = min(d.base.shape)
    if d.r > most:
        raise ConfigError(
            f"init_lora_weights='mica' with r={d.r} on a weight of {tuple(d.base.shape)}: at most {most}"
        )
    if d.base.device.type == "meta":
        return None
    u, _, _ = torch.linalg.svd(d.base.detach().to(torch.float32), full_matrices=False)
    d.b.weight = nn.Parameter(u[:, -d.r :].contiguous().to(d.base.dtype))
    d.a.weight = nn.Parameter(
        torch.zeros(d.r, d.base.shape[1], device=d.base.device, dtype=d.base.dtype)
    )
    return None


_FROM_BASE: dict[str, Callable[[_Draw], torch.Tensor | None]] = {
    "pissa": _pissa,
    "olora": _olora,
    "mica": _mica,
}


@torch.no_grad()
def _orthogonal(a: nn.Module, b: nn.Module, base: torch.Tensor, r: int) -> None:
    """Makes B A = 0 with both nonzero (datta0.github.io/posts/rethink-lora-init)."""
    if r % 2:
        raise ConfigError(f"init_lora_weights='orthogonal' with r={r}: the rank must be even")
    out_features, in_features = base.shape
    q, _ = torch.linalg.qr(torch.randn(r, r))
    odd, even = q[0::2, :], q[1::2, :]
    new_a = torch.randn(in_features, r // 2).mm(odd).T / 10.0
    new_b = torch.randn(r // 2, out_features).T.mm(even) / 10.0
    a.weight = nn.Parameter(new_a.contiguous().to(base.dtype))
    b.weight = nn.Parameter(new_b.contiguous().to(base.dtype))


def truncated(base: torch.Tensor, r: int) -> torch.Tensor:
    """Returns the base weight without its r smallest singular components (KaSA, arXiv 2412.06071).

    Raises:
        ConfigError: when no component would be left.
    """
    most = min(base.shape)
    if r >= most:
        raise ConfigError(
            f"kasa_config with r={r} on a weight of {tuple(base.shape)}: r must be below {most}"
        )
    u, s, vh = torch.linalg.svd(base.detach().to(torch.float32), full_matrices=False)
    keep = most - r
    kept: torch.Tensor = (u[:, :keep] * s[:keep]) @ vh[:keep, :]
    return kept.to(base.dtype)
