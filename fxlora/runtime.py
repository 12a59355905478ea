"""The few functions and modules of our own that run inside a rewritten graph."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from fxlora.trace.shell import GraphHelper


def cast_like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns `x` in the dtype of `like`; `x` itself when it has it already.

    peft decides this at every call (BaseTunerLayer._cast_input_dtype), so a graph that is later
    moved to another dtype, or run under autocast, must decide it then too.
    """
    return x if x.dtype == like.dtype else x.to(like.dtype)


def baddbmm(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, alpha: float
) -> torch.Tensor:
    """Returns `weight + alpha * left @ right` in the dtype of `weight`, under autocast too.

    peft folds the factors of expert weights this way (peft.tuners.lora.layer._LoraFactorsProxy).
    """
    if weight.device.type == "meta":
        return torch.baddbmm(weight, left, right, alpha=alpha)
    with torch.autocast(weight.device.type, enabled=False):
        return torch.baddbmm(weight, left, right, alpha=alpha)


def add_rows(
    y: torch.Tensor, delta: torch.Tensor, *, blocks: tuple[tuple[int, int, int, int], ...], dim: int
) -> torch.Tensor:
    """Returns `y` with `delta` added to some of its rows, in the wider dtype of the two.

    Args:
        y: any tensor.
        delta: as `y`, with only those rows along `dim`.
        blocks: which rows: (start, width, period, count), that is `width` rows from `start`, from
            `start + period`, and so on.
        dim: along which dimension.
    """
    out = y.to(torch.promote_types(y.dtype, delta.dtype))
    at = 0
    for start, width, period, count in blocks:
        more = delta.narrow(dim, at, width * count)
        at += width * count
        if count == 1:
            end = start + width
            before, after = out.narrow(dim, 0, start), out.narrow(dim, end, out.shape[dim] - end)
            out = torch.cat((before, out.narrow(dim, start, width) + more, after), dim)
            continue
        heads = torch.arange(count, device=y.device) * period + start
        rows = (heads[:, None] + torch.arange(width, device=y.device)).flatten()
        out = out.index_add(dim, rows, more.to(out.dtype))
    return out


# So that a saved GraphModule, which torch.fx traces again when it is loaded, keeps them whole.
torch.fx.wrap("cast_like")
torch.fx.wrap("baddbmm")
torch.fx.wrap("add_rows")


class DoraBase(GraphHelper):
    """The base output DoRA rescales: without its bias, and of the dropped input while training.

    peft (DoraLinearVariant.forward) takes the base output it has, less the bias, in eval mode, and
    computes it again from dropout(x) in train mode.
    """

    def __init__(self, convolution: Any = None, pads: bool = True) -> None:
        super().__init__()
        self.pad: tuple[Any, str] | None = None
        self.settings: dict[str, Any] = {}
        if convolution is not None:
            self.settings = {
                k: getattr(convolution, k) for k in ("stride", "padding", "dilation", "groups")
            }
            if pads and convolution.padding_mode != "zeros":
                around = convolution._reversed_padding_repeated_twice
                self.pad = (around, convolution.padding_mode)
                self.settings["padding"] = 0

    def forward(
        self, result: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """Returns W x, or `result - bias`."""
        if not self.training:
            return result if bias is None else result - bias
        if not self.settings:
            return F.linear(x, weight)
        if self.pad is not None:
            x = F.pad(x, self.pad[0], mode=self.pad[1])
        convolution = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
        made: torch.Tensor = convolution(x, weight, bias=None, **self.settings)
        return made
