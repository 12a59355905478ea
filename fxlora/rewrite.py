"""Traced graph x adapters -> a new GraphModule: base + scaling * B(A(dropout(x))) at every adapted call.

A rewritten graph is always made from the traced one: the adapters are hung into a second module
tree over the same tensors, and the nodes of the active ones are inserted into a copy of the graph.
So adding, switching off and deleting adapters are rewrites too, and none of them changes what it
was given.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxlora import branches, uses, weights
from fxlora.build import Held, Part, build
from fxlora.errors import AdapterError
from fxlora.facts import info
from fxlora.freezing import bias_trains
from fxlora.nodes import Entry, attribute
from fxlora.plan import Plan, PlannedSite, adapted_modules
from fxlora.plan import plan as make_plan
from fxlora.reach import checked
from fxlora.trace.bulk import copy_graph, uncollected
from fxlora.trace.shell import frozen_view, shell
from fxlora.trace.tracer import graph_module
from fxlora.tree import hang

_NO_QUIRKS: frozenset[str] = frozenset()


def rewrite(
    traced: GraphModule, plan: Plan | Any, *, reach: str | Iterable[str] = ()
) -> GraphModule:
    """Returns a new graph module in which the planned sites are base plus low-rank.

    Base weights are shared with the traced graph without copying and frozen in the new graph's
    view only; the model and the traced graph are not changed. Adapters hang below their site as
    PEFT names them: `...q_proj.lora_A.default.weight`. Under one seed they hold peft's bits.

    Args:
        traced: what `fxlora.trace` returned.
        plan: what `fxlora.plan` returned for it, or a `peft.LoraConfig`.
        reach: what to adapt that PEFT cannot, for a config; see `fxlora.plan`.

    Returns:
        A `torch.fx.GraphModule`; its nodes keep their names and meta, and inserted nodes carry
        `meta["role"]`, `meta["site"]` and `meta["adapter"]`.

    Raises:
        ConfigError: as `fxlora.plan`, when a config is given.
        AdapterError: when the graph has adapters already.
        ValueError: when the plan was made for another graph, or with another reach.

    >>> import torch, fxlora
    >>> from peft import LoraConfig
    >>> model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Linear(20, 5))
    >>> lora = fxlora.rewrite(fxlora.trace(model), LoraConfig(r=4, target_modules=["0"]))
    >>> [n for n, p in lora.named_parameters() if p.requires_grad]
    ['0.lora_A.default.weight', '0.lora_B.default.weight']
    """
    facts = info(traced)
    if facts.adapters:
        raise AdapterError(
            f"this graph is already rewritten, with {sorted(facts.adapters)}; a second adapter is "
            "fxlora.adapters.add(graph, config, name)"
        )
    made = plan if isinstance(plan, Plan) else make_plan(traced, plan, reach=reach)
    if checked(reach) not in ((), made.reach):
        raise ValueError(
            f"reach={checked(reach)} and a plan made with reach={made.reach}: give it to fxlora.plan"
        )
    check_plan(traced, made)
    with uncollected():
        return assemble(traced, {made.adapter: build(traced, made)}, (made.adapter,))


def rewrite_as_peft(traced: GraphModule, plan: Plan, quirks: frozenset[str]) -> GraphModule:
    """Returns the graph with named mistakes of PEFT's in it, to measure what they come to.

    Args:
        traced: what `fxlora.trace` returned.
        plan: for that graph.
        quirks: names out of `fxlora.divergences`.
    """
    held = {plan.adapter: build(traced, plan, quirks)}
    # torch's fused encoder kernel reads the weights past every adapter: the graph without them.
    active = () if "encoder_fast_path" in quirks else (plan.adapter,)
    return assemble(traced, held, active, quirks)


def check_plan(traced: GraphModule, plan: Plan) -> None:
    """Raises ValueError when a plan was made for another graph."""
    nodes = {id(n) for n in traced.graph.nodes}
    for p in plan:
        if any(id(c.node) not in nodes for c in p.site.calls):
            raise ValueError(
                f"the plan was made for another graph ({p.name!r} is called by nodes this one does "
                "not have): plan again with fxlora.plan(traced, config)"
            )


def assemble(
    base: GraphModule,
    adapters: dict[str, Held],
    active: tuple[str, ...],
    quirks: frozenset[str] = _NO_QUIRKS,
    live: GraphModule | None = None,
) -> GraphModule:
    """Makes a rewritten graph.

    Args:
        base: the traced graph; read.
        adapters: every adapter it holds; their parts are put into the tree as they are.
        active: the names of those it computes, in their order.
        quirks: named mistakes of PEFT's to reproduce.
        live: the rewritten graph this one follows, if any: its base tensors, moved, loaded or
            trained since, its modes and its hooks are taken over.

    Raises:
        AdapterError: when two active adapters cannot be computed together.
    """
    plans = {n: h.plan for n, h in adapters.items()}
    _check_together(adapters, active)
    root = shell(base, _views(base, [plans[n] for n in active]))
    if live is not None:
        follow(root, live)
    for name in active:
        _replace_weights(root, adapters[name], quirks)
    _part(root, [s.name for p in plans.values() for s in p.saved])
    for held in adapters.values():
        for path, part in held.parts.items():
            hang(root, path, part)
    graph, new = copy_graph(base.graph)
    _insert_sites(graph, root, [(n, plans[n]) for n in active], new, quirks)
    for name in active:
        _insert_extras(graph, root, plans[name])
    residuals = {n: h.residuals for n, h in adapters.items() if h.residuals}
    facts = replace(
        info(base), base=base, adapters=plans, active=tuple(active), residuals=residuals
    )
    return graph_module(root, graph, facts)


def _part(root: nn.Module, names: list[str]) -> None:
    """Gives a module of several names one of its own at each that is trained as a whole.

    PEFT wraps the child of one parent there; the module under its other names stays as it is.
    """
    seen = Counter(id(m) for _, m in root.named_modules(remove_duplicate=False)) if names else {}
    for name in names:
        owner, _, last = name.rpartition(".")
        held = root.get_submodule(owner)._modules
        module = held[last]
        if module is not None and seen[id(module)] > 1:
            held[last] = shell(module)


# ---- base weights ------------------------------------------------------------------------------


def _views(base: GraphModule, plans: list[Plan]) -> Callable[[nn.Parameter], nn.Parameter]:
    """Maps every base parameter to a view that trains where the active adapters' `bias` says so."""
    trains: set[int] = set()
    for plan in plans:
        adapted, bias = adapted_modules(plan.adapted), plan.config.bias
        whole = tuple(f"{s.name}." for s in plan.saved)
        trains |= {
            id(p) for n, p in base.named_parameters() if bias_trains(n, bias, adapted, whole)
        }

    def view(p: nn.Parameter) -> nn.Parameter:
        made = frozen_view(p)
        made.requires_grad = id(p) in trains
        return made

    return view


