"""What gradient checkpointing would cost this configuration, as usually switched on and above the frontier.

The frontier is the first layer a gradient reaches. Below it autograd saves nothing and goes nowhere, unless
`enable_input_require_grads` sends it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch.fx import GraphModule

from fxlora.errors import ConfigError
from fxlora.facts import info
from fxlora.gradients import requires_grad
from fxlora.memory import human_bytes, saved_by_node
from fxlora.optimize.checkpoints import reached
from fxlora.optimize.segments import Segment, segments
from fxlora.text import count, table
from fxlora.trace.bulk import copy_graph
from fxlora.trace.shell import shell
from fxlora.trace.tracer import graph_module


@dataclass(frozen=True)
class Frontier:
    """Three ways to train one configuration, by work and by memory; prints as a table.

    Work is counted in passes through a layer: forward, forward again, backward. Memory is what autograd
    keeps at the moment it keeps most, without parameters.

    Attributes:
        layers: how many calls of repeated layers the graph has.
        reached: how many of them a gradient reaches.
        first: the path of the first of those; "" when there is none.
        passes: way -> (forward, forward again, backward), in layers.
        kept: way -> bytes.
    """

    layers: int
    reached: int
    first: str
    passes: dict[str, tuple[int, int, int]]
    kept: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Returns the comparison as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        where = f"the first is {self.first}" if self.first else "none"
        head = f"a gradient reaches {self.reached} of {count(self.layers, 'layer')}; {where}"
        rows = [
            (WAYS[way], *map(str, parts), str(sum(parts)), human_bytes(self.kept[way]))
            for way, parts in self.passes.items()
        ]
        titles = ("gradient checkpointing", "forward", "again", "backward", "together", "kept")
        return f"{head}\n\n{table(titles, rows, right=(1, 2, 3, 4, 5))}"


WAYS = {
    "off": "off",
    "usual": "as usually switched on (with an input hook)",
    "frontier": "fxlora.optimize(lora, checkpoint=True)",
}


def frontier(
    lora: GraphModule, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
) -> Frontier:
    """Says what gradient checkpointing would cost, from the graph and without weights.

    "As usually switched on" is transformers' `gradient_checkpointing_enable()` with
    `enable_input_require_grads()`, which peft's users are told to call.

    Args:
        lora: what `fxlora.rewrite` returned; not changed.
        args: example inputs; only their sizes count.
        kwargs: the same by name.

    Raises:
        ConfigError: when the graph has no repeated layers (no nn.ModuleList is run through).
    """
    found = segments(lora.graph, info(lora).module_types)
    if not found:
        raise ConfigError(
            "the graph runs through no nn.ModuleList, so there is no layer to checkpoint"
        )
    wanted = reached(lora, info(lora).module_types)
    above = [s for s in found if (s.path, s.call) in wanted]
    plain, sizes = saved_by_node(lora, args, kwargs)
    hooked = _with_input_grads(lora, found[0])
    everywhere, _ = saved_by_node(hooked, args, kwargs)
    n, k = len(found), len(above)
    return Frontier(
        layers=n,
        reached=k,
        first=above[0].path if above else "",
        passes={"off": (n, 0, k), "usual": (n, n, n), "frontier": (n, k, k)},
        kept={
            "off": sum(plain.values()),
            "usual": _kept(everywhere, sizes, found),
            "frontier": _kept(plain, sizes, above),
        },
    )


def _kept(saved: dict[str, int], sizes: dict[str, int], layers: list[Segment]) -> int:
    """Returns what is kept when these layers are run twice: their inputs, and one layer whole."""
    of_layers = [sum(saved.get(n.name, 0) for n in s.nodes) for s in layers]
    inputs = {n.name: n for s in layers for n in s.inputs() if n.op != "get_attr"}
    outside = sum(saved.values()) - sum(of_layers)
    return outside + sum(sizes.get(n, 0) for n in inputs) + max(of_layers, default=0)


def _with_input_grads(lora: GraphModule, first: Segment) -> GraphModule:
    """Returns the graph with a gradient wanted at what enters the first layer."""
    flags = requires_grad(lora)
    graph, new = copy_graph(lora.graph)
    for node in first.inputs():
        dtype = node.meta.get("dtype")
        if flags[node] or dtype is None or not dtype.is_floating_point or node.op != "call_module":
            continue
        users = list(new[node].users)
        with graph.inserting_after(new[node]):
            made = graph.call_method("requires_grad_", (new[node],))
        made.meta = dict(new[node].meta)
        for user in users:
            user.replace_input_with(new[node], made)
    return graph_module(shell(lora), graph, replace(info(lora)))
