"""`fxlora.optimize`: the passes in their order, on a copy of the graph over the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn
from torch.fx import Graph, GraphModule

from fxlora.errors import ConfigError, UnsupportedError, did_you_mean
from fxlora.facts import OPTIMIZED, info
from fxlora.optimize.casts import casts
from fxlora.optimize.checkpoints import checkpointed, checkpoints
from fxlora.optimize.dropouts import dropouts
from fxlora.optimize.flatten import flatten
from fxlora.optimize.groups import groups, swiglus
from fxlora.optimize.orders import orders
from fxlora.optimize.products import products
from fxlora.optimize.reads import read_quickly
from fxlora.optimize.report import Report, Step
from fxlora.optimize.scalings import scalings
from fxlora.optimize.shared_casts import shared_casts
from fxlora.trace.bulk import copy_graph
from fxlora.trace.shell import shell
from fxlora.trace.tracer import graph_module

Pass = Callable[[Graph, nn.Module], Step]
MODES: dict[str, tuple[Pass, ...]] = {
    "exact": (dropouts, flatten, casts, shared_casts, scalings, products),
    "memory": (dropouts, flatten, groups, swiglus, casts, scalings, products),
    "inference": (dropouts, flatten, orders, casts, scalings, products),
}


def optimize(lora: GraphModule, *, mode: str = "exact", checkpoint: bool = False) -> GraphModule:
    """Returns a graph that computes what `lora` does, in fewer and cheaper steps.

    It is for running: the graph to draw, to compare and to take apart stays the plain one. Both
    hold the very same parameters under the same names, so an optimizer, `fxlora.load_adapter` and
    `fxlora.save_adapter` work with either. docs/speed.md lists the passes; `report` says what
    each one did.

    Args:
        lora: what `fxlora.rewrite` (or `fxlora.trace`) returned; not changed.
        mode: "exact", which gives the plain graph's bits; or "memory", which keeps less for the
            backward pass and makes it again; or "inference", which picks the order of
            multiplication by its cost where no gradient is wanted.
        checkpoint: whether to run layers twice instead of keeping what they save for the backward
            pass: those a gradient reaches, and no others. The same bits.

    Raises:
        ConfigError: for another mode.
        UnsupportedError: for a graph that was made with checkpoint=True.

    >>> import torch, fxlora
    >>> from peft import LoraConfig
    >>> model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Linear(20, 5))
    >>> lora = fxlora.rewrite(fxlora.trace(model), LoraConfig(r=4, target_modules=["0"]))
    >>> fast = optimize(lora)
    >>> [sum(n.op.startswith("call") for n in g.graph.nodes) for g in (lora, fast)]
    [9, 4]
    """
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r} is none of {list(MODES)}.{did_you_mean(mode, MODES)}")
    if any(n.target is checkpointed for n in lora.graph.nodes):
        raise UnsupportedError(
            "layers of this graph are checkpointed already, each one call now: optimize what "
            "fxlora.rewrite returned, with checkpoint=True"
        )
    root = shell(lora)
    graph, _ = copy_graph(lora.graph)
    passes = list(MODES[mode])
    if checkpoint:
        passes.append(checkpoints(lora, info(lora).module_types))
    steps = tuple(step(graph, root) for step in passes)
    made = graph_module(root, graph, replace(info(lora)))
    made.meta[OPTIMIZED] = Report(mode, steps)
    read_quickly(made)
    return made
