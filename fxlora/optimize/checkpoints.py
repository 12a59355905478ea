"""A pass: layers that a gradient reaches are run twice instead of kept; the others are left alone.

    layers below the first adapter   as they are: autograd saves nothing there
    layers from it on                torch.utils.checkpoint(layer, ...), non-reentrant

Bits stay. transformers' gradient checkpointing wants gradients at the embeddings' output
(enable_input_require_grads), and so sends the backward pass, and a second forward pass, through every
layer below the first adapter, where nothing trains. The graph knows which layers those are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxlora.gradients import requires_grad
from fxlora.optimize.edit import read
from fxlora.optimize.report import Refusal, Step
from fxlora.optimize.segments import Segment, layer_of, segments
from fxlora.trace.regions import closed_regions


def checkpointed(layer: Any, *inputs: Any) -> Any:
    """Runs a layer, keeping nothing but its inputs for the backward pass."""
    if not torch.is_grad_enabled():
        return layer(*inputs)
    from torch.utils.checkpoint import checkpoint

    return checkpoint(layer, *inputs, use_reentrant=False)


def call(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a module that was handed in."""
    return module(*args, **kwargs)


torch.fx.wrap("checkpointed")
torch.fx.wrap("call")


def reached(lora: GraphModule, types: Mapping[str, type]) -> set[tuple[str, int]]:
    """Returns the calls of layers in which something requires grad."""
    flags = requires_grad(lora)
    found = {
        layer_of(n, types)
        for n, flag in flags.items()
        # A tensor computed there, not a parameter that is only read.
        if flag and n.op != "get_attr"
    }
    return {f for f in found if f is not None}


def checkpoints(lora: GraphModule, types: Mapping[str, type]) -> Callable[[Graph, nn.Module], Step]:
    """Returns the pass for a graph made from `lora`."""
    wanted = reached(lora, types)

    def run(graph: Graph, root: nn.Module) -> Step:
        changed, left = 0, []
        for segment in segments(graph, types):
            if (segment.path, segment.call) not in wanted:
                left.append(Refusal(segment.path, "no gradient reaches it: nothing is saved there"))
                continue
            why = segment.why_whole(root)
            if why:
                left.append(Refusal(segment.path, why))
                continue
            _fold(graph, root, segment, f"_checkpointed_{changed}")
            changed += 1
        return Step("checkpoints", changed, tuple(left))

    return run


def _fold(graph: Graph, root: nn.Module, segment: Segment, name: str) -> None:
    """Moves a layer's nodes into a function of its inputs and parameters, called in their place."""
    nodes = list(segment.nodes)
    outputs = segment.outputs()
    modules = {
        n: read(graph, nodes[0], root, str(n.target)) for n in nodes if n.op == "call_module"
    }
    held = [n for n in nodes if n.op == "get_attr"]
    for node in held:
        nodes[0].prepend(node)
    body = [n for n in nodes if n.op != "get_attr"]
    inputs = list(dict.fromkeys([*segment.inputs(), *held, *modules.values()]))
    inner = Graph()
    new: dict[Node, Node] = {n: inner.placeholder(n.name) for n in inputs}
    for node in body:
        made = inner.node_copy(node, new.__getitem__)
        if node in modules:
            made.op, made.target = "call_function", call
            made.args = (new[modules[node]], *made.args)
        made.meta = dict(node.meta)
        new[node] = made
    inner.output(tuple(new[n] for n in outputs) if len(outputs) != 1 else new[outputs[0]])
    inner._codegen._body_transformer = closed_regions
    root.add_module(name, GraphModule(nn.Module(), inner, class_name="Layer"))
    last = body[-1]
    with graph.inserting_after(last):
        layer = graph.create_node("get_attr", name)
    with graph.inserting_after(layer):
        out = graph.call_function(checkpointed, (layer, *inputs))
    out.meta = {"module_stack": last.meta.get("module_stack", ())}
    _redirect(graph, segment, outputs, out)
    for node in reversed(body):
        graph.erase_node(node)


def _redirect(graph: Graph, segment: Segment, outputs: list[Node], out: Node) -> None:
    inside = set(segment.nodes)
    after = out
    for i, old in enumerate(outputs):
        new = out
        if len(outputs) > 1:
            with graph.inserting_after(after):
                new = after = graph.call_function(operator.getitem, (out, i))
        new.meta = {**old.meta, "module_stack": old.meta.get("module_stack", ())}
        for user in [u for u in old.users if u not in inside]:
            user.replace_input_with(old, new)
