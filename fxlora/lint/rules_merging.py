"""Rules 5xx: what a merge changes, loses or refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fxlora.config import init_name
from fxlora.divergences import divergences
from fxlora.layers import is_conv
from fxlora.lint.context import Context, shown
from fxlora.lint.finding import Hit, Rule, Severity
from fxlora.lint.flow import weight_of
from fxlora.plan import PlannedSite

DTYPES = {
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16,
    "fp16": torch.float16, "half": torch.float16, "float32": torch.float32, "fp32": torch.float32,
}  # fmt: skip
MOST_LOST = 0.1  # of the update, as a root mean square

# These have rules of their own, or (a Linear subclass with a forward) are no mistake by themselves.
_ELSEWHERE = ("tied_merge", "sorted_patterns", "eval_dropout", "own_forward_merge", "conv3d_merge")


def tied_weight_merge(context: Context) -> Iterator[Hit]:
    """FXL501: an adapted weight that another layer shares."""
    for p in context.adapted:
        held = context.holders.get(id(weight_of(context.model, p.site)), ())
        others = [n for n in held if n != p.site.weight_name]
        if others:
            yield Hit(
                f"its weight is tied to {shown(others)}: a merge changes that too, and the adapter "
                "does not",
                "leave it out, or untie the weights before training (clone one of them)",
                site=p.name,
            )


def untied_by_modules_to_save(context: Context) -> Iterator[Hit]:
    """FXL502: a module that modules_to_save copies out of a tie."""
    for s in context.plan.saved:
        module = context.model.get_submodule(s.name)
        others: list[str] = []
        for parameter in module.parameters():
            held = context.holders.get(id(parameter), ())
            others += [n for n in held if not n.startswith(f"{s.name}.")]
        if others:
            yield Hit(
                f"modules_to_save copies {s.name!r}, whose weight is tied to {shown(others)}: the "
                "copy trains and the other stays as it was",
                "train both or neither; a checkpoint that ties them again loses one of the two",
                subject=s.name,
            )


def merge_drift(context: Context) -> Iterator[Hit]:
    """FXL503: an update of which the merged dtype cannot hold enough."""
    dtype = DTYPES.get(context.options.dtype)
    if dtype is None:
        return
    for p in context.adapted:
        if p.kind not in ("Linear", "Conv1D", "Parameter") or not p.scaling:
            continue
        measured = _measured(context, p, dtype)
        lost = measured if measured is not None else _expected(context, p, dtype)
        if lost > MOST_LOST:
            how = "measured" if measured is not None else "expected after training"
            yield Hit(
                f"merging in {context.options.dtype} loses up to {100 * min(lost, 1):.0f} % of the "
                f"update to rounding ({how})",
                "merge in float32 and convert afterwards only if you must, or serve the adapter "
                "unmerged",
                site=p.name,
            )


def _expected(context: Context, p: PlannedSite, dtype: torch.dtype) -> float:
    """Returns the bound u / sqrt(3) * rms(W) / rms(sBA) for a B of the size `trained_b`."""
    rounding = torch.finfo(dtype).eps / 2 / math.sqrt(3)
    a = (
        1 / p.r
        if init_name(context.config) == "gaussian"
        else 1 / math.sqrt(3 * p.site.in_features)
    )
    update = abs(p.scaling) * context.options.trained_b * math.sqrt(p.r) * a
    return rounding * _rms(context, p) / update


def _rms(context: Context, p: PlannedSite) -> float:
    weight = weight_of(context.model, p.site)
    if weight.device.type != "meta" and weight.is_floating_point():
        return float(weight.detach().float().square().mean().sqrt())
    # What it was drawn with, where the model says so; else nn.Linear's own initialisation.
    drawn = getattr(getattr(context.model, "config", None), "initializer_range", None)
    return float(drawn) if drawn else 1 / math.sqrt(3 * p.site.in_features)


def _measured(context: Context, p: PlannedSite, dtype: torch.dtype) -> float | None:
    """Returns the lost share for an adapter that is there and trained; None for a new one."""
    if context.given is None or p.form != "branch" or p.variant:
        return None
    held: dict[str, Any] = dict(context.given.named_parameters())
    name = context.plan.adapter
    a = held.get(f"{p.prefix}.lora_A.{name}.weight")
    b = held.get(f"{p.prefix}.lora_B.{name}.weight")
    weight = weight_of(context.model, p.site)
    if a is None or b is None or "meta" in (a.device.type, weight.device.type):
        return None
    with torch.no_grad():
        update = p.scaling * (b.float() @ a.float())
        if not bool(update.any()):
            return None
        base = weight.detach().float()
        base = base.t() if p.kind == "Conv1D" else base
        kept = (base + update).to(dtype).float() - base.to(dtype).float()
        return float((kept - update).norm() / update.norm())


def merge_refused(context: Context) -> Iterator[Hit]:
    """FXL504: an adapter PEFT trains and cannot merge."""
    for p in context.adapted:
        why = _refusal(context, p)
        if why:
            yield Hit(
                f"PEFT cannot merge it: {why}",
                "serve it unmerged, or leave it out",
                site=p.name,
            )


def _refusal(context: Context, p: PlannedSite) -> str:
    if p.kind == "Parameter":
        return ""
    layer: Any = context.model.get_submodule(p.name)
    if is_conv(p.kind) and layer.groups > 1:
        return f"a convolution with groups={layer.groups}"
    if p.kind == "Conv3d" and tuple(layer.kernel_size)[:2] == (1, 1):
        return "a Conv3d whose first two kernel sizes are 1"
    if context.config.lora_bias and isinstance(layer, nn.Linear) and layer.bias is None:
        return "lora_bias on a layer without a bias"
    return ""


def peft_divergence(context: Context) -> Iterator[Hit]:
    """FXL505: what PEFT is known to compute, save or switch differently from LoRA."""
    for d in divergences(context.plan, context.model):
        if d.name in _ELSEWHERE:
            continue
        thread = f" ({d.thread})" if d.thread else ""
        for site in d.sites:
            yield Hit(
                f"{d.name}: {d.what}{thread}",
                "leave the layer out, or train and merge it with fxlora's own graph",
                site=site,
            )


_W = Severity.WARNING
RULES = (
    Rule(
        "FXL501", "tied-weight-merge", _W, tied_weight_merge,
        finds="An adapter on a layer whose weight is the very parameter another layer holds, such as "
        "an `lm_head` tied to the embedding. Told by the identity of the parameters.",
        why="The adapter changes one of the two users; merging it writes into the weight of both. "
        "The merged model embeds its tokens with the output layer's update.",
        example="""\
