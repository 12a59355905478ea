"""Rules 3xx: ranks and sizes that do not fit the layer."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fxlora.layers import is_conv
from fxlora.lint.context import Context
from fxlora.lint.finding import Hit, Rule, Severity
from fxlora.plan import PlannedSite


def largest_rank(p: PlannedSite) -> int:
    """Returns the rank no update of the layer's weight can exceed."""
    if is_conv(p.kind):
        out, *rest = p.site.shape  # (out, in / groups, kernel...)
        return min(out, math.prod(rest))
    return min(p.site.in_features, p.site.out_features)


def rank_above_layer(context: Context) -> Iterator[Hit]:
    """FXL301: more rank than the weight has."""
    for p in context.adapted:
        most = largest_rank(p)
        if p.r > most:
            yield Hit(
                f"r={p.r} on a weight of {' x '.join(map(str, p.site.shape))}, whose updates have "
                f"rank {most} at most",
                f"rank_pattern={{{_last(p)!r}: {max(1, most // 2)}}}, or train the layer as a "
                "whole with modules_to_save",
                site=p.name,
            )


def _last(p: PlannedSite) -> str:
    """Returns a rank_pattern key for a site: the end of its name that says something."""
    parts = p.name.split(".")
    return ".".join(parts[-2:] if p.kind == "Parameter" or parts[-1].isdigit() else parts[-1:])


def adapter_larger_than_layer(context: Context) -> Iterator[Hit]:
    """FXL302: an adapter with more parameters than the weight it adapts."""
    for p in context.adapted:
        weight = math.prod(p.site.shape)
        if p.adapter is not None and p.adapter.numel > weight and p.r <= largest_rank(p):
            yield Hit(
                f"the adapter has {p.adapter.numel:,} parameters and the weight {weight:,}",
                "take a lower rank there with rank_pattern, or train the layer as a whole with "
                "modules_to_save",
                site=p.name,
            )


RULES = (
    Rule(
        "FXL301", "rank-above-layer", Severity.WARNING, rank_above_layer,
        finds="A rank above the smaller dimension of the weight (of a convolution, of the weight "
        "flattened per output channel).",
        why="An update of an `out x in` matrix has rank `min(out, in)` at most. The rest of the "
        "adapter is parameters without freedom: a classifier with two labels and r=8 has four times "
        "more of them than its weight.",
        example="""\
model = nn.Sequential(OrderedDict(up=nn.Linear(64, 64), classifier=nn.Linear(64, 2)))
report = lint(fxlora.trace(model), LoraConfig(r=8, target_modules=["up", "classifier"]))""",
        fix="Give the layer a lower rank with `rank_pattern`, or train it as a whole with "
        "`modules_to_save`, as PEFT's task types do with heads.",
        threads=("huggingface/peft#1388",),
    ),
    Rule(
        "FXL302", "adapter-larger-than-layer", Severity.WARNING, adapter_larger_than_layer,
        finds="An adapter with more parameters than the weight it adapts, at a rank the weight could "
        "have.",
        why="r (in + out) is more than in x out from r = in x out / (in + out) on: training the "
        "layer itself is cheaper and stronger. Grouped and depthwise convolutions get there at "
        "small ranks, because A is not grouped.",
        example="""\
model = nn.Sequential(OrderedDict(up=nn.Linear(64, 64), small=nn.Linear(12, 12)))
report = lint(fxlora.trace(model), LoraConfig(r=8, target_modules=["small"]))""",
        fix="Take a lower rank there, or train the layer as a whole with `modules_to_save`.",
        threads=("huggingface/peft#2549", "huggingface/peft#1388"),
    ),
)  # fmt: skip
