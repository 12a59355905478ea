"""The modules an adapter is made of, with peft's dtypes and, under one seed, peft's bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxlora.config import init_name
from fxlora.extras import TokenRows
from fxlora.freezing import UPCAST, bias_trains
from fxlora.initialise import initialise, truncated
from fxlora.layers import is_conv
from fxlora.plan import Plan, PlannedSite
from fxlora.trace.shell import shell

Part = nn.Module | nn.Parameter


@dataclass
class Held:
    """One adapter: its plan, its modules and parameters by path, and what it did to base weights.

    Attributes:
        plan: the plan it was made by.
        parts: path in the graph module -> module or parameter.
        residuals: name of a base weight -> the weight that takes its place while it is active.
    """

    plan: Plan
    parts: dict[str, Part] = field(default_factory=dict)
    residuals: dict[str, torch.Tensor] = field(default_factory=dict)


def build(base: GraphModule, plan: Plan, quirks: frozenset[str] = frozenset()) -> Held:
    """Draws everything one adapter adds to a traced graph.

    The random numbers are drawn in the order in which peft wraps: modules, then parameters; per
    site construct lora_A, construct lora_B, initialise. On the meta device none are drawn.

    Args:
        base: the traced graph; read.
        plan: for that graph.
        quirks: names of `fxlora.divergences` to reproduce.
    """
    held = Held(plan)
    for planned in plan.adapted:
        _Builder(base, plan, planned, held, quirks).run()
    for saved in plan.saved:
        copied = _whole(base.get_submodule(saved.name), not plan.config.inference_mode)
        held.parts[f"{saved.name}.modules_to_save.{plan.adapter}"] = copied
    for rows in plan.tokens:
        if not rows.tied_to:
            path = f"{rows.name}.token_adapter.trainable_tokens_delta.{plan.adapter}"
            held.parts[path] = _rows(base, rows)
    return held


class _Builder:
    """Draws the adapter of one site."""

    def __init__(
        self, base: GraphModule, plan: Plan, planned: PlannedSite, held: Held,
        quirks: frozenset[str],
    ) -> None:  # fmt: skip
        self._config, self._planned, self._held, self._quirks = plan.config, planned, held, quirks
        self._adapter = plan.adapter
        owner, _, name = planned.site.weight_name.rpartition(".")
        self._layer: Any = base.get_submodule(owner)
        self._weight: torch.Tensor = getattr(self._layer, name)

    def run(self) -> None:
        """Draws, and adds to what is held."""
        if self._planned.kind == "MultiheadAttention":
            # peft wraps out_proj, then in_proj, then draws out_proj's adapter once more.
            embed = self._planned.site.in_features
            self._pair(embed, embed)
        if self._planned.kind == "Embedding":
            self._embedding()
        else:
            self._linear()

    def _add(self, name: str, part: Part) -> None:
        self._held.parts[f"{self._planned.prefix}.{name}.{self._adapter}"] = part

    def _dropout(self) -> nn.Module:
        if self._config.lora_dropout > 0 and self._planned.form != "delta":
            return nn.Dropout(p=self._config.lora_dropout)
        return nn.Identity()

    # ---- drawing

    def _device(self) -> torch.device:
        meta = self._weight.device.type == "meta"
        return torch.device("meta") if meta else torch.device("cpu")

    def _pair(self, in_features: int, out_features: int) -> tuple[nn.Module, nn.Module]:
        inner = self._planned.r * self._planned.experts
        made = _linear if self._weight.device.type == "meta" else nn.Linear
        with torch.device(self._device()):
            a = made(in_features, inner, bias=False)
            b = made(inner, out_features, bias=bool(self._config.lora_bias))
        self._initialise(a, b)
        return a, b

    def _convolutions(self) -> tuple[nn.Module, nn.Module]:
        layer, r = self._layer, self._planned.r
        one = (1,) * len(layer.kernel_size)
        more: dict[str, Any] = {}
        # PEFT leaves these two out (huggingface/peft#3697), and then lora_A is another map.
        if any(d != 1 for d in layer.dilation) and "conv_dilation" not in self._quirks:
            more["dilation"] = layer.dilation
        if layer.padding_mode != "zeros" and "conv_padding_mode" not in self._quirks:
            more["padding_mode"] = layer.padding_mode
        made = type(layer)
        with torch.device(self._device()):
            a = made(
                layer.in_channels, r, layer.kernel_size, layer.stride, layer.padding, bias=False,
                **more,
            )  # fmt: skip
            b = made(
                r, layer.out_channels, one, one, groups=layer.groups,
                bias=bool(self._config.lora_bias),
            )  # fmt: skip
        self._initialise(a, b)
        return a, b

    def _initialise(self, a: nn.Module, b: nn.Module) -> None:
        how = init_name(self._config)
        p = self._planned
        if how in (True, "gaussian") and self._weight.device.type == "meta":
            return  # there is nothing to draw
        turned = p.kind == "Conv1D" and "olora_conv1d" not in self._quirks
        weight = self._weight.t() if turned else self._weight
        residual = initialise(how, a, b, weight, p.r, p.scaling)
        if residual is not None:
            residual = residual.t() if turned else residual
            self._held.residuals[p.site.weight_name] = residual

    # ---- layers

    def _linear(self) -> None:
        p = self._planned
        if is_conv(p.kind):
            a, b = self._convolutions()
        else:
            a, b = self._pair(p.site.in_features, p.site.out_features)
        self._settle(a)
        self._settle(b)
        if p.variant == "mica":
            b.requires_grad_(False)
        parts: dict[str, Part] = {"lora_dropout": self._dropout(), "lora_A": a, "lora_B": b}
        if p.variant == "dora":
            parts["lora_magnitude_vector"] = self._magnitude(a, b)
        if p.variant == "kasa":
            parts["lora_diag"] = self._diagonal()
        if p.variant.startswith("bdlora-"):
            which = f"lora_{p.variant[-1].upper()}"
            parts[which] = self._block(parts[which])
        for name, part in parts.items():
            self._finish(part)
            self._add(name, part)

    def _embedding(self) -> None:
        p = self._planned
        r, v, d = p.r, p.site.in_features, p.site.out_features
        with torch.device(self._device()):
            a = nn.Parameter(torch.randn((r, v)))
            b = nn.Parameter(torch.randn((d, r)))
        how = init_name(self._config)
        if how == "mica":
            slot_a, slot_b = _Slot(a), _Slot(b)
            initialise("mica", slot_a, slot_b, self._weight.t(), r, p.scaling)
            a, b = slot_a.weight, slot_b.weight
        elif how:
            nn.init.zeros_(a)
            nn.init.normal_(b)
        a, b = self._cast(a), self._cast(b)
        b.requires_grad_(p.variant != "mica")
        parts: dict[str, Part] = {
            "lora_dropout": self._dropout(), "lora_embedding_A": a, "lora_embedding_B": b,
        }  # fmt: skip
        if p.variant == "dora":
            norm = torch.linalg.norm(
                self._weight.detach().t() + p.scaling * (b @ a).detach(), dim=1
            )
            parts["lora_magnitude_vector"] = _Slot(nn.Parameter(norm.to(self._weight.dtype)))
        for name, part in parts.items():
            self._add(name, self._up(part))

    # ---- variants

    def _magnitude(self, a: nn.Module, b: nn.Module) -> nn.Module:
        """Returns DoRA's magnitude: the norms of the rows of W + s B A (arXiv 2402.09353, eq. 5)."""
        weight_a, weight_b = _weight_of(a).detach(), _weight_of(b).detach()
        half = weight_a.dtype == torch.float16
        if half:  # as peft: fp16 on a CPU is asking for trouble
            weight_a, weight_b = weight_a.float(), weight_b.float()
        base = self._held.residuals.get(self._planned.site.weight_name, self._weight).detach()
        if base.dim() > 2:
            r = weight_a.shape[0]
            delta = torch.mm(weight_b.view([-1, r]), weight_a.view([r, -1])).reshape(base.shape)
        else:
            delta = weight_b @ weight_a
        if half:
            delta = delta.half()
        if base.dim() > 2:
            total = base + self._planned.scaling * delta
            dims = tuple(range(1, total.dim()))
            return _Slot(nn.Parameter(total.norm(p=2, dim=dims, keepdim=True).transpose(1, 0)))
        base = base.t() if self._planned.kind == "Conv1D" else base
        total = base + self._planned.scaling * delta
        return _Slot(nn.Parameter(torch.linalg.norm(total, dim=1).to(total.dtype)))

    def _diagonal(self) -> nn.Parameter:
        r, weight = self._planned.r, self._weight
        dtype = weight.dtype
        if weight.device.type == "meta":
            return nn.Parameter(torch.empty(r, device="meta", dtype=dtype))
        diagonal = nn.Parameter(torch.randn(r, device=weight.device, dtype=dtype))
        name = self._planned.site.weight_name
        left = self._held.residuals.get(name, weight)
        self._held.residuals[name] = truncated(left, r)
        return diagonal

    def _block(self, dense: Part) -> nn.Module:
        from peft.tuners.lora.variants import BlockDiagonalLinear

        assert isinstance(dense, nn.Linear)
        layer: nn.Module = BlockDiagonalLinear(
            dense.in_features, dense.out_features, nblocks=self._config.use_bdlora.nblocks,
            init_zero=self._planned.variant == "bdlora-b", dtype=self._weight.dtype,
            device=self._weight.device,
        )  # fmt: skip
        return layer

    # ---- dtypes

    def _settle(self, module: nn.Module) -> None:
        # A packed 4-bit weight says what it computes in; peft rounds the adapter to that.
        dtype = getattr(self._layer, "compute_dtype", None) or self._weight.dtype
        module.to(device=self._weight.device, dtype=dtype if dtype.is_floating_point else None)

    def _cast(self, p: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(p.detach().to(self._weight.device, self._weight.dtype))

    def _up(self, part: Part) -> Part:
        """Upcasts, after rounding to the base's dtype, as peft does; freezes where peft does."""
        if isinstance(part, nn.Parameter):
            part = nn.Parameter(part.detach(), requires_grad=part.requires_grad)
        self._finish(part)
        return part

    def _finish(self, part: Part) -> None:
        if isinstance(part, nn.Parameter):
            wide = part.dtype in UPCAST
            part.data = part.data.float() if wide else part.data
            # peft's cast makes a new parameter of one that hangs in no module, and a new one trains.
            part.requires_grad_(wide or (part.requires_grad and not self._config.inference_mode))
            return
        for name, p in part.named_parameters():
            if p.dtype in UPCAST:
                p.data = p.data.float()
            # peft freezes an adapter for inference first and lets every `.bias` train after it
            # (BaseTuner.inject_adapter), lora_bias among them.
            trains = not self._config.inference_mode or bias_trains(
                name, self._config.bias, frozenset()
            )
            p.requires_grad_(p.requires_grad and trains)


class _Undrawn(nn.Linear):
    """A Linear whose weight is not drawn: torch takes longer to draw nothing on meta than to make it."""

    def reset_parameters(self) -> None:
        """Leaves the weight as it is."""


def _linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """Returns `nn.Linear(...)` without numbers."""
    made = _Undrawn(in_features, out_features, bias)
    made.__class__ = nn.Linear  # type: ignore[assignment]
    return made


class _Slot(nn.Module):
    """A module that holds one weight: DoRA's magnitude, as peft names it (`...vector.default.weight`)."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None


def _weight_of(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _whole(module: nn.Module, trains: bool) -> nn.Module:
    """Returns a copy with weights and buffers of its own, as copy.deepcopy in peft."""
    made = shell(module, lambda p: nn.Parameter(p.detach().clone(), requires_grad=trains))
    for m in made.modules():
        for name, b in m._buffers.items():
            m._buffers[name] = None if b is None else b.clone()
    return made


def _rows(base: GraphModule, rows: TokenRows) -> nn.Parameter:
    weight: Any = base.get_submodule(rows.name).weight
    values = weight.detach()[list(rows.indices)].clone()
    values = values.float() if values.dtype in UPCAST else values
    return nn.Parameter(values, requires_grad=rows.trains)
