"""Repeated blocks in a recorded graph: one node for each, written out in one pass at the end.

While a model is recorded, a block that equals an earlier one becomes a single node, whose target is
a `Repeat`. Laying train and eval over each other then costs one block of a kind too. `written` turns
every such node into copies of the earlier block's nodes, and the graph into the one that running
every block would have given, names included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fxlora.facts import Frame
from fxlora.trace.bulk import Writer
from fxlora.trace.guards import ByMode, TrainOnly
from fxlora.trace.known import NotKnown

Stack = tuple[Frame, ...]


class Recorded(Graph):
    """A graph that knows in which order its nodes were made.

    A node's name follows from that order: sizes are put at the head when they are first needed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Node] = []

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        """Makes a node and notes it."""
        node = super().create_node(*args, **kwargs)
        self.made.append(node)
        return node


@dataclass(eq=False)
class Block:
    """The nodes of a block that was run.

    Attributes:
        path: the name of its module.
        nodes: in the order of the graph.
        inputs: the nodes its tensor arguments stood for.
        outs: the nodes its tensor results stand for.
        depth: how many modules were entered before it.
    """

    path: str
    nodes: list[Node]
    inputs: list[Node]
    outs: list[Node]
    depth: int

    def __post_init__(self) -> None:
        found: dict[Frame, None] = {}
        for node in self.nodes:
            if isinstance(node.target, Repeat):
                found.update(dict.fromkeys(node.target.frames.values()))
            else:
                found.update(dict.fromkeys(node.meta["module_stack"][self.depth :]))
        self.frames = tuple(found)


class Repeat:
    """The target of a node that stands for a block's nodes under another path.

    Attributes:
        block: the block that was run.
        path: the name of the module that was not.
        frames: what each module call inside the block becomes.
    """

    __name__ = "repeat"

    def __init__(self, block: Block, path: str, frames: dict[Frame, Frame]) -> None:
        self.block, self.path, self.frames = block, path, frames

    def __call__(self, *_: Any) -> Any:
        """Says that what a block computes is not known: it follows from data."""
        raise NotKnown


def part(repeat: Any, index: int) -> Any:  # noqa: ARG001 - a node's target, never run
    """Stands for one result of a repeated block."""
    raise NotKnown


def moved(name: str, old: str, new: str) -> str:
    """Returns a name below `old` as it is below `new`, and any other name as it is.

    >>> moved("layers.0.lin", "layers.0", "layers.7"), moved("layers.01", "layers.0", "layers.7")
    ('layers.7.lin', 'layers.01')
    """
    return new + name[len(old) :] if name == old or name.startswith(old + ".") else name


def same(a: Graph, b: Graph) -> bool:
    """Whether two recorded graphs repeat the same blocks at the same places."""
    return _places(a) == _places(b)


def _places(graph: Graph) -> list[tuple[str, str]]:
    return [
        (n.target.path, n.target.block.path) for n in graph.nodes if isinstance(n.target, Repeat)
    ]


def written(
    graph: Graph, inserted: dict[Node, None], modules: dict[str, nn.Module]
) -> tuple[Graph, dict[str, nn.Module]]:
    """Returns a recorded graph with its repeated blocks written out.

    Args:
        graph: read.
        inserted: nodes put in front of others since the recording, which call one of `modules`.
        modules: path -> the ByMode and TrainOnly modules the graph calls.

    Returns:
        A new graph, and the modules with those of the repeated blocks.
    """
    if not isinstance(graph, Recorded):
        return graph, modules
    return _Writing(graph, inserted, dict(modules)).run()


