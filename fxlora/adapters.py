"""Adapters as values: add, switch, disable, delete and combine them; every call returns a new graph.

A graph computes exactly its active adapters, so which adapters are active is part of the graph, and
changing that makes another one. Making it costs no trace: nodes are inserted into a copy of the
traced graph, and the two graphs share every weight, base and adapter, so training one trains both.
Flags and optimizers belong to one graph: build the optimizer from the graph you train.

What switches a live graph instead is what changes numbers only: `fxlora.load_adapter` into an
adapter the graph has, an optimizer step, `load_state_dict`.

>>> import torch, fxlora
>>> from peft import LoraConfig
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
>>> lora = fxlora.rewrite(fxlora.trace(model), LoraConfig(target_modules=["0"]))
>>> both = fxlora.adapters.add(lora, LoraConfig(target_modules=["1"]), "other")
>>> names(both), active(both)
(('default', 'other'), ('default',))
>>> active(fxlora.adapters.set_active(both, ["default", "other"]))
('default', 'other')
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from fxlora.build import Held, build
from fxlora.combine import combined
from fxlora.errors import AdapterError, did_you_mean
from fxlora.facts import info
from fxlora.plan import Plan
from fxlora.plan import plan as make_plan
from fxlora.rewrite import assemble, check_plan, held_of


def names(lora: GraphModule) -> tuple[str, ...]:
    """Returns the names of a graph's adapters, in the order they were added."""
    return tuple(info(lora).adapters)


def active(lora: GraphModule) -> tuple[str, ...]:
    """Returns the names of the adapters a graph computes, in their order."""
    return info(lora).active


def add(lora: GraphModule, config: Plan | Any, name: str) -> GraphModule:
    """Returns a graph with one more adapter, which is neither active nor trainable yet, as in PEFT.

    Args:
        lora: a rewritten graph, or a traced one (then the new adapter is active).
        config: a `peft.LoraConfig`, or a plan made with `fxlora.plan(lora, config, name)`.
        name: of the new adapter.

    Raises:
        AdapterError: when the graph has an adapter of that name, or one this does not go with.
        ConfigError: as `fxlora.plan`.
    """
    facts = info(lora)
    plan = config if isinstance(config, Plan) else make_plan(lora, config, name)
    if plan.adapter != name or name in facts.adapters:
        raise AdapterError(
            f"the plan is for {plan.adapter!r}; the graph has {list(facts.adapters)}"
        )
    base = facts.base if facts.base is not None else lora
    check_plan(base, plan)
    _check_beside(plan, facts.adapters)
    held = _held(lora, facts.active)
    held[name] = build(_drawn_on(lora), plan)
    now = facts.active or (() if facts.adapters else (name,))
    return _assembled(lora, held, now)


def set_active(lora: GraphModule, adapters: str | Sequence[str]) -> GraphModule:
    """Returns a graph that computes the named adapters, in that order; the others are frozen.

    Args:
        lora: a rewritten graph.
        adapters: one name or several; an order other than before changes the last bit of sums.

    Raises:
        AdapterError: for a name the graph does not have (PEFT then silently switches all off), and
            for two adapters that each replace the same weight.
    """
    wanted = (adapters,) if isinstance(adapters, str) else tuple(adapters)
    for name in wanted:
        _check_has(lora, name)
    if len(set(wanted)) != len(wanted) or not wanted:
        raise AdapterError(f"active adapters {list(wanted)}: name each once, and at least one")
    return _assembled(lora, _held(lora, wanted), wanted)


def disable(lora: GraphModule) -> GraphModule:
    """Returns a graph that computes the base model, bit for bit, and still holds the adapters.

    Weights that an initialisation changed (PiSSA, OLoRA, KaSA) are the original ones here; PEFT's
    disabled model computes with what the initialisation left.
    """
    _check_rewritten(lora)
    return _assembled(lora, _held(lora, ()), ())


def enable(lora: GraphModule) -> GraphModule:
    """Returns a graph with the adapters active again; all of them after `disable`, in their order.

    Use `set_active` to choose.
    """
    _check_rewritten(lora)
    return set_active(lora, names(lora)) if not active(lora) else set_active(lora, active(lora))


def delete(lora: GraphModule, name: str) -> GraphModule:
    """Returns a graph without one adapter; when it was the only active one, the first left is.

    Raises:
        AdapterError: for a name the graph does not have, and for the last adapter.
    """
    _check_has(lora, name)
    left = tuple(n for n in names(lora) if n != name)
    if not left:
        raise AdapterError(
            f"{name!r} is the only adapter; the graph without it is the traced one, "
            "fxlora.facts.info(lora).base"
        )
    now = tuple(n for n in active(lora) if n != name)
    if active(lora) and not now:
        now = left[:1]
    held = _held(lora, now)
    del held[name]
    return _assembled(lora, held, now)


