"""What a rule may look at: the traced graph, the plan, the rewritten graph and what follows from them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxlora.config import init_name
from fxlora.effects import Effect, effects
from fxlora.facts import info
from fxlora.lint import flow
from fxlora.plan import Plan, PlannedSite
from fxlora.rewrite import rewrite
from fxlora.sites import Site
from fxlora.slices import Slice, slices


@dataclass(frozen=True)
class Options:
    """What the graph cannot know: how the adapter will be trained, merged and served.

    Attributes:
        gradient_checkpointing: "reentrant", "non-reentrant", or "" for none.
        input_require_grads: whether `model.enable_input_require_grads()` is called.
        dtype: what the merged weights are stored in, such as "bfloat16"; "" when nothing is merged.
        trained_b: the root mean square of a trained lora_B, for the merge drift before training.
        serve: the serving engine, "vllm"; "" for none.
        max_lora_rank: the engine's largest rank.
    """

    gradient_checkpointing: str = ""
    input_require_grads: bool = False
    dtype: str = ""
    trained_b: float = 0.01
    serve: str = ""
    max_lora_rank: int = 16


@dataclass(frozen=True)
class Context:
    """The read-only material of one run; what is costly is computed when a rule asks.

    Attributes:
        traced: the traced graph.
        plan: what the configuration does to it.
        options: what the graph cannot know.
        given: the rewritten graph, when the caller had one.
        original: the configuration as the user wrote it, when it was given as one.
    """

    traced: GraphModule
    plan: Plan
    options: Options = field(default_factory=Options)
    given: GraphModule | None = None
    original: Any = None

    @property
    def asked(self) -> Any:
        """The configuration before PEFT translated its names for this model."""
        return self.config if self.original is None else self.original

    @property
    def config(self) -> Any:
        """The resolved LoraConfig."""
        return self.plan.config

    @property
    def model(self) -> nn.Module:
        """The live model."""
        found: nn.Module = info(self.traced).model
        return found

    @property
    def adapted(self) -> tuple[PlannedSite, ...]:
        """The sites that get an adapter."""
        return self.plan.adapted

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every site, adapted or not."""
        return tuple(p.site for p in self.plan)

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of the adapted sites."""
        return frozenset(p.name for p in self.adapted)

    @property
    def limits_layers(self) -> bool:
        """Whether layers_to_transform says which blocks are adapted."""
        return self.config.layers_to_transform not in (None, [])

    @cached_property
    def lora(self) -> GraphModule:
        """The rewritten graph; its initial values say nothing and are not drawn twice."""
        if self.given is not None:
            return self.given
        plan = replace(self.plan, config=_training(_plain_init(self.plan.config)))
        state = torch.get_rng_state()  # the caller's draw is not ours to move
        try:
            return rewrite(self.traced, plan)
        finally:
            torch.set_rng_state(state)

    @cached_property
    def effects(self) -> tuple[Effect, ...]:
        """What each adapter does to the outputs."""
        return tuple(e for e in effects(self.lora) if e.adapter == self.plan.adapter)

    @cached_property
    def blocks(self) -> tuple[flow.Blocks, ...]:
        """The repeated blocks."""
        return flow.blocks(self.traced, self.sites)

    @cached_property
    def tower(self) -> tuple[str, ...]:
        """The sites of a tower that feeds the stream of tokens."""
        return flow.tower(self.traced, self.sites)

    @cached_property
    def unentered(self) -> tuple[str, ...]:
        """The sites of a tower the traced inputs never enter."""
        return flow.unentered_tower(self.traced, self.sites)

    @cached_property
    def routers(self) -> dict[str, Node]:
        """The sites whose scores choose what runs next."""
        return flow.routers(self.traced, self.sites)

    @cached_property
    def output_layers(self) -> tuple[str, ...]:
        """The sites whose result is the logits."""
        return flow.output_layers(self.traced, self.sites)

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """The parts of fused layers."""
        return slices(self.traced)

    @cached_property
    def holders(self) -> dict[int, tuple[str, ...]]:
        """Identity of a parameter -> the names of the modules that hold it."""
        found: dict[int, tuple[str, ...]] = {}
        for name, key in flow.holders(self.model):
            found[key] = (*found.get(key, ()), name)
        return found


def _plain_init(config: Any) -> Any:
    """Returns a configuration that draws A and B without factoring a weight that may be on meta."""
    how = init_name(config)
    if not isinstance(how, str) or how == "mica":  # mica is a variant: it decides what trains
        return config
    made = copy.copy(config)
    made.init_lora_weights = True
    return made


def _training(config: Any) -> Any:
    """Returns a configuration whose adapters train: what inference_mode freezes has a rule of its own."""
    if not config.inference_mode:
        return config
    made = copy.copy(config)
    made.inference_mode = False
    return made


def shown(names: Sequence[str], limit: int = 3) -> str:
    """Returns a few names of many.

    >>> shown(["a", "b", "c", "d"], 2)
    'a, b, ...'
    """
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
