"""Targets that name parts of fused layers: what they are, and what each way to reach them costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch.fx import GraphModule

from fxlora import layers
from fxlora.errors import ConfigError
from fxlora.facts import info
from fxlora.matching import pattern_value
from fxlora.plan import Plan
from fxlora.sites import Site
from fxlora.slices import Slice, slices
from fxlora.text import count

# What the parts of fused projections are called where they are layers of their own.
_SPLIT_NAMES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "q", "query", "wq", "q_lin", "to_q", "query_proj"),
    "k": ("k_proj", "k", "key", "wk", "k_lin", "to_k", "key_proj"),
    "v": ("v_proj", "v", "value", "wv", "v_lin", "to_v", "value_proj"),
    "gate": ("gate_proj", "gate", "w1", "wi_0"),
    "up": ("up_proj", "up", "w3", "wi_1"),
}


def slice_names(part: str) -> tuple[str, ...]:
    """Returns what a part of a fused projection is called where it is a layer of its own.

    >>> "q_proj" in slice_names("q"), slice_names("0")
    (True, ())
    """
    return _SPLIT_NAMES.get(part, ())


def slices_named(traced: GraphModule, name: str) -> tuple[Slice, ...]:
    """Returns the slices a name stands for that is no layer's: `q_proj` of a fused `qkv_proj`.

    Args:
        traced: what `fxlora.trace` returned; read.
        name: a name or dotted suffix, in the model's words (`self_attn.q_proj`) or as the fused
            layer's part (`qkv_proj.q`).
    """
    return tuple(s for s in slices(traced) if _stands_for(name, s))


def _stands_for(name: str, s: Slice) -> bool:
    if s.name == name or s.name.endswith(f".{name}"):
        return True
    owner = s.site.rpartition(".")[0]
    own = (f"{owner}.{n}" if owner else n for n in slice_names(s.part))
    return any(n == name or n.endswith(f".{name}") for n in own)


def fused_advice(traced: GraphModule, plan: Plan) -> list[str]:
    """Says which targets match nothing because they are slices of a fused weight, and what to do.

    Args:
        traced: what `fxlora.trace` returned; read.
        plan: for that graph.

    Returns:
        For each fused layer one sentence that names its slices; then the alternatives with the
        parameters each would train. Empty when no target names a slice.
    """
    config = plan.config
    targets = config.target_modules
    if not plan.targets or targets is None or isinstance(targets, str):
        return []
    names = [
        n
        for p in plan
        if p.kind != "Parameter"
        for n in (p.name, *(p.site.aliases if p.site.rows else ()))
    ]
    every = slices(traced)
    asked: dict[str, list[Slice]] = {}
    for target in plan.targets:
        if not any(n == target or n.endswith(f".{target}") for n in names):
            found = [s for s in every if _stands_for(target, s)]
            if found:
                asked[target] = found
    if not asked:
        return []
    wanted = {s.name: s for found in asked.values() for s in found}
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[str]] = {}
    for site in dict.fromkeys(s.site for s in every if s.name in wanted):
        parts = tuple((s.part, s.where) for s in every if s.site == site)
        groups.setdefault((site.rpartition(".")[2], parts), []).append(site)
    out = [_fused_sentence(leaf, parts, at, asked) for (leaf, parts), at in groups.items()]
    return [*out, *_alternatives(traced, plan, wanted, every)]


def _fused_sentence(
    leaf: str,
    parts: tuple[tuple[str, str], ...],
    at: list[str],
    asked: Mapping[str, list[Slice]],
) -> str:
    inside = set(at)
    hit = {t: f[0].part for t, f in asked.items() if any(s.site in inside for s in f)}
    order = [p for p, _ in parts]
    names = sorted(hit, key=lambda t: (order.index(hit[t]) if hit[t] in order else 0, t))
    rows = ", ".join(f"{part} is rows {where}" for part, where in parts)
    return (
        f"{_listed(names)} {'match' if len(names) > 1 else 'matches'} nothing: "
        f"{'they are slices' if len(names) > 1 else 'it is a slice'} of {leaf} ({rows}), fused in "
        f"{count(len(at), 'layer')}"
    )


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _alternatives(
    traced: GraphModule, plan: Plan, wanted: Mapping[str, Slice], every: Iterable[Slice]
) -> list[str]:
    by_name = {p.name: p for p in plan}
    asked = {s.site for s in wanted.values()}
    fused = {p.name: p for p in plan if p.name in asked}
    new = {n: p for n, p in fused.items() if not p.adapted}
    leaves = list(dict.fromkeys(n.rpartition(".")[2] for n in new))
    if not new:
        whole_ones = list(dict.fromkeys(n.rpartition(".")[2] for n in fused))
        return [f"{', '.join(whole_ones)} is adapted as a whole already, these slices with it"]
    more = [s.name for s in every if s.site in new and s.name not in wanted]
    try:
        # Attention that is adapted takes its output projection with it.
        taken = [by_name[m] for n in new for m in (n, f"{n}.out_proj") if m in by_name]
        whole = sum(_cost(p.site, p.name, plan, traced) for p in taken)
        split = sum(
            _cost(_cut(by_name[s.site].site, s), s.site, plan, traced)
            for s in wanted.values()
            if s.site in new
        )
    except ConfigError as e:
        return [f"target {','.join(leaves)} instead of the slices; with this configuration: {e}"]
    extra = sorted({n.rpartition(".")[2] for n in more})
    rest = f" (and adapts {', '.join(extra)} as well)" if extra else ""
    return [
        f"with peft: target {','.join(leaves)}: +{whole:,} parameters, {plan.trainable + whole:,} "
        f"trainable; one lora_A for all slices of a layer{rest}",
        f"split: one adapter for each slice, as where they are layers of their own: +{split:,} "
        f"parameters, {plan.trainable + split:,} trainable; peft cannot do this on a fused layer: "
        'fxlora.plan(traced, config, reach="slices")',
    ]


def _cut(site: Site, s: Slice) -> Site:
    return replace(site, name=s.name, out_features=s.out_features, of=site.name, rows=s.rows)


def _cost(site: Site, owner: str, plan: Plan, traced: GraphModule) -> int:
    """Returns the parameters that would train at a site (of the layer `owner`) the plan leaves out."""
    config = plan.config
    r, _ = pattern_value(config.rank_pattern, site.name, config.r)
    module = info(traced).model.get_submodule(owner)
    made = layers.adapter_shape(site, module, config, r, 1).trainable
    only = config.bias.endswith("_only") and site.bias
    return made + (site.out_features if only else 0)
