"""The dtype an inserted node really gives, told from what it reads: a check on what it claims.

A node of the trace carries the dtype that was recorded when it ran. A node of a rewrite carries what
the rewrite says, and a proof that believed it would take over any mistake made there.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from fxlora.gradients import attribute, target_name
from fxlora.nodes import autocast_dtype, wide

CASTS = frozenset("to cast_like type type_as float half bfloat16 double".split())
_WORDS = {
    "float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16,
    "double": torch.float64,
}  # fmt: skip
_MADE = frozenset(("eye", "tensor"))  # of no tensor: they say the dtype
_AS_FIRST = frozenset("index_copy add_ baddbmm".split())  # of several dtypes they keep the first's
# What torch.autocast does not touch. What it does to anything else is not told here.
_NOT_AUTOCAST = frozenset(
    "add sub mul div detach T t view reshape transpose permute embedding".split()
)
_RECORDED = (None, "base", "saved")


def true_dtypes(graph_module: GraphModule) -> dict[Node, Any]:
    """Returns the dtype of every node's tensor; None where it has none or none can be told."""
    found: dict[Node, Any] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            found[node] = getattr(attribute(graph_module, str(node.target)), "dtype", None)
        elif node.meta.get("role") in _RECORDED:
            found[node] = node.meta.get("dtype")
        else:
            found[node] = _derived(node, target_name(node), found)
    return found


def _derived(node: Node, name: str, found: dict[Node, Any]) -> Any:
    given = [n for n in node.all_input_nodes if found.get(n) is not None]
    if name in CASTS:
        return _cast(node, name, found)
    if name in _MADE:
        return node.kwargs.get("dtype", node.meta.get("dtype"))
    if not given or name in ("device", "dtype", "shape"):
        return None
    if name in _AS_FIRST:
        return found[given[0]]
    if node.meta.get("autocast") is not None and name not in _NOT_AUTOCAST:
        return autocast_dtype(node)
    if node.target is F.embedding:  # indices, then the rows
        return found[given[-1]]
    return reduce(wide, (found[n] for n in given))


def _cast(node: Node, name: str, found: dict[Node, Any]) -> Any:
    if name in _WORDS:
        return _WORDS[name]
    said = [a for a in (*node.args[1:], *node.kwargs.values()) if _says_dtype(a, found)]
    if not said:
        return found.get(node.args[0])  # type: ignore[arg-type]
    return found[said[0]] if isinstance(said[0], Node) else said[0]


def _says_dtype(value: Any, found: dict[Node, Any]) -> bool:
    return isinstance(value, torch.dtype) or (
        isinstance(value, Node) and found.get(value) is not None
    )
