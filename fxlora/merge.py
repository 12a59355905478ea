"""A rewritten graph -> a plain graph with the active adapters in its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxlora import dense
from fxlora.build import Held
from fxlora.divergences import maps_by_weight
from fxlora.errors import AdapterError
from fxlora.facts import info
from fxlora.layers import is_quantized
from fxlora.plan import PlannedSite
from fxlora.rewrite import follow, held_of
from fxlora.trace.bulk import copy_graph
from fxlora.trace.shell import shell
from fxlora.trace.tracer import graph_module
from fxlora.weights import inside


def merge(lora: GraphModule, safe: bool = False) -> GraphModule:
    """Returns a plain graph, without adapters, that computes what the rewritten one does.

    Every adapted layer gets a weight of its own, W + s B A; the graph it came from keeps its
    adapters, so to unmerge is to go on using that. A weight that is tied to another layer's is
    replaced at the adapted layer only. The result equals the rewritten graph in eval mode to
    rounding, never in every bit: one product of sums is not two sums of products.

    Args:
        lora: a rewritten graph; read.
        safe: whether to refuse a merged weight that is not finite, as PEFT's `safe_merge`.

    Returns:
        A `torch.fx.GraphModule`; untouched parameters, and modules_to_save, share the storage of the
        rewritten graph's, and have flags of their own.

    Raises:
        AdapterError: when no adapter is active, when a layer cannot hold what its adapter computes
            (a grouped convolution, `lora_bias` without a base bias), or for `safe`.

    >>> import torch, fxlora
    >>> from peft import LoraConfig
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    >>> lora = fxlora.rewrite(fxlora.trace(model), LoraConfig(target_modules=["0"]))
    >>> [n for n, _ in fxlora.merge(lora).named_parameters()]
    ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    facts = info(lora)
    if not facts.active:
        raise AdapterError(
            "no adapter is active, so there is nothing to merge: fxlora.adapters.set_active(lora, "
            "names) makes some active"
        )
    held = {n: held_of(lora, n, False) for n in facts.active}
    root = shell(facts.base, lambda p: nn.Parameter(p.detach(), requires_grad=p.requires_grad))
    follow(root, lora)
    for h in held.values():
        _residuals(root, h)
    graph, _ = copy_graph(facts.base.graph)
    bases: dict[str, torch.Tensor] = {}
    for h in held.values():
        for planned in h.plan.adapted:
            if planned.site.weight_name not in bases:
                _set_apart(root, graph, planned)
            _merge_site(root, h, planned, bases, safe)
    for h in held.values():
        _merge_extras(root, h)
    notes = (*facts.notes, f"merged: {', '.join(facts.active)}", *_untied(facts.base, root))
    facts = replace(info(facts.base), notes=notes)
    return graph_module(root, graph, facts)


def _untied(base: GraphModule, root: nn.Module) -> Iterator[str]:
    """Yields a note for each tied parameter that is two now: a tied model cannot hold both."""
    names: dict[int, list[str]] = {}
    for name, p in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    now = dict(root.named_parameters(remove_duplicate=False))
    for first, *others in names.values():
        apart = [n for n in others if n in now and first in now and now[n] is not now[first]]
        if apart:
            yield (
                f"{apart[0]} is no longer {first}, to which the model ties it: a tied model loads one "
                "of the two into both. Load the state dict into a model with untied weights "
                "(transformers: tie_word_embeddings=False)"
            )


def _residuals(root: nn.Module, held: Held) -> None:
    for name, residual in held.residuals.items():
        _set(root, name, residual)


def _set(root: nn.Module, name: str, value: torch.Tensor) -> None:
    """Puts a tensor in the place of one module's parameter; other holders of it keep theirs."""
    owner, _, last = name.rpartition(".")
    module = root.get_submodule(owner)
    old = module._parameters[last]
    trains = old is not None and old.requires_grad
    module._parameters[last] = nn.Parameter(value.detach(), requires_grad=trains)