def follow(root: nn.Module, live: GraphModule) -> None:
    """Takes over what a rewritten graph's base tensors, modes and hooks are now.

    A load rebinds base tensors in the graph only, and `.to(...)` moves them; the traced graph knows
    nothing of either. A weight that an active adapter replaced stays the traced graph's own.

    Args:
        root: a module tree over the traced graph's tensors; written.
        live: a rewritten graph of the same trace; read.
    """
    facts = info(live)
    replaced = {n for a in facts.active for n in facts.residuals.get(a, {})}
    views: dict[int, nn.Parameter] = {}
    for name, module in root.named_modules():
        now = live.get_submodule(name)
        module.training = now.training
        for key, p in module._parameters.items():
            q = now._parameters.get(key)
            if p is None or q is None or type(q) is not nn.Parameter:
                continue
            if (f"{name}.{key}" if name else key) in replaced:
                p.data = p.data.to(device=q.device, dtype=q.dtype)
            elif id(q) not in views:
                views[id(q)] = nn.Parameter(q.detach(), requires_grad=p.requires_grad)
            module._parameters[key] = views.get(id(q), p)
        for key in module._buffers:
            module._buffers[key] = now._buffers.get(key, module._buffers[key])
        for key in [k for k in module.__dict__ if "hooks" in k]:
            if key in now.__dict__:
                module.__dict__[key] = copy.copy(now.__dict__[key])