model = nn.Sequential(OrderedDict(a=nn.Linear(4, 4), b=nn.Linear(4, 4)))
model.b.weight = model.a.weight
report = lint(fxlora.trace(model), LoraConfig(r=2, target_modules=["b"]))""",
        fix="Leave the layer out, or untie the weights (clone one) before training.",
        threads=("huggingface/peft#2777", "huggingface/peft#2018", "huggingface/transformers#45127"),
    ),
    Rule(
        "FXL502", "untied-by-modules-to-save", _W, untied_by_modules_to_save,
        finds="A module in `modules_to_save` whose weight is tied to a module that is not part of it.",
        why="PEFT trains a copy, so the tie is gone in training: the embedding moves and the output "
        "layer does not. A later load ties them again and one of the two is lost.",
        example="""\
model = nn.Sequential(OrderedDict(a=nn.Linear(4, 4), up=nn.Linear(4, 4), b=nn.Linear(4, 4)))
model.b.weight = model.a.weight
config = LoraConfig(r=2, target_modules=["up"], modules_to_save=["b"])
report = lint(fxlora.trace(model), config)""",
        fix="Train both or neither. For a few new tokens use `trainable_token_indices`, which keeps "
        "the tie.",
        threads=("huggingface/peft#2018", "huggingface/transformers#45127"),
    ),
    Rule(
        "FXL503", "merge-drift", _W, merge_drift, needs="dtype",
        finds="With `--dtype bfloat16` or `float16`: adapters of whose update rounding takes more "
        "than a tenth when it is merged.",
        why="A merged weight w + d is rounded to nearest, so it is off by half a unit in the last "
        "place of w, not of d: at most u |w| with u = eps / 2 (2^-8 in bfloat16, 2^-11 in float16), "
        "and u |w| / sqrt(3) in the root mean square of an even error. Relative to the update the "
        "loss is at most\n\n"
        "    u / sqrt(3) * rms(W) / rms(s B A)\n\n"
        "For an adapter that is loaded with its weights it is measured: the norm of "
        "round(W + sBA) - round(W) - sBA over that of sBA. Before training rms(sBA) is taken as "
        "|s| sqrt(r) rms(A) rms(B), with A as it is drawn (kaiming_uniform(sqrt 5): 1 / sqrt(3 in)) "
        "and rms(B) = `trained-b`, 0.01 unless you set it (Adam moves a number by about its "
        "learning rate a step); rms(W) is the weight's own, or `initializer_range` on meta. The "
        "rounding model is the standard one (Higham, Accuracy and Stability of Numerical "
        "Algorithms, section 2.2).",
        example="""\
model = nn.Sequential(OrderedDict(up=nn.Linear(4096, 4096, bias=False, device="meta")))
config = LoraConfig(r=8, lora_alpha=4, target_modules=["up"])
report = lint(fxlora.trace(model), config, Settings(options=Options(dtype="bfloat16")))""",
        fix="Merge in float32, or serve the adapter unmerged.",
        threads=("huggingface/peft#1388",),
    ),
    Rule(
        "FXL504", "merge-refused", _W, merge_refused,
        finds="An adapter PEFT trains and then cannot merge: a grouped convolution, a Conv3d with a "
        "flat kernel, `lora_bias` on a layer without a bias.",
        why="`merge_and_unload` raises, after training.",
        example="""\
model = nn.Sequential(OrderedDict(conv=nn.Conv2d(8, 8, 3, groups=2)))
report = lint(fxlora.trace(model), LoraConfig(r=2, target_modules=["conv"]))""",
        fix="Serve it unmerged, or leave the layer out. `fxlora.merge` merges a flat Conv3d; a grouped "
        "convolution nobody can merge, because its adapter mixes all input channels.",
        threads=("huggingface/peft#2549",),
    ),
    Rule(
        "FXL505", "peft-divergence", _W, peft_divergence,
        finds="A layer or a setting for which PEFT is known to compute, save or switch something "
        "else than LoRA means: the table of [parity](../parity.md#where-pefts-number-or-behaviour-is-off).",
        why="Training works around it, and merging, reloading or another implementation does not.",
        example="""\
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=False)[0]

traced = fxlora.trace(Attention(), (torch.randn(2, 3, 8),))
report = lint(traced, LoraConfig(r=2, target_modules=["mha"]))""",
        fix="The message names the deviation and its thread; leave the layer out where it matters.",
        threads=("huggingface/peft#3774", "huggingface/peft#3697"),
    ),
)  # fmt: skip
