"""Regions of a forward (`torch.no_grad()`, `torch.autocast(...)`) as pairs of nodes."""

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


def enter_autocast(
    device_type: str, dtype: torch.dtype | None, enabled: bool, cache_enabled: bool | None
) -> torch.autocast:
    """Enters an autocast region and returns it, for `leave_autocast`."""
    region = torch.autocast(device_type, dtype, enabled, cache_enabled)
    region.__enter__()  # type: ignore[no-untyped-call]
    return region


def leave_autocast(region: torch.autocast) -> None:
    """Leaves an autocast region."""
    region.__exit__(None, None, None)


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


class AutocastRegions:
    """Pairs entering and leaving autocast.

    Attributes:
        current: (device type, dtype) of the innermost region that casts; None outside.
    """

    def __init__(self) -> None:
        self._open: list[tuple[Node, tuple[str, str] | None]] = []
        self.current: tuple[str, str] | None = None

    def enter(self, create: Any, region: Any) -> None:
        """Records the opening of a region."""
        args = (region.device, region.fast_dtype, region._enabled, region._cache_enabled)
        self._open.append((create("call_function", enter_autocast, args, {}), self.current))
        self.current = (region.device, str(region.fast_dtype)) if region._enabled else None

    def leave(self, create: Any, graph: Graph) -> None:
        """Records the closing of the innermost region."""
        node, self.current = self._open.pop()
        if next(reversed(graph.nodes)) is node:
            graph.erase_node(node)
            return
        create("call_function", leave_autocast, (node,), {})