def _replace_weights(root: nn.Module, held: Held, quirks: frozenset[str]) -> None:
    """Puts in the base weights an initialisation left behind, at the sites they belong to only."""
    for name, value in held.residuals.items():
        owner, _, last = name.rpartition(".")
        module = root.get_submodule(owner)
        old = module._parameters[last]
        made = nn.Parameter(value, requires_grad=False)
        module._parameters[last] = made
        if "tied_base_changed" in quirks:
            for m in root.modules():
                for key, p in m._parameters.items():
                    m._parameters[key] = made if p is old else p


# ---- nodes -------------------------------------------------------------------------------------


def _insert_sites(
    graph: Graph, root: nn.Module, plans: list[tuple[str, Plan]], new: dict[Node, Node],
    quirks: frozenset[str],
) -> None:  # fmt: skip
    together: dict[str, list[Entry]] = {}
    for name, plan in plans:
        for p in plan.adapted:
            together.setdefault(f"{p.kind == 'Parameter'} {p.name}", []).append((name, p))
    # Parameters first: they open the call of a layer, whose branch then stands behind the new call.
    for _, entries in sorted(together.items(), key=lambda item: not item[0].startswith("True")):
        planned = entries[0][1]
        if planned.form == "delta":
            _insert_deltas(graph, root, entries, new, quirks)
            continue
        for call in planned.site.calls:
            there = [e for e in entries if e[1].reaches(call)]
            if there and call.node.op == "call_module":
                branches.insert_branches(graph, root, new[call.node], there, quirks)
        _insert_uses(graph, root, entries)


def _insert_deltas(
    graph: Graph, root: nn.Module, entries: list[Entry], new: dict[Node, Node],
    quirks: frozenset[str],
) -> None:  # fmt: skip
    planned = entries[0][1]
    if planned.kind == "Parameter":
        for call in planned.site.calls:
            if call.node.op == "call_module" and any(e[1].reaches(call) for e in entries):
                new[call.node] = weights.open_layer(graph, new[call.node], root)
    everywhere = [e for e in entries if e[1].everywhere]
    if everywhere:
        if len(everywhere) < len(entries):
            raise AdapterError(
                f"{planned.name!r} is adapted by {[n for n, _ in entries]}, and only by some of them "
                "past its module (reach='uses'); plan them with the same reach"
            )
        _insert_uses(graph, root, entries)
        return
    names = planned.weight_names
    for node in [n for n in graph.nodes if n.op == "get_attr" and n.target in names]:
        weights.insert_delta(graph, root, node, entries, quirks)


def _insert_uses(graph: Graph, root: nn.Module, entries: list[Entry]) -> None:
    everywhere = [e for e in entries if e[1].everywhere]
    if everywhere:
        uses.insert_uses(graph, root, everywhere)


def _insert_extras(graph: Graph, root: nn.Module, plan: Plan) -> None:
    for saved in plan.saved:
        weights.retarget(graph, saved.name, f"{saved.name}.modules_to_save.{plan.adapter}")
    for rows in plan.tokens:
        owner = rows.tied_to or rows.name
        delta = f"{owner}.token_adapter.trainable_tokens_delta.{plan.adapter}"
        weights.insert_rows(graph, root, rows.name, delta, rows.indices)


# ---- what goes together --------------------------------------------------------------------------


def _check_together(adapters: dict[str, Held], active: Iterable[str]) -> None:
    """Refuses two active adapters that each claim the same weight for themselves."""
    claimed: dict[str, str] = {}
    for name in active:
        held = adapters[name]
        claims = [*held.residuals, *(s.name for s in held.plan.saved), *_token_claims(held.plan)]
        for claim in dict.fromkeys(claims):
            if claim in claimed:
                raise AdapterError(
                    f"adapters {claimed[claim]!r} and {name!r} both replace {claim!r}; only one of "
                    "them can be active at a time"
                )
            claimed[claim] = name
    for name in active:
        whole = [s.name for s in adapters[name].plan.saved]
        rows = [t.name for t in adapters[name].plan.tokens]
        for other in active:
            if other != name:
                _check_apart(name, (whole, rows), other, adapters[other].plan)


