"""The dense weight an adapter comes to: s * B A in the shape of the weight it is added to."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from fxlora.build import Held
from fxlora.errors import AdapterError
from fxlora.layers import is_conv
from fxlora.plan import PlannedSite


def value(held: Held, planned: PlannedSite, name: str) -> torch.Tensor:
    """Returns the tensor of one part of an adapter: `lora_A`, `lora_embedding_B`, ..."""
    part: Any = held.parts[f"{planned.prefix}.{name}.{held.plan.adapter}"]
    found: torch.Tensor = part if isinstance(part, torch.Tensor) else part.weight
    return found.detach()


def factors(held: Held, planned: PlannedSite) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns lora_A and lora_B, dense where one is block-diagonal, with KaSA's diagonal in B."""
    if planned.form == "rows":
        return value(held, planned, "lora_embedding_A"), value(held, planned, "lora_embedding_B")
    a, b = value(held, planned, "lora_A"), value(held, planned, "lora_B")
    if planned.variant == "bdlora-a":
        a = _unfolded(a, held)
    if planned.variant == "bdlora-b":
        b = _unfolded(b, held)
    if planned.variant == "kasa":
        b = b * value(held, planned, "lora_diag")
    return a, b


def _unfolded(blocks: torch.Tensor, held: Held) -> torch.Tensor:
    """Returns a block-diagonal factor with its zeros written out."""
    n: int = held.plan.config.use_bdlora.nblocks
    made: torch.Tensor = torch.block_diag(*torch.chunk(blocks, n, dim=0))  # type: ignore[no-untyped-call]
    return made


def delta(held: Held, planned: PlannedSite) -> torch.Tensor:
    """Returns s * B A in the order of the weight, in the adapter's dtype; of a part, its rows.

    Raises:
        AdapterError: for a grouped convolution, whose adapter no grouped weight can hold.

    Source: `get_delta_weight` of peft.tuners.lora.layer's classes; a convolution's is written out
    for every kernel, where peft's fails on a Conv3d of 1 x 1 x k.
    """
    a, b = factors(held, planned)
    scaling = planned.scaling
    if is_conv(planned.kind):
        return _convolution(a, b, planned) * scaling
    if planned.experts > 1:
        e, i, o = planned.experts, planned.site.in_features, planned.site.out_features
        a3, b3 = a.reshape(e, -1, i), b.reshape(o, -1, e)
        rule = f"ore,eri->e{'io' if planned.site.transposed else 'oi'}"
        return torch.einsum(rule, b3, a3) * scaling
    product = b @ a
    turned = planned.kind in ("Conv1D", "Embedding")
    return (product.t() if turned else product) * scaling


def _convolution(a: torch.Tensor, b: torch.Tensor, planned: PlannedSite) -> torch.Tensor:
    if b.shape[1] != a.shape[0]:
        raise AdapterError(
            f"{planned.name!r} is a grouped convolution: its adapter mixes all input channels, which "
            "a grouped weight cannot hold, so it cannot be merged. Keep it beside the layer"
        )
    if all(k == 1 for k in a.shape[2:]):
        return (b.flatten(1) @ a.flatten(1)).reshape(-1, *a.shape[1:])
    # As peft multiplies them: another order of the same sum has other bits on some machines.
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[a.dim()]
    return convolve(a.transpose(0, 1), b).transpose(0, 1)


def merged_weight(
    held: Held, planned: PlannedSite, weight: torch.Tensor, base: torch.Tensor
) -> torch.Tensor:
    """Returns a weight with one more adapter in it, in the dtype of the weight.

    DoRA rescales what stands before it, adapters merged earlier included, by a norm it takes over
    the base alone: the order and the formula of a forward with several active adapters.

    Args:
        held: the adapter.
        planned: one of its adapted sites.
        weight: the weight so far, as the layer holds it; read.
        base: the weight without any adapter; read.
    """
    added = delta(held, planned)
    if planned.site.rows:
        index = torch.tensor([i for r in planned.site.rows for i in r], device=weight.device)
        dim = 1 if planned.kind == "Conv1D" else 0
        return weight.index_add(dim, index, added.to(weight.dtype)).detach()
    if planned.variant != "dora":
        return (weight + added.to(weight.dtype)).detach()
    magnitude = value(held, planned, "lora_magnitude_vector")
    total = base + added
    if is_conv(planned.kind):
        norm = total.flatten(1).norm(dim=1).view(magnitude.shape)
        factor = (magnitude / norm).transpose(0, 1)
    else:
        turned = planned.kind in ("Conv1D", "Embedding")
        norm = torch.linalg.norm(total, dim=0 if turned else 1)
        factor = (magnitude / norm).view((1, -1) if turned else (-1, 1))
    made: torch.Tensor = (factor * (weight + added)).to(weight.dtype)
    return made.detach()