def _set_apart(root: nn.Module, graph: Graph, planned: PlannedSite) -> None:
    """Gives an adapted layer a module of its own, so that what bypasses the adapter keeps the base.

    A call by another name of the module, and a read of its weight past the module, are not adapted;
    after a merge they must still find the base weight.
    """
    if planned.form == "delta" and not planned.everywhere:
        _part_alias(root, planned)
    if planned.kind == "Parameter" and not planned.everywhere:
        _read_apart(root, graph, planned)
    if planned.form == "delta" or planned.everywhere:
        return
    parent, _, last = planned.site.owner.rpartition(".")
    layer = root.get_submodule(planned.site.owner)
    aliases = [n for n, m in root.named_modules(remove_duplicate=False) if m is layer]
    names = planned.weight_names
    reads = [n for n in graph.nodes if n.op == "get_attr" and n.target in names]
    if len(aliases) < 2 and not reads:
        return
    apart = shell(layer)
    for node in reads:
        node.target = f"{planned.site.owner}.bypassed_weight"
        if "bypassed_weight" not in apart._parameters:
            apart.register_parameter("bypassed_weight", apart._parameters["weight"])
    root.get_submodule(parent)._modules[last] = apart


def _part_alias(root: nn.Module, planned: PlannedSite) -> None:
    """Gives the module whose weights an adapter changes one of its own, where it has other names."""
    parent, _, last = planned.scope.rpartition(".")
    module = root.get_submodule(planned.scope)
    aliases = [n for n, m in root.named_modules(remove_duplicate=False) if m is module]
    if any(n not in planned.scopes for n in aliases):
        root.get_submodule(parent)._modules[last] = shell(module)


def _read_apart(root: nn.Module, graph: Graph, planned: PlannedSite) -> None:
    """Lets what reads a parameter outside its module's calls, where no adapter is, keep the base."""
    if not any(planned.reaches(c) for c in planned.site.calls):
        return  # nothing is merged
    name = planned.site.weight_name
    owner, _, last = name.rpartition(".")
    names = planned.weight_names
    for node in [n for n in graph.nodes if n.op == "get_attr" and n.target in names]:
        outside = [u for u in node.users if not inside(u, planned.scopes)]
        if not outside:
            continue
        module = root.get_submodule(owner)
        if f"bypassed_{last}" not in module._parameters:
            module.register_parameter(f"bypassed_{last}", module._parameters[last])
        with graph.inserting_after(node):
            kept = graph.get_attr(f"{owner}.bypassed_{last}")
        kept.meta = dict(node.meta)
        for user in outside:
            user.replace_input_with(node, kept)
        if not node.users:
            graph.erase_node(node)


def _merge_site(
    root: nn.Module, held: Held, planned: PlannedSite, bases: dict[str, torch.Tensor], safe: bool
) -> None:
    calls = planned.site.calls
    if planned.site.of and not planned.site.rows:
        raise AdapterError(
            f"{planned.site.owner!r} has another adapter at every call (reach='calls'), and one "
            "weight cannot hold them all; keep the adapters beside it"
        )
    owner, _, _ = planned.site.weight_name.rpartition(".")
    if is_quantized(root.get_submodule(owner)):
        raise AdapterError(
            f"{planned.name!r} is a quantized {planned.site.type_name}: merging would dequantize and "
            "quantize its weight again and lose more than the adapter adds. Load the base in "
            "floating point and merge there"
        )
    if planned.kind == "Embedding" and getattr(root.get_submodule(owner), "max_norm", None):
        raise AdapterError(
            f"{planned.name!r} is an Embedding with max_norm, which would rescale the merged rows; "
            "keep the adapter beside it"
        )
    named_only = planned.form == "branch" or planned.kind == "Parameter"
    if named_only and calls and not any(planned.reaches(c) for c in calls):
        return  # adapted in name only: no call goes through the layer, so no output has it
    name = planned.site.weight_name
    owner, _, last = name.rpartition(".")
    layer: Any = root.get_submodule(owner)
    if planned.kind == "Linear" and planned.form == "branch":
        layer = _plain(root, owner, layer)
    if layer._parameters.get(last) is None:
        raise AdapterError(
            f"{planned.name!r} computes its weight anew (a parametrization); a merged one would be "
            "lost. Remove the parametrization, then trace"
        )
    weight = getattr(layer, last)
    merged = dense.merged_weight(held, planned, weight, bases.setdefault(name, weight))
    _check_finite(planned, held, merged, safe)
    _set(root, name, merged)
    if held.plan.config.lora_bias and planned.form == "branch":
        _merge_bias(root, held, planned, safe)