class _Writing:
    """One pass over a recorded graph."""

    def __init__(
        self, graph: Recorded, inserted: dict[Node, None], modules: dict[str, nn.Module]
    ) -> None:
        self._old, self._inserted, self._modules = graph, inserted, modules
        self._writer = Writer()
        self._top: dict[Node, Node] = {}
        self._modes: dict[str, Node] = {}  # path -> the one node that calls that inserted module
        self._templates: dict[Block, list[tuple[Node, bool]]] = {}

    def run(self) -> tuple[Graph, dict[str, nn.Module]]:
        """Returns the graph and its modules."""
        names = self._names()
        results: dict[Node, list[Node]] = {}
        top, add = self._top, self._writer.add
        for node in self._old.nodes:
            target = node.target
            if isinstance(target, Repeat):
                inputs = [top[n] for n in node.args]
                stack = node.meta["module_stack"]
                results[node] = self._copy(
                    target.block, target.path, inputs, stack, target.frames, names[node]
                )
            elif target is part:
                repeat, index = node.args
                top[node] = results[repeat][index]
            else:
                args, kwargs = (map_arg(a, top.__getitem__) for a in (node.args, node.kwargs))
                meta = dict(node.meta)
                if "mutates" in meta:
                    meta["mutates"] = tuple(top[n] for n in meta["mutates"])
                top[node] = add(names[node], node.op, target, args, kwargs, meta, node.type)
                if node in self._inserted:
                    self._modes[str(target)] = top[node]
        return self._writer.graph, self._modules

    # ---- names ---------------------------------------------------------------------------------

    def _names(self) -> dict[Node, Any]:
        """Names every node in the order in which running every block would have made them."""
        out: dict[Node, Any] = {}
        for node in self._old.made:
            if isinstance(node.target, Repeat):
                out[node] = self._block_names(node.target.block, node.target.path)
            elif node.target is not part:
                out[node] = self._writer.name(node.target)
        return out

    def _block_names(self, block: Block, path: str) -> list[Any]:
        names: list[Any] = []
        for node in block.nodes:
            target = node.target
            if isinstance(target, Repeat):
                names.append(self._block_names(target.block, moved(target.path, block.path, path)))
            elif target is part:
                names.append(None)
            elif node.op in ("call_module", "get_attr"):
                names.append(self._writer.name(moved(str(target), block.path, path)))
            else:
                names.append(self._writer.name(target))
        return names

    # ---- one block -----------------------------------------------------------------------------

    def _template(self, block: Block) -> list[tuple[Node, bool]]:
        """Returns a block's nodes as they are now, and whether each was inserted since."""
        if block not in self._templates:
            self._templates[block] = [
                (n, new) for node in block.nodes for n, new in self._with_inserted(node)
            ]
        return self._templates[block]

    def _with_inserted(self, node: Node) -> Iterator[tuple[Node, bool]]:
        before: list[Node] = []
        at = node.prev
        while not node._erased and at in self._inserted:
            before.append(at)
            at = at.prev
        yield from ((n, True) for n in reversed(before))
        yield node, False

    def _copy(
        self, block: Block, path: str, inputs: list[Node], stack: Stack,
        frames: dict[Frame, Frame], names: list[Any],
    ) -> list[Node]:  # fmt: skip
        """Adds a block's nodes under another path; returns what its results are there."""
        old, depth, top = block.path, block.depth, self._top
        local: dict[Node, Node] = dict(zip(block.inputs, inputs, strict=True))
        results: dict[Node, list[Node]] = {}
        stacks: dict[Stack, Stack] = {}

        def new(n: Node) -> Node:
            found = local.get(n)
            if found is None and n in self._inserted:
                found = self._modes.get(moved(str(n.target), old, path))
            return top[n] if found is None else found

        name = iter(names)
        for node, is_new in self._template(block):
            called = None if is_new else next(name)
            if node._erased:
                continue
            before = node.meta["module_stack"]
            if before not in stacks:
                stacks[before] = stack + tuple(frames[f] for f in before[depth:])
            target: Any = node.target
            if isinstance(target, Repeat):
                results[node] = self._copy(
                    target.block, moved(target.path, old, path),
                    [new(n) for n in node.args],  # type: ignore[arg-type]
                    stacks[before], {f: frames[g] for f, g in target.frames.items()}, called or [],
                )  # fmt: skip
                continue
            if target is part:
                repeat, index = node.args
                local[node] = results[repeat][index]  # type: ignore[index]
                continue
            if node.op in ("call_module", "get_attr"):
                target = moved(target, old, path)
            if is_new:
                target = self._switch(node, target)
                if target in self._modes:
                    local[node] = self._modes[target]
                    continue
            meta = dict(node.meta)
            meta["module_stack"] = stacks[before]
            if "mutates" in meta:
                meta["mutates"] = tuple(map(new, meta["mutates"]))
            args, kwargs = map_arg(node.args, new), map_arg(node.kwargs, new)
            called = called or self._writer.name(target)
            local[node] = self._writer.add(called, node.op, target, args, kwargs, meta)
            if is_new:
                self._modes[target] = local[node]
        return [new(n) for n in block.outs]

    def _switch(self, node: Node, path: str) -> str:
        """Hangs in the module an inserted node calls under a path, and returns where.

        A constant of a mode is asked for once per module; a draw is made at every call.
        """
        module = self._modules[str(node.target)]
        if isinstance(module, ByMode):
            self._modules.setdefault(path, ByMode(module.train_value, module.eval_value))
            return path
        assert isinstance(module, TrainOnly)
        above, _, number = path.rpartition("_")
        while path in self._modes:
            number = str(int(number) + 1)
            path = f"{above}_{number}"
        self._modules.setdefault(path, TrainOnly(module.function))
        return path
