"""Nodes of a rewrite -> the part of their site each is drawn in: W, A, B, d, m, rows, a product, a sum.

What is left over (casts, dropout, scaling, and the norm DoRA divides by) only passes values on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch.fx import Node

SOURCES = ("magnitude", "rows")  # parts that are parameters and read nothing


class Part(NamedTuple):
    """What a node is drawn as.

    Attributes:
        role: "base", "lora_A", "diagonal", "lora_B", "delta", "magnitude", "rows" or "sum".
        site: the adapted layer.
        unit: the call of the site, which has one W and one box.
        suffix: what tells this part from another of its role in the same call; often "".
    """

    role: str
    site: str
    unit: str
    suffix: str = ""


@dataclass
class _Unit:
    """What is known so far of one call of a site."""

    adapters: list[str] = field(default_factory=list)
    doras: set[str] = field(default_factory=set)
    stages: list[str] = field(default_factory=list)


def parts_of(nodes: Iterable[Node]) -> dict[Node, Part]:
    """Returns the part of every node that belongs to one.

    Args:
        nodes: of a graph, in order.
    """
    found: dict[Node, Part] = {}
    units: dict[str, _Unit] = {}
    for node in nodes:
        role, site, adapter = _role(node)
        if not role:
            continue
        unit = _unit(node, site)
        known = units.setdefault(unit, _Unit())
        if role == "sum":
            suffix = _stage(known, adapter)
        elif role == "base":
            suffix = ""
        else:
            if adapter not in known.adapters:
                known.adapters.append(adapter)
            known.doras |= {adapter} if role == "magnitude" else set()
            suffix = f"@{adapter}" if known.adapters.index(adapter) else ""
        found[node] = Part(role, site, unit, suffix)
    return found


def adapter_parameter(node: Node, container: str) -> bool:
    """Whether a node reads a parameter that hangs in a container such as `lora_diag`."""
    return node.op == "get_attr" and f".{container}." in f".{node.target}"


def _role(node: Node) -> tuple[str, str, str]:
    """Returns the drawn role of a node, its site and its adapter; ("", "", "") for none."""
    role, site = str(node.meta.get("role", "")), str(node.meta.get("site", ""))
    adapter = str(node.meta.get("adapter", ""))
    if "layer" in node.meta:  # a part of a fused layer is drawn beside the W it is a part of
        site, adapter = str(node.meta["layer"]), f"{adapter} {part_name(node)}"
    if not role:
        # The weight that trainable rows are put into is the base of their site.
        putting = [u for u in node.users if _puts_rows(u) and u.args[0] is node]
        if node.op == "get_attr" and putting:
            meta = putting[0].meta
            return "base", str(meta["site"]), str(meta["adapter"])
        return "", "", ""
    if role == "magnitude":
        if not adapter_parameter(node, "lora_magnitude_vector"):
            return "", "", ""
    elif role == "rows":
        role = "rows" if node.op == "get_attr" else "base"
    elif role == "sum" and any(_puts_rows(n) for n in node.all_input_nodes):
        role = "base"  # the lookup in a weight with trainable rows
    elif role == "lora_A" and _is_diagonal(node):
        role = "diagonal"
    drawn = ("base", "lora_A", "lora_B", "diagonal", "delta", "magnitude", "rows", "sum")
    return (role, site, adapter) if role in drawn else ("", "", "")


def part_name(node: Node) -> str:
    """Returns what of its layer a node's site is: "q", "call_0"; "" for the layer itself."""
    layer = node.meta.get("layer")
    return "" if layer is None else str(node.meta["site"])[len(str(layer)) + 1 :]


def _puts_rows(node: Node) -> bool:
    return node.meta.get("role") == "rows" and node.op == "call_method"


def _is_diagonal(node: Node) -> bool:
    """Whether a node is KaSA's diagonal, or its product with A(x)."""
    reads = [node, *node.all_input_nodes] if node.op == "call_method" else [node]
    return any(adapter_parameter(n, "lora_diag") for n in reads)


def _unit(node: Node, site: str) -> str:
    if "use" in node.meta:
        return f"{site}@{node.meta['use']}"
    frames = [(f.path, f.call) for f in node.meta.get("module_stack", ())]
    # A bare parameter has no call of its own: its owner's call stands for it.
    for path in (site, site.rpartition(".")[0]):
        call = next((c for p, c in frames if p == path and p), None)
        if call is not None:
            return call_key(site, call)
    if frames and node.meta.get("role", "rows") == "rows":
        # A weight with trainable rows may be read far from its module, and in several places.
        return f"{site}@{call_key(*frames[-1])}"
    return site


def _stage(unit: _Unit, adapter: str) -> str:
    """Returns the suffix of a sum: plain adapters share one, DoRA rescales what it is added to."""
    stage = adapter if adapter in unit.doras else ""
    if not unit.stages or unit.stages[-1] != stage:
        unit.stages.append(stage)
    return f"@{len(unit.stages) - 1}" if len(unit.stages) > 1 else ""


def call_key(path: str, call: int) -> str:
    """Returns the key of a call: its path, and its number from the second on."""
    return path if call == 0 else f"{path}#{call}"


def plain_name(node: Node) -> str:
    """Returns what a node runs or reads, by the name it has in the model.

    A module trained as a whole runs as a copy, `head.modules_to_save.default.0` for `head.0`.
    """
    target, meta = str(node.target), node.meta
    if meta.get("role") != "saved":
        return target
    return target.replace(f".modules_to_save.{meta['adapter']}", "", 1)
