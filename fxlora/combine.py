"""Weighted combinations of adapters, factor by factor or through an SVD of what they add up to."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from fxlora import dense
from fxlora.build import Held, build
from fxlora.config import init_name
from fxlora.errors import AdapterError
from fxlora.layers import is_conv
from fxlora.plan import Plan, PlannedSite
from fxlora.plan import plan as make_plan

FACTORED = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
SVD = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


@dataclass(frozen=True)
class _How:
    """How to combine."""

    kind: str
    density: float | None
    majority_sign_method: str

    def __call__(self, tensors: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        """Returns one tensor of several, by peft's own functions (peft.utils.merge_utils)."""
        from peft.utils import merge_utils as peft_merge

        name = self.kind.removesuffix("_svd")
        made: torch.Tensor
        if name in ("svd", "linear"):
            made = peft_merge.task_arithmetic(tensors, weights)
        elif name in ("ties", "dare_ties"):
            function = getattr(peft_merge, name)
            made = function(tensors, weights, self.density, self.majority_sign_method)
        else:
            made = getattr(peft_merge, name)(tensors, weights, self.density)
        return made


def combined(
    base: GraphModule,
    adapters: dict[str, Held],
    weights: dict[str, float],
    name: str,
    how: str,
    *,
    svd_rank: int | None,
    density: float | None,
    majority_sign_method: str,
) -> Held:
    """Makes one adapter of several.

    Args:
        base: the traced graph.
        adapters: those to combine.
        weights: adapter name -> weight.
        name: of the new one.
        how: the kind of combination.
        svd_rank, density, majority_sign_method: as `fxlora.adapters.combine` has them.

    Raises:
        AdapterError: when these adapters do not combine in this way.

    Source: peft.tuners.lora.model.LoraModel.add_weighted_adapter.
    """
    plans = [h.plan for h in adapters.values()]
    how = "linear" if len(plans) == 1 else how
    _check(plans, how, density)
    rank = _rank(plans, how, svd_rank)
    plan = make_plan(base, _config(plans, rank), name)
    held = build(base, plan)
    step = _How(how, density, majority_sign_method)
    for planned in plan.adapted:
        used = [(h, weights[n]) for n, h in adapters.items() if h.plan[planned.name].adapted]
        pair = _pair(used, planned, step, rank)
        for which, tensor in zip(_names(planned), pair, strict=True):
            part: Any = held.parts[f"{planned.prefix}.{which}.{name}"]
            target = part if isinstance(part, torch.Tensor) else part.weight
            if how == "cat":  # peft writes these into an adapter it has not upcast
                target.data = target.data.to(_dtype(base, planned))
            _fill(target, tensor)
    for part in held.parts.values():
        part.requires_grad_(False)
    return held


def _dtype(base: GraphModule, planned: PlannedSite) -> torch.dtype:
    owner, _, name = planned.site.weight_name.rpartition(".")
    dtype: torch.dtype = getattr(base.get_submodule(owner), name).dtype
    return dtype


def _names(planned: PlannedSite) -> tuple[str, str]:
    if planned.form == "rows":
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A", "lora_B"


def _fill(target: torch.Tensor, values: torch.Tensor) -> None:
    """Writes values into the corner of a tensor: a site may have less rank than the whole has room for."""
    with torch.no_grad():
        target.zero_()
        target[tuple(slice(0, n) for n in values.shape)] = values.to(target.dtype)


