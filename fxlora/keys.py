"""The names of an adapter's tensors on disk, as PEFT writes them (peft.utils.save_and_load)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxlora.facts import info
from fxlora.freezing import bias_trains
from fxlora.plan import Plan
from fxlora.rewrite import part_paths

PREFIX = "base_model.model."
EMBEDDINGS = ("embed_tokens", "lm_head")  # peft.utils.constants.EMBEDDING_LAYER_NAMES


@dataclass(frozen=True)
class Entry:
    """One tensor of an adapter.

    Attributes:
        key: its name on disk.
        name: its name in the graph.
        kind: "adapter", "bias" (a base bias that trains), "again" (a bias of the adapter's own, which
            PEFT writes a second time with bias="all") or "embedding" (the whole base weight of an
            adapted embedding, which PEFT writes beside it).
        site: the site or module it belongs to.
    """

    key: str
    name: str
    kind: str
    site: str


def entries(lora: GraphModule, adapter: str) -> tuple[Entry, ...]:
    """Returns every tensor PEFT would write for an adapter, in the order of the graph."""
    plan: Plan = info(lora).adapters[adapter]
    parts = part_paths(plan)
    owners = _owners(plan)
    found = []
    for name, _ in _tensors(lora):
        part = next((p for p in parts if name == p or name.startswith(f"{p}.")), None)
        if part is not None:
            found.append(Entry(key_of(name, plan), name, "adapter", owners[part]))
    found += _base_entries(lora, plan)
    if plan.config.bias == "all":
        keys = {e.key for e in found}
        found += (e for e in _again(lora, plan) if e.key not in keys)
    return tuple(found)


def _again(lora: GraphModule, plan: Plan) -> Iterator[Entry]:
    """Yields the adapter's own biases by every name: PEFT takes each key that ends in `.bias`.

    It then drops the adapter's name where it stands before the last part, and nothing else.
    """
    mark = f".{plan.adapter}."
    for name, _ in lora.named_parameters(remove_duplicate=False):
        stem, _, last = name.rpartition(".")
        if last != "bias" or mark not in name:
            continue
        if f".modules_to_save{mark}" in name:
            yield Entry(f"{PREFIX}{stem.removesuffix(mark[:-1])}.bias", name, "again", stem)
        elif ".lora_" in name:
            yield Entry(key_of(name, plan), name, "again", stem.rpartition(".lora_")[0])


def _tensors(lora: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields parameters, and the buffers of modules that are trained as a whole."""
    yield from lora.named_parameters()
    kept = lora.state_dict().keys()
    for name, b in lora.named_buffers():
        if ".modules_to_save." in name and name in kept:
            yield name, b


def _owners(plan: Plan) -> dict[str, str]:
    owners = {}
    for p in plan.adapted:
        assert p.adapter is not None
        for name, _ in p.adapter.parameters:
            stem = name.removesuffix(".weight").removesuffix(".bias").format(plan.adapter)
            owners[f"{p.prefix}.{stem}"] = p.name
        owners[f"{p.prefix}.lora_dropout.{plan.adapter}"] = p.name
    owners |= {f"{s.name}.modules_to_save.{plan.adapter}": s.name for s in plan.saved}
    for t in plan.tokens:
        owners[f"{t.name}.token_adapter.trainable_tokens_delta.{plan.adapter}"] = t.name
    return owners


def key_of(name: str, plan: Plan) -> str:
    """Returns the name on disk of an adapter's parameter: without the adapter's own name.

    A DoRA magnitude loses its `.weight`, a module trained as a whole its `modules_to_save`, and
    what hangs below an nn.MultiheadAttention gains a `base_layer`.
    """
    adapter = re.escape(plan.adapter)
    name = re.sub(rf"\.modules_to_save\.{adapter}\.", ".", name)
    name = re.sub(rf"(\.lora_magnitude_vector)\.{adapter}\.weight$", r"\1", name)
    name = re.sub(rf"(\.(?:lora_\w+|trainable_tokens_delta))\.{adapter}(?=\.|$)", r"\1", name)
    for p in plan.adapted:
        if p.rule == "attention" and name.startswith(f"{p.name}."):
            name = f"{p.scope}.base_layer.out_proj.{name[len(p.name) + 1 :]}"
    return PREFIX + name


def _base_entries(lora: GraphModule, plan: Plan) -> Iterator[Entry]:
    wrapped = _wrapped_names(info(lora).adapters.values())
    # A tied bias by each of its names.
    for name, _ in lora.named_parameters(remove_duplicate=False):
        if _bias_saved(name, plan):
            yield Entry(PREFIX + peft_name(name, wrapped), name, "bias", name.rpartition(".")[0])
    for site in _saved_embeddings(lora, plan):
        for last in ("weight", "bias"):
            if getattr(lora.get_submodule(site), last, None) is not None:
                yield Entry(
                    f"{PREFIX}{site}.base_layer.{last}", f"{site}.{last}", "embedding", site
                )


def _bias_saved(name: str, plan: Plan) -> bool:
    from fxlora.plan import adapted_modules

    if ".lora_" in name or ".modules_to_save." in name:
        return False
    return bias_trains(name, plan.config.bias, adapted_modules(plan.adapted))


def _wrapped_names(plans: Iterable[Plan]) -> dict[str, str]:
    """Returns, for every module PEFT wraps, the path its own parameters have below the wrapper."""
    wrapped: dict[str, str] = {}
    for plan in plans:
        for p in plan.adapted:
            if p.kind == "Parameter":
                below = f"{p.prefix.removeprefix(p.scope)}.base_layer"
                for s in p.scopes:
                    wrapped[s] = max(wrapped.get(s, ""), s + below, key=len)
            else:
                # Below attention, the projection's.
                for s in p.scopes:
                    name = s + p.site.owner.removeprefix(p.scope)
                    wrapped[name] = f"{name}.base_layer"
        wrapped |= {s.name: f"{s.name}.original_module" for s in plan.saved}
        wrapped |= {t.name: f"{t.name}.token_adapter.base_layer" for t in plan.tokens}
    return wrapped


def peft_name(name: str, wrapped: dict[str, str]) -> str:
    """Returns the name a base parameter has in PEFT's model (without `base_model.model.`)."""
    # From the inside out, so that the levels of an attention and its projection both count.
    for owner in sorted(wrapped, key=len, reverse=True):
        if name.startswith(f"{owner}."):
            name = wrapped[owner] + name[len(owner) :]
    return name


def _saved_embeddings(lora: GraphModule, plan: Plan) -> Iterator[str]:
    """Yields the adapted input and output embeddings whose whole weight PEFT writes too."""
    config, model = plan.config, info(lora).model
    if config.trainable_token_indices is not None or not hasattr(model, "get_input_embeddings"):
        return
    targets = config.target_modules
    if isinstance(targets, str):
        names = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in EMBEDDINGS]
        targeted = any(re.fullmatch(targets, n) for n in names)
    else:
        targeted = any(e in (targets or ()) for e in EMBEDDINGS)
    if not targeted:
        return
    modules = {id(m): n for n, m in model.named_modules()}
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        name = modules.get(id(layer), "")
        if any(p.name == name for p in plan.adapted):
            yield name
