"""fx nodes -> the group each is drawn in: a module, a helper function of the model, or itself."""

from __future__ import annotations

from dataclasses import dataclass, field

import networkx as nx
from torch.fx import Node

from fxlora_viz import ops
from fxlora_viz.parts import SOURCES, Part, call_key, parts_of, plain_name
from fxlora_viz.reading import Frames, Reading

# Functions every model has: their operations are the module's own.
_OWN = (
    "forward",
    "_forward",
    "__call__",
    "<lambda>",
    "<listcomp>",
    "<genexpr>",
    "wrapper",
    "trace",
)
_LONG_RUN = 12  # more operations than this in a row are one node: nobody reads a list of thirty


@dataclass
class Group:
    """Nodes drawn as one.

    Attributes:
        key: names the group.
        kind: "input", "module", "helper", "op", "parameter" or "role".
        path: the module, or the module around.
        frames: the module calls around, with its own for a module.
        members: the nodes, in order.
        name: the helper's name, the role.
        saved: the module trained as a whole that the group is, or is part of.
    """

    key: str
    kind: str
    path: str
    frames: Frames
    members: list[Node] = field(default_factory=list)
    name: str = ""
    saved: str = ""

    @property
    def is_source(self) -> bool:
        """Whether the group only holds parameters: it makes a value of nothing else."""
        return self.kind == "parameter" or (self.kind == "role" and self.name in SOURCES)


class Groups:
    """The groups of one graph, in execution order; nodes in no group only pass values on."""

    def __init__(self, reading: Reading, depth: int | None = None) -> None:
        """Groups the nodes of a graph, opening at most `depth` levels of modules."""
        self._reading = reading
        self._depth = depth
        self.of: dict[Node, Group] = {}
        self.all: dict[str, Group] = {}
        self._parts = parts_of(reading.nodes)
        self._run: list[Node] = []
        self._run_frames: Frames = ()
        for node in reading.nodes:
            self._place(node)
        self._end_run()
        self._dissolve_passing()
        self._split_cycles()
        order = {n: i for i, n in enumerate(reading.nodes)}
        self.all = dict(sorted(self.all.items(), key=lambda kv: order[kv[1].members[0]]))

    # ---- one node ----------------------------------------------------------------------------

    def _place(self, node: Node) -> None:
        if node.op == "output" or isinstance(node.target, type) or node in self._reading.plumbing:
            return
        frames = self._reading.frames(node)
        if node.op == "placeholder":
            self._join(f"input:{node.name}", "input", "", (), node)
        elif node in self._parts:
            self._place_part(node, self._parts[node], frames)
        elif node.meta.get("role", "saved") != "saved":
            self._place_rest(node, frames)
        elif (whole := self._whole(frames)) is not None:
            path, call = frames[whole]
            self._join(call_key(path, call), "module", path, frames[: whole + 1], node)
        elif node.op == "get_attr":
            if self._reading.weights(node):
                self._join(f"parameter:{node.name}", "parameter", _path(frames), frames, node)
        elif node.op == "call_module":
            path, call = frames[-1] if frames else (plain_name(node), 0)
            self._join(call_key(path, call), "module", path, frames, node)
        elif not ops.is_passing(node) and not self._is_label(node):
            self._extend_run(node, frames)

    def _is_label(self, node: Node) -> bool:
        """Whether a node is a number written on the arrow through it: a product of its module's own."""
        inside = {n for n in node.all_input_nodes if n.op != "placeholder"}
        return bool(ops.factor(node)) and bool(inside) and not _function(node)

    def _place_part(self, node: Node, part: Part, frames: Frames) -> None:
        if self._place_rest(node, frames, part.site):
            return
        at = _owner(frames, part.site)
        around = frames
        if at < len(frames) and frames[at][0] != part.site:
            # The box of a module that is more than its parameters goes around their sites.
            around = frames[:at] if self._reading.is_simple(frames[at][0]) else frames[: at + 1]
        name = "" if part.role == "base" else f":{part.role}{part.suffix}"
        self._join(part.unit + name, "role", part.site, around, node, part.role)

    def _place_rest(self, node: Node, frames: Frames, site: str = "") -> bool:
        """Puts an inserted node into the closed module around its site, if there is one."""
        at = _owner(frames, site or str(node.meta.get("layer", node.meta["site"])))
        whole = self._whole(frames)
        if whole is None or whole >= at:
            return False
        path, call = frames[whole]
        self._join(call_key(path, call), "module", path, frames[: whole + 1], node)
        return True

    def _whole(self, frames: Frames) -> int | None:
        """Returns the index of the outermost frame that is drawn as one node, if any."""
        for i, (path, _) in enumerate(frames):
            if self._reading.is_simple(path) or (self._depth is not None and i >= self._depth):
                return i
        return None

    def _join(
        self, key: str, kind: str, path: str, frames: Frames, node: Node, name: str = ""
    ) -> None:
        if kind not in ("input", "parameter", "role"):
            self._end_run()
        group = self.all.get(key)
        if group is None:
            group = self.all[key] = Group(key, kind, path, frames, name=name)
        if node.meta.get("role") == "saved" and _inside(path, str(node.meta["site"])):
            group.saved = str(node.meta["site"])
        group.members.append(node)
        self.of[node] = group

    # ---- runs of operations ------------------------------------------------------------------

    def _extend_run(self, node: Node, frames: Frames) -> None:
        if frames != self._run_frames:
            self._end_run()
        self._run_frames = frames
        self._run.append(node)

    def _end_run(self) -> None:
        run, self._run = self._run, []
        for name, nodes in _spans(run):
            if name and len(nodes) > 1:
                self._helper(nodes, name)
            elif not name and len(nodes) > _LONG_RUN:
                self._helper(nodes, "")
            else:
                for node in nodes:
                    self._single(node, name)

    def _helper(self, nodes: list[Node], name: str) -> None:
        frames = self._run_frames
        group = Group(f"op:{nodes[0].name}", "helper", _path(frames), frames, list(nodes), name)
        self.all[group.key] = group
        self.of.update(dict.fromkeys(nodes, group))

    def _single(self, node: Node, name: str = "") -> None:
        frames = self._reading.frames(node)
        group = Group(f"op:{node.name}", "op", _path(frames), frames, [node], name)
        self.all[group.key] = group
        self.of[node] = group

    # ---- afterthoughts -----------------------------------------------------------------------

    def _dissolve_passing(self) -> None:
        """Takes out modules that only pass a value on: dropout, identity, reshapes."""
        for key, group in list(self.all.items()):
            if group.kind == "module" and all(self._passes(n) for n in group.members):
                del self.all[key]
                for node in group.members:
                    del self.of[node]

    def _passes(self, node: Node) -> bool:
        if node.op == "call_module":
            module = self._reading.module(str(node.target))
            return ops.is_passing_module(type(module).__name__)
        if node.op == "get_attr":
            return not self._reading.weights(node)
        return ops.is_passing(node)

    def _split_cycles(self) -> None:
        """Splits helpers that both feed and read another group: drawn whole, they would loop."""
        for _ in range(8):
            graph = nx.DiGraph()
            flow: dict[Node, tuple[str, ...]] = {}
            for node in self._reading.nodes:
                inputs = [k for n in node.all_input_nodes for k in flow.get(n, ())]
                own = self.of.get(node)
                if own is not None:
                    graph.add_edges_from((k, own.key) for k in inputs if k != own.key)
                flow[node] = (own.key,) if own is not None else tuple(dict.fromkeys(inputs))
            tangled = {
                k for part in nx.strongly_connected_components(graph) if len(part) > 1 for k in part
            }
            helpers = [k for k in self.all if k in tangled and self.all[k].kind == "helper"]
            if not helpers:
                return
            for key in helpers:
                for node in self.all.pop(key).members:
                    self._single(node)


