"""Adapters of a fused layer's parts -> one adapter of the whole layer, which PEFT can hold.

With parts i that have rows R_i of the layer and scaling s_i,

    s * B A,   A = [A_1; A_2; ...],   B[R_i, i] = (s_i / s) * B_i,   zero elsewhere

is the same map: the rank is the sum of the ranks, and s is the first part's scaling.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from fxlora.errors import CheckpointError
from fxlora.keys import PREFIX
from fxlora.matching import pattern_value
from fxlora.plan import Plan, PlannedSite


def as_whole_layers(
    plan: Plan, tensors: dict[str, torch.Tensor]
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Returns the configuration and the tensors of an adapter whose parts are put together.

    Args:
        plan: of the adapter; read.
        tensors: of the adapter, by their names on disk; read.

    Raises:
        CheckpointError: for what no PEFT adapter represents (single calls, uses past the module).
    """
    parts: dict[str, list[PlannedSite]] = {}
    for p in plan.adapted:
        if p.site.rows and p.kind != "MultiheadAttention" and ".call_" not in p.name:
            parts.setdefault(p.site.owner, []).append(p)
        elif p.beyond_peft:
            raise CheckpointError(
                f"as_peft=True: {p.beyond_peft}, which no PEFT adapter represents; save it without"
            )
    out = dict(tensors)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for owner, members in parts.items():
        inner = sum(p.r for p in members)
        ranks[owner] = inner
        alpha = members[0].scaling * (inner**0.5 if plan.config.use_rslora else inner)
        alphas[owner] = round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha
        out |= _together(owner, members, out)
    config = copy.deepcopy(plan.config)
    whole = {p.name for p in plan.adapted if not p.site.of}
    config.target_modules = {*whole, *parts}
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.rank_pattern = {**_short(ranks), **_used(config.rank_pattern, whole)}
    config.alpha_pattern = {**_short(alphas), **_used(config.alpha_pattern, whole)}
    return config, out


def _used(pattern: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Returns the entries that name a whole layer; those of parts are in the sums now."""
    return {
        k: v for k, v in pattern.items() if any(pattern_value({k: v}, n, None)[1] for n in names)
    }


def _together(
    owner: str, members: list[PlannedSite], tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Takes the parts' tensors out and returns the layer's."""

    def taken(p: PlannedSite, which: str) -> torch.Tensor | None:
        return tensors.pop(f"{PREFIX}{p.name}.{which}", None)

    down = [taken(p, "lora_A.weight") for p in members]
    up = [taken(p, "lora_B.weight") for p in members]
    biases = [taken(p, "lora_B.bias") for p in members]
    first = members[0]
    assert down[0] is not None
    assert up[0] is not None
    features = first.site.shape[1 if first.kind == "Conv1D" else 0]
    b = up[0].new_zeros(features, sum(p.r for p in members))
    bias = up[0].new_zeros(features)
    column = 0
    for p, part, more in zip(members, up, biases, strict=True):
        rows = torch.tensor([i for r in p.site.rows for i in r])
        ratio = p.scaling / first.scaling
        b[rows, column : column + p.r] = part * ratio  # type: ignore[operator]
        if more is not None:
            bias[rows] = more * ratio
        column += p.r
    made = {f"{PREFIX}{owner}.lora_A.weight": torch.cat(down), f"{PREFIX}{owner}.lora_B.weight": b}  # type: ignore[arg-type]
    if biases[0] is not None:
        made[f"{PREFIX}{owner}.lora_B.bias"] = bias
    return made


def _short(values: dict[str, Any]) -> dict[str, Any]:
    """Names a layer by its last name where all layers of that name have the same value."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        last = name.rpartition(".")[2]
        same = {v for n, v in values.items() if n.rpartition(".")[2] == last}
        out[last if len(same) == 1 else name.replace(".", r"\.")] = value
    return out
