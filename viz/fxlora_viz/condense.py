"""fx graph -> panel: a node for every module and operation a reader would name, nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule, Node

from fxlora_viz import ops
from fxlora_viz.captions import describe
from fxlora_viz.grouping import Group, Groups
from fxlora_viz.names import clean, number, tensor
from fxlora_viz.picture import Arrow, Item, Panel
from fxlora_viz.reading import Frames, Reading, leaves


def condense(
    graph_module: GraphModule, depth: int | None = None, cuts: frozenset[str] = frozenset()
) -> Panel:
    """Returns the panel of one graph: items and arrows, not yet folded.

    Args:
        graph_module: a traced or rewritten graph; read, never changed.
        depth: how many levels of modules to open; None opens all.
        cuts: names of nodes to mark on the arrows that lead through them: a gradient ends there.
    """
    return _Condenser(Reading(graph_module), depth, cuts).panel()


@dataclass(frozen=True)
class _Origin:
    """Where a value comes from: a group, what was written on the way, the last node."""

    key: str
    label: str = ""
    grad: bool | None = None


class _Condenser:
    """Follows values from group to group through everything that only passes them on."""

    def __init__(self, reading: Reading, depth: int | None, cuts: frozenset[str]) -> None:
        self._reading = reading
        self._cuts = cuts
        self._groups = Groups(reading, depth)
        self._live = self._live_nodes()
        self._origins: dict[Node, tuple[_Origin, ...]] = {}
        self._inputs: dict[str, dict[str, _Origin]] = {k: {} for k in self._groups.all}
        self._follow()
        self._drawn = self._choose()

    # ---- what matters ------------------------------------------------------------------------

    def _live_nodes(self) -> set[Node]:
        """Returns the nodes that depend on a parameter or on a real-valued input.

        The rest are masks, positions and tables: computed from sizes and integers, the same for
        every layer, read all over the sheet.
        """
        live: set[Node] = set()
        for node in self._reading.nodes:
            if node in self._reading.plumbing:
                continue
            if node.op == "placeholder":
                dtype = node.meta.get("dtype")
                known = "dtype" in node.meta or self._reading.info.dynamic
                if dtype.is_floating_point if dtype is not None else not known and node.users:
                    live.add(node)
            elif self._reading.weights(node) or any(n in live for n in node.all_input_nodes):
                live.add(node)
        return live

    def _choose(self) -> dict[str, Group]:
        """Returns the groups to draw: live ones, and what alone feeds them."""
        groups = self._groups.all
        live = {k for k, g in groups.items() if any(n in self._live for n in g.members)}
        wanted = [k for k in groups if k in live and not self._fed(k, live)]
        for _, node in self._outputs():
            wanted += [o.key for o in self._origins.get(node, ()) if o.key not in live]
        drawn = set(live)
        for key in wanted:  # grows while it is read: ancestors of what alone feeds a live group
            sources = self._inputs[key] if key in live or key in drawn else {}
            if key not in live:
                drawn.add(key)
                sources = self._inputs[key]
            for source in sources:
                if source not in drawn and self._varies(source):
                    drawn.add(source)
                    wanted.append(source)
        return {k: g for k, g in groups.items() if k in drawn}

    def _fed(self, key: str, live: set[str]) -> bool:
        return any(s in live and not self._groups.all[s].is_source for s in self._inputs[key])

    def _varies(self, key: str) -> bool:
        """Whether a group depends on an input's values, not on sizes alone."""
        seen, todo = {key}, [key]
        while todo:
            at = todo.pop()
            if self._groups.all[at].kind == "input":
                return True
            todo += [s for s in self._inputs[at] if s not in seen]
            seen.update(self._inputs[at])
        return False

    # ---- following values --------------------------------------------------------------------

    def _follow(self) -> None:
        for node in self._reading.nodes:
            if node.op == "output" or node in self._reading.plumbing:
                continue
            group = self._groups.of.get(node)
            if group is None:
                self._origins[node] = self._passed(node)
            else:
                self._read(node, group)
                self._origins[node] = (_Origin(group.key, "", self._reading.grad.get(node)),)
            for changed in node.meta.get("mutates", ()):
                # Whoever reads the tensor from here on reads what was written into it.
                self._origins[changed] = self._origins[node]

    def _passed(self, node: Node) -> tuple[_Origin, ...]:
        if node.meta.get("role") == "magnitude":
            return self._rescaled(node)
        inputs = node.all_input_nodes
        if ops.is_passing(node):
            inputs = inputs[:1]
        found: dict[str, _Origin] = {}
        grad = self._reading.grad.get(node)
        label = ""
        if node.meta.get("role") == "scale" and ops.symbol(node) == "×":
            factor = node.args[1]
            # A scaled embedding's own factor is a tensor, and no part of the adapter's scaling.
            label = "" if isinstance(factor, Node) else f"×{number(factor)}"
        elif "role" not in node.meta:
            label = ops.factor(node)
        if node.name in self._cuts:
            label = f"✕ {ops.title(node)}: no gradient"
        for source in inputs:
            for origin in self._origins.get(source, ()):
                text = " ".join(t for t in (origin.label, label) if t)
                found[origin.key] = replace(origin, label=text, grad=grad)
        return tuple(found.values())

    def _rescaled(self, node: Node) -> tuple[_Origin, ...]:
        """Follows DoRA's g = m / |W + s B A| and what it multiplies, and leaves out the norm.

        The norm is outside the gradient, and calls A and B a second time on an identity matrix:
        drawn, it would double every arrow of the site.
        """
        inputs = node.all_input_nodes
        if node.op == "call_module" and "lora_dora_base" not in str(node.target):
            inputs = []
        elif node.op == "call_module" or ops.symbol(node) == "÷":
            inputs = inputs[:1]
        found = {o.key: o for source in inputs for o in self._origins.get(source, ())}
        return tuple(found.values())

    def _read(self, node: Node, group: Group) -> None:
        into = self._inputs[group.key]
        for source in node.all_input_nodes:
            for origin in self._origins.get(source, ()):
                if origin.key == group.key:
                    continue
                label, role = origin.label, self._groups.all[origin.key].name
                if group.name == "sum" and "alpha" in node.kwargs and role == "delta":
                    label = f"×{number(node.kwargs['alpha'])}"
                elif group.name == "sum" and role == "magnitude":
                    label = "×g"
                before = into.get(origin.key)
                grad = origin.grad if before is None else (before.grad or origin.grad)
                into[origin.key] = replace(origin, label=label, grad=grad)

    # ---- the result --------------------------------------------------------------------------

    def panel(self) -> Panel:
        """Returns items and arrows."""
        items: dict[str, Item] = {}
        arrows: list[Arrow] = []
        live = {k for k, g in self._drawn.items() if any(n in self._live for n in g.members)}
        for key, group in self._drawn.items():
            fed = self._fed(key, live)
            beside = [
                s for s in self._inputs[key] if s not in self._drawn or (fed and s not in live)
            ]
            real = sum(s in self._drawn and s not in beside for s in self._inputs[key])
            item = describe(group, self._reading, real)
            tags = self._tags(beside, group)
            items[key] = replace(item, tags=tags, tag_keys=self._side_sources(beside))
            for source, origin in self._inputs[key].items():
                if source in self._drawn and source not in beside:
                    arrows.append(Arrow(source, key, origin.label, origin.grad))
        self._add_outputs(items, arrows)
        trainable, total = self._reading.totals()
        return Panel(
            items,
            arrows,
            types=dict(self._reading.info.module_types),
            facts=_facts(self._reading, trainable, total),
        )

    def _tags(self, beside: list[str], group: Group) -> tuple[str, ...]:
        """Names what is read without an arrow: the module that made it, or the input."""
        found: dict[str, None] = {}
        for key in beside:
            source = self._groups.all[key]
            if source.kind == "module" and source.path != group.path:
                found[source.path.rpartition(".")[2]] = None
                continue
            for name in self._input_names(key):
                found[name] = None
        return tuple(clean(n, 40) for n in found)

    def _side_sources(self, beside: list[str]) -> tuple[tuple[str, Frames], ...]:
        """Returns everything the tags are computed from, and where each of it runs."""
        seen, todo = dict.fromkeys(beside), list(beside)
        while todo:
            for s in self._inputs[todo.pop()]:
                if s not in seen:
                    seen[s] = None
                    todo.append(s)
        return tuple((k, self._groups.all[k].frames) for k in seen)

    def _input_names(self, key: str) -> list[str]:
        seen = [k for k, _ in self._side_sources([key])]
        found = [k for k in seen if self._groups.all[k].kind == "input"]
        masks = [k for k in found if "mask" in k]
        return [str(self._groups.all[k].members[0].target) for k in sorted(masks or found)]

    def _outputs(self) -> list[tuple[str, Node]]:
        node = self._reading.nodes[-1]
        return list(leaves(node.args[0])) if node.op == "output" else []

    def _add_outputs(self, items: dict[str, Item], arrows: list[Arrow]) -> None:
        for name, node in self._outputs():
            origins = [o for o in self._origins.get(node, ()) if o.key in self._drawn]
            if not origins:
                continue
            title = clean(name or "output")
            key = f"output:{title}"
            if key not in items:
                shape, dtype = node.meta.get("shape"), node.meta.get("dtype")
                text = tensor(shape, dtype)
                items[key] = Item(
                    key, "output", title, (text,) if text else (), shape=shape, dtype=dtype,
                    grad=self._reading.grad.get(node), members=(node.name,),
                )  # fmt: skip
            have = {(a.source, a.target) for a in arrows}
            arrows += [
                Arrow(o.key, key, o.label, o.grad) for o in origins if (o.key, key) not in have
            ]


def _facts(reading: Reading, trainable: int, total: int) -> dict[str, Any]:
    plans = [reading.info.adapters[name] for name in reading.info.active]
    adapted = [s for plan in plans for s in plan if s.verdict == "adapted"]
    # A call that several adapters, or DoRA's several sums, stand behind is still one call.
    calls = [n for n in reading.nodes if n.meta.get("role") == "base"]
    return {
        "model": reading.info.model_class or type(reading.graph_module).__name__,
        "trainable": trainable,
        "total": total,
        "ranks": tuple(sorted({s.rank for s in adapted})),
        "alphas": tuple(sorted({s.alpha for s in adapted})),
        "rewritten": len(calls),
        "sites": len({str(n.meta["site"]) for n in calls}),
        "adapters": reading.info.active,
    }