def _plain(root: nn.Module, owner: str, layer: Any) -> Any:
    """Returns a layer a merged weight can be put in: a parametrized Linear becomes a plain one."""
    if maps_by_weight(layer):
        return layer
    if type(layer).forward is not nn.Linear.forward and not _is_parametrized(layer):
        raise AdapterError(
            f"{owner!r} is a {type(layer).__name__} with a forward of its own; what W + s B A means "
            "there is not known, so it is not merged. Leave it out with exclude_modules"
        )
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    made.weight = nn.Parameter(_computed(layer).detach(), requires_grad=False)
    if layer.bias is not None:
        made.bias = layer.bias
    made.train(layer.training)
    for name in [k for k in layer.__dict__ if "hooks" in k]:
        hooks = copy.copy(layer.__dict__[name])
        for key, hook in list(hooks.items()):
            # weight_norm of old recomputes the weight in a hook; the merged weight is the result.
            if "norm" in type(hook).__name__.lower():
                del hooks[key]
        made.__dict__[name] = hooks
    parent, _, last = owner.rpartition(".")
    root.get_submodule(parent)._modules[last] = made
    return made


def _computed(layer: Any) -> torch.Tensor:
    """Returns the weight a layer computes with in eval mode.

    The normalisations of old leave in `weight` what their hook computed last, and before the first
    run what it has not computed yet.
    """
    weight: torch.Tensor = layer.weight
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm):
            weight = hook.compute_weight(layer, do_power_iteration=False)
        elif isinstance(hook, WeightNorm):
            weight = hook.compute_weight(layer)
    return weight


def _is_parametrized(layer: nn.Module) -> bool:
    return hasattr(layer, "parametrizations") or "weight" not in layer._parameters


def _merge_bias(root: nn.Module, held: Held, planned: PlannedSite, safe: bool) -> None:
    path = f"{planned.prefix}.lora_B.{held.plan.adapter}"
    part: Any = held.parts[path]
    bias = root.get_submodule(planned.site.owner)._parameters.get("bias")
    if bias is None:
        raise AdapterError(
            f"lora_bias=True on {planned.name!r}, which has no bias to merge it into (PEFT: "
            "'Impossible to merge')"
        )
    added = part.bias.detach() * planned.scaling
    if planned.site.rows:
        index = torch.tensor([i for r in planned.site.rows for i in r], device=bias.device)
        merged = bias.index_add(0, index, added.to(bias.dtype)).detach()
    else:
        merged = (bias + added).to(bias.dtype).detach()
    _check_finite(planned, held, merged, safe)
    _set(root, f"{planned.site.owner}.bias", merged)


def _check_finite(planned: PlannedSite, held: Held, merged: torch.Tensor, safe: bool) -> None:
    if safe and merged.device.type != "meta" and not torch.isfinite(merged).all():
        raise AdapterError(
            f"merging adapter {held.plan.adapter!r} into {planned.name!r} gives a weight that is not "
            "finite; the adapter seems to be broken"
        )


def _merge_extras(root: nn.Module, held: Held) -> None:
    adapter = held.plan.adapter
    for saved in held.plan.saved:
        part = held.parts[f"{saved.name}.modules_to_save.{adapter}"]
        parent, _, last = saved.name.rpartition(".")
        assert isinstance(part, nn.Module)
        before = dict(root.get_submodule(saved.name).named_parameters())
        for name, p in part.named_parameters():
            # A view of the copy's numbers; its flag is the model's, as every other parameter's is.
            p.requires_grad = before[name].requires_grad
        root.get_submodule(parent)._modules[last] = part
    for t in held.plan.tokens:
        owner = t.tied_to or t.name
        rows: Any = held.parts[f"{owner}.token_adapter.trainable_tokens_delta.{adapter}"]
        weight: Any = root.get_submodule(t.name).weight
        index = torch.tensor(list(t.indices), device=weight.device)
        _set(
            root, f"{t.name}.weight", weight.detach().index_copy(0, index, rows.detach().to(weight))
        )