def _spans(run: list[Node]) -> list[tuple[str, list[Node]]]:
    """Cuts a run of operations by the helper function they come from.

    Only the innermost function of a node is known. A helper that calls another one encloses it:
    its first and last operation lie around the other's, so overlapping spans are one helper, with
    the name that spans most of it: the other may have been called before the first of them.
    """
    names = [_function(n) for n in run]
    last = {name: i for i, name in enumerate(names)}
    first = {name: len(names) - 1 - i for i, name in enumerate(reversed(names))}
    parts: list[tuple[str, list[Node]]] = []
    i = 0
    while i < len(run):
        name, end = names[i], i
        if not name:
            while end + 1 < len(run) and not names[end + 1]:
                end += 1
        else:
            end, at = last[name], i
            while at <= end:
                if names[at]:
                    end = max(end, last[names[at]])
                at += 1
            inside = dict.fromkeys(n for n in names[i : end + 1] if n)
            name = max(inside, key=lambda n: last[n] - first[n])
        parts.append((name, run[i : end + 1]))
        i = end + 1
    return parts


def _function(node: Node) -> str:
    source = node.meta.get("source")
    name = source.function if source is not None else "forward"
    return "" if name in _OWN or (name.startswith("<") and name.endswith(">")) else name


def _owner(frames: Frames, site: str) -> int:
    """Returns the index of the frame of a site, else of its owner, else how many frames there are.

    A bare parameter has no call of its own: its owner's call stands for it.
    """
    for path in (site, site.rpartition(".")[0]):
        at = next((i for i, (p, _) in enumerate(frames) if p == path), None)
        if at is not None:
            return at
    return len(frames)


def _inside(path: str, module: str) -> bool:
    return f"{path}.".startswith(f"{module}.")


def _path(frames: Frames) -> str:
    return frames[-1][0] if frames else ""
