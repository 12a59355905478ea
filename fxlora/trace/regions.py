"""Grad-mode regions (`torch.no_grad()` inside a forward) as a pair of nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node


def enter_grad_mode(enabled: bool) -> bool:
    """Switches grad mode and returns what it was, for `leave_grad_mode`."""
    before = torch.is_grad_enabled()
    # Inside enable_grad() under a caller's no_grad() the model would record a graph; so do we.
    torch._C._set_grad_enabled(enabled)
    return before


def leave_grad_mode(before: bool) -> None:
    """Restores the grad mode `enter_grad_mode` found."""
    torch._C._set_grad_enabled(before)


class GradRegions:
    """Pairs the switches of grad mode seen while recording."""

    def __init__(self) -> None:
        self._open: list[tuple[Node, bool]] = []

    def switch(self, create: Any, graph: Graph, before: bool, enabled: bool) -> None:
        """Records one switch: the opening of a region, or the closing of the innermost one."""
        if self._open and self._open[-1][1] == enabled:
            node, _ = self._open.pop()
            if next(reversed(graph.nodes)) is node:
                graph.erase_node(node)  # nothing happened inside
                return
            create("call_function", leave_grad_mode, (node,), {})
        elif before != enabled:
            self._open.append((create("call_function", enter_grad_mode, (enabled,), {}), before))