def combine(
    lora: GraphModule,
    weights: dict[str, float],
    name: str,
    how: str = "svd",
    *,
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> GraphModule:
    """Returns a graph with a new adapter made of others: PEFT's `add_weighted_adapter`.

    Args:
        lora: a rewritten graph.
        weights: adapter name -> its weight, negative ones included.
        name: of the new adapter; inactive and frozen, as in PEFT.
        how: "svd", "linear", "cat", "ties", "dare_ties", "dare_linear", "magnitude_prune" or one
            of these four with "_svd".
        svd_rank: rank for the svd kinds; by default the largest of the adapters.
        density: the share that is kept, for the pruning kinds.
        majority_sign_method: "total" or "frequency", for the ties kinds.

    Raises:
        AdapterError: for adapters that cannot be combined.
    """
    facts = info(lora)
    for n in weights:
        _check_has(lora, n)
    if name in facts.adapters:
        raise AdapterError(f"the graph has an adapter {name!r} already")
    held = _held(lora, facts.active)
    for n in weights:
        _check_values(n, held[n])
    held[name] = combined(
        facts.base, {n: held[n] for n in weights}, weights, name, how,
        svd_rank=svd_rank, density=density, majority_sign_method=majority_sign_method,
    )  # fmt: skip
    return _assembled(lora, held, facts.active)


# ---- helpers -----------------------------------------------------------------------------------


def _held(lora: GraphModule, wanted: Sequence[str]) -> dict[str, Held]:
    """Returns every adapter as views: those that stay active keep their flags, others change."""
    now = active(lora)
    made = {}
    for name, plan in info(lora).adapters.items():
        trains: bool | None = name in wanted and not plan.config.inference_mode
        made[name] = held_of(lora, name, None if name in wanted and name in now else trains)
    return made


def _assembled(lora: GraphModule, adapters: dict[str, Held], now: tuple[str, ...]) -> GraphModule:
    for name, held in adapters.items():
        if name not in now:
            for part in held.parts.values():
                part.requires_grad_(False)
    base = info(lora).base
    if base is None:
        return assemble(lora, adapters, now)
    return assemble(base, adapters, now, live=lora)


def _drawn_on(lora: GraphModule) -> GraphModule:
    """Returns the graph whose base weights a new adapter is drawn from."""
    facts = info(lora)
    return facts.base if facts.base is not None else lora


def _check_rewritten(lora: GraphModule) -> None:
    if not info(lora).adapters:
        raise AdapterError(
            "this graph has no adapters; make them with fxlora.rewrite(traced, config)"
        )


def _check_has(lora: GraphModule, name: str) -> None:
    _check_rewritten(lora)
    if name not in info(lora).adapters:
        have = list(info(lora).adapters)
        raise AdapterError(f"no adapter {name!r}; the graph has {have}.{did_you_mean(name, have)}")


def _check_values(name: str, held: Held) -> None:
    for path, part in held.parts.items():
        tensors = [part] if isinstance(part, torch.Tensor) else [*part.parameters()]
        if any(t.device.type == "meta" for t in tensors):
            raise AdapterError(
                f"{path} of adapter {name!r} is on the meta device and has no values to combine; load "
                "the weights first"
            )


def _check_beside(plan: Plan, others: dict[str, Plan]) -> None:
    """Refuses what PEFT refuses of a second adapter (BaseTuner._check_new_adapter_config)."""
    config = plan.config
    for name, other in others.items():
        if config.bias != "none" and other.config.bias != "none":
            raise AdapterError(
                f"bias={config.bias!r} beside adapter {name!r} with bias={other.config.bias!r}: only "
                "one adapter of a model can train its biases"
            )
        if (config.kasa_config is None) != (other.config.kasa_config is None):
            raise AdapterError(
                f"KaSA changes the base weights and cannot stand beside one that does not ({name!r})"
            )
        mine, theirs = (
            set(config.target_parameters or ()),
            set(other.config.target_parameters or ()),
        )
        if mine and theirs and mine != theirs:
            raise AdapterError(
                f"target_parameters={sorted(mine)} beside {sorted(theirs)} of {name!r}: all adapters "
                "with target_parameters must name the same ones"
            )


def renamed(plan: Plan, name: str) -> Plan:
    """Returns a plan for the same sites under another adapter name."""
    return replace(plan, adapter=name)