def _check_apart(name: str, taken: tuple[list[str], list[str]], other: str, plan: Plan) -> None:
    """Refuses an adapter inside a module, or on an embedding, that another one replaces."""
    whole, rows = taken
    theirs = [p.name for p in plan.adapted] + [t.name for t in plan.tokens]
    hit = next((t for t in theirs for w in whole if t == w or t.startswith(f"{w}.")), None)
    hit = hit or next((p.name for p in plan.adapted if p.name in rows), None)
    if hit is not None:
        raise AdapterError(
            f"adapter {name!r} trains {hit!r} itself (modules_to_save or trainable rows), and "
            f"{other!r} adapts it; only one of them can be active at a time"
        )


def _token_claims(plan: Plan) -> list[str]:
    return [f"row {i} of {t.name}" for t in plan.tokens for i in t.indices]


# ---- taking a rewritten graph apart --------------------------------------------------------------


def part_paths(plan: Plan) -> list[str]:
    """Returns the paths of everything a plan's adapter hangs into a graph."""
    paths: list[str] = []
    for p in plan.adapted:
        assert p.adapter is not None
        names = {n.removesuffix(".weight").removesuffix(".bias") for n, _ in p.adapter.parameters}
        names.add("lora_dropout.{}")
        paths += [f"{p.prefix}.{n.format(plan.adapter)}" for n in sorted(names)]
    paths += [f"{s.name}.modules_to_save.{plan.adapter}" for s in plan.saved]
    for t in plan.tokens:
        if not t.tied_to:
            paths.append(f"{t.name}.token_adapter.trainable_tokens_delta.{plan.adapter}")
    return paths


def held_of(lora: GraphModule, name: str, trains: bool | None) -> Held:
    """Returns one adapter of a rewritten graph, as views over the same numbers.

    Args:
        lora: a rewritten graph; read.
        name: of the adapter.
        trains: whether the views require grad (where the adapter's plan has them train); None for
            the flags they have.
    """
    facts = info(lora)
    plan: Plan = facts.adapters[name]
    frozen = {
        f"{p.prefix}.{n.format(name)}"
        for p in plan.adapted
        if p.adapter is not None
        for n in p.adapter.frozen
    }

    def flag(path: str, p: nn.Parameter) -> bool:
        return p.requires_grad if trains is None else trains and path not in frozen

    def view(path: str, part: Part) -> Part:
        if isinstance(part, nn.Parameter):
            return nn.Parameter(part.detach(), requires_grad=flag(path, part))
        names = {id(p): f"{path}.{n}" for n, p in part.named_parameters()}
        return shell(
            part,
            lambda p: nn.Parameter(p.detach(), requires_grad=flag(names[id(p)], p)),
        )

    residuals = dict(facts.residuals.get(name, {}))
    if name in facts.active:
        residuals = {n: attribute(lora, n).detach() for n in residuals}
    held = Held(plan, residuals=residuals)
    order = {path: i for i, path in enumerate(_hung(lora))}
    for path in sorted(part_paths(plan), key=lambda p: order.get(p, 0)):
        try:
            part = attribute(lora, path)
        except AttributeError:
            continue  # an embedding has no dropout of its own kind
        held.parts[path] = view(path, part)
    return held


def _hung(lora: nn.Module) -> list[str]:
    """Returns every module and parameter path in the order of the tree."""
    names: list[str] = []
    for name, module in lora.named_modules(remove_duplicate=False):
        names.append(name)
        names += [f"{name}.{n}" for n in module._parameters]
    return names


def sites_of(plan: Plan) -> dict[str, PlannedSite]:
    """Returns the adapted sites of a plan by the name of their weight."""
    return {p.site.weight_name: p for p in plan.adapted}


def trained_values(lora: GraphModule, name: str) -> dict[str, torch.Tensor]:
    """Returns the parameters of one adapter by their names in the graph, in order."""
    wanted = tuple(part_paths(info(lora).adapters[name]))
    return {
        n: p.detach()
        for n, p in lora.named_parameters()
        if any(n == w or n.startswith(f"{w}.") for w in wanted)
    }
