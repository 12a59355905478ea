"""The modules an adapter is made of, with peft's dtypes and, under one seed, peft's bits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fxlora.plan import ADAPTER, PlannedSite

# peft.tuners.tuners_utils.cast_adapter_dtype: these are trained in float32.
_UPCAST = {torch.float16, torch.bfloat16} | {
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
}


def build(planned: PlannedSite, weight: torch.Tensor, config: Any) -> dict[str, nn.Module]:
    """Makes lora_dropout, lora_A and lora_B of one site.

    The random numbers are drawn in peft's order (LoraLayer.update_layer): construct lora_A,
    construct lora_B, then initialise. On the meta device none are drawn.

    Args:
        planned: the site.
        weight: the base weight, for its device and dtype.
        config: the resolved LoraConfig.

    Returns:
        Child name -> `nn.ModuleDict` with one entry, the adapter.
    """
    (r, in_features), (out_features, _) = planned.adapter_shapes
    device = torch.device("meta") if weight.device.type == "meta" else torch.device("cpu")
    dropout: nn.Module = nn.Identity()
    if config.lora_dropout > 0:
        dropout = nn.Dropout(p=config.lora_dropout)
    with torch.device(device):
        a = nn.Linear(in_features, r, bias=False)
        b = nn.Linear(r, out_features, bias=bool(config.lora_bias))
    _initialise(a, b, config.init_lora_weights, planned.r)
    dtype = weight.dtype if weight.dtype.is_floating_point else None
    made = {"lora_dropout": dropout, "lora_A": a, "lora_B": b}
    for m in (a, b):
        m.to(device=weight.device, dtype=dtype)
        if dtype in _UPCAST:
            m.to(torch.float32)  # after rounding to the base's dtype, as peft does
        m.requires_grad_(not config.inference_mode)
    return {name: nn.ModuleDict({ADAPTER: m}) for name, m in made.items()}


def _initialise(a: nn.Linear, b: nn.Linear, how: Any, r: int) -> None:
    """Initialises as peft's LoraLayer.reset_lora_parameters; False keeps nn.Linear's own."""
    if not how:
        return
    if how is True:
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
    else:
        nn.init.normal_(a.weight, std=1 / r)
    nn.init.zeros_(b.weight)
    if b.bias is not None:
        nn.init.zeros_(b.bias)