def _pair(
    used: list[tuple[Held, float]], planned: PlannedSite, step: _How, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    found = [(h, h.plan[planned.name], w) for h, w in used]
    if step.kind == "cat":
        a = [dense.factors(h, p)[0] * w * p.scaling for h, p, w in found]
        b = [dense.factors(h, p)[1] for h, p, _ in found]
        return torch.cat(a, dim=0), torch.cat(b, dim=1)
    if step.kind in SVD:
        deltas = [dense.delta(h, p) for h, p, _ in found]
        total = step(deltas, torch.tensor([w for _, _, w in found]))
        return _factored(total, planned, rank)
    scaled = [w * p.scaling for _, p, w in found]
    # The sign goes on one side only: on both it would cancel itself.
    roots = [math.sqrt(abs(s)) for s in scaled]
    signed = [r if s >= 0 else -r for r, s in zip(roots, scaled, strict=True)]
    factors = [dense.factors(h, p) for h, p, _ in found]
    dtype = factors[0][0].dtype
    made = [
        step([f[i] for f in factors], torch.tensor(w)).to(dtype)
        for i, w in enumerate((signed, roots))
    ]
    return made[0], made[1]


def _factored(
    total: torch.Tensor, planned: PlannedSite, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = total.shape
    flat = total.flatten(1) if is_conv(planned.kind) else total
    if planned.kind in ("Conv1D", "Embedding"):
        flat = flat.t()
    most = min(flat.shape)
    if rank > most:
        raise AdapterError(
            f"svd_rank={rank} at {planned.name!r}, whose weight of {tuple(flat.shape)} has rank {most} "
            f"at most; give svd_rank={most} or less"
        )
    u, s, vh = torch.linalg.svd(flat, full_matrices=True)
    b, a = u[:, :rank] @ torch.diag(s[:rank]), vh[:rank, :]
    if is_conv(planned.kind):
        a = a.reshape(-1, *shape[1:])
        b = b.reshape(*b.shape, *(1,) * (len(shape) - 2))
    return a, b


# ---- checks ------------------------------------------------------------------------------------


def _check(plans: Sequence[Plan], how: str, density: float | None) -> None:
    if how not in (*FACTORED, *SVD, "cat"):
        raise AdapterError(f"how={how!r} is none of {[*SVD[:1], 'cat', *FACTORED, *SVD[1:]]}")
    if not plans:
        raise AdapterError("name at least one adapter to combine")
    pruning = how not in ("svd", "linear", "cat")
    if pruning and (density is None or not 0 < density <= 1):
        raise AdapterError(
            f"how={how!r} keeps a share of the numbers: give density, 0 < density <= 1"
        )
    for plan in plans:
        if plan.config.target_parameters:
            raise AdapterError(f"{plan.adapter!r} adapts parameters, which PEFT does not combine")
        odd = next((p for p in plan.adapted if p.variant), None)
        if odd is not None:
            raise AdapterError(
                f"{plan.adapter!r} is {odd.variant} at {odd.name!r}; a combination of B A says nothing "
                "of its other parameters"
            )
    saved = [s.name for plan in plans for s in plan.saved]
    if len(set(saved)) != len(saved):
        raise AdapterError("two of the adapters train the same module as a whole (modules_to_save)")
    kinds = {isinstance(p.config.target_modules, str) for p in plans}
    if len(kinds) > 1:
        raise AdapterError("some adapters' target_modules are a regular expression and some a list")


def _rank(plans: Sequence[Plan], how: str, svd_rank: int | None) -> int:
    ranks: list[int] = [max([p.config.r, *p.config.rank_pattern.values()]) for p in plans]
    if how in FACTORED:
        if len(set(ranks)) != 1:
            raise AdapterError(
                f"how={how!r} needs equal ranks, and they are {ranks}; 'svd' does not"
            )
        return ranks[0]
    return sum(ranks) if how == "cat" else svd_rank or max(ranks)


def _config(plans: Sequence[Plan], rank: int) -> Any:
    made = copy.deepcopy(plans[0].config)
    targets = [p.config.target_modules for p in plans]
    if isinstance(targets[0], str):
        made.target_modules = "|".join(f"({t})" for t in targets)
    else:
        made.target_modules = set().union(*targets)
    made.r = made.lora_alpha = rank
    made.rank_pattern, made.alpha_pattern = {}, {}
    # The first adapter's initialisation, for its draws stand before DARE's; unless it would change
    # the base weights once more.
    if init_name(made) not in (True, False, "gaussian", "orthogonal"):
        made.init_lora_weights = True
    return made
