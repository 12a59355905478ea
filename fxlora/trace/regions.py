"""Regions of a forward (`torch.no_grad()`, `torch.autocast(...)`) as pairs of nodes."""

from __future__ import annotations

import re
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


# What stands in generated code, where torch.compile follows a `with` and no `__enter__`.
enter_autocast.region = torch.autocast  # type: ignore[attr-defined]


def leave_autocast(region: torch.autocast) -> None:
    """Leaves an autocast region."""
    region.__exit__(None, None, None)


_ENTERS = re.compile(r"^(\w+)(?: : [^=]+)? = \S*enter_(?:grad_mode|autocast)\(")
_LEAVES = re.compile(r"^\w+(?: : [^=]+)? = \S*leave_(?:grad_mode|autocast)\((\w+)\)")
_DEEPEST = 15  # Python nests no more than twenty blocks


def closed_regions(body: list[str]) -> list[str]:
    """Returns the body of a function whose regions are left by an exception, too.

    The lines between the two nodes of a region go into a `with`, or a `try` whose `finally` leaves it:
    an error inside must not leave the process without gradients, and non-reentrant checkpointing
    ends every second run of a layer by an exception. What does not nest is left as it is.
    """
    lines = "".join(body).splitlines(keepends=True)
    pairs = _pairs(lines)
    starts = {end: start for start, end in pairs.items()}
    out: list[str] = []
    depth = 0
    for i, line in enumerate(lines):
        if i in starts:
            depth -= 1
            if not _is_autocast(lines[starts[i]]):
                out += ["    " * depth + "finally:\n", "    " * (depth + 1) + line]
            continue
        pad = "    " * depth
        if i not in pairs:
            out.append(pad + line)
            continue
        depth += 1
        if _is_autocast(line):
            call = line.partition(" = ")[2].rstrip()
            out.append(
                f"{pad}with {call.replace('enter_autocast(', 'enter_autocast.region(', 1)}:\n"
            )
        else:
            out += [pad + line, f"{pad}try:\n"]
        out.append(f"{pad}    pass\n")  # a pass may have left nothing but comments inside
    return out


def _is_autocast(line: str) -> bool:
    return "enter_autocast(" in line


def _pairs(lines: list[str]) -> dict[int, int]:
    """Returns the line that enters a region -> the line that leaves it; {} when they do not nest."""
    pairs: dict[int, int] = {}
    open_: list[tuple[str, int]] = []
    for i, line in enumerate(lines):
        if entered := _ENTERS.match(line):
            open_.append((entered.group(1), i))
        elif left := _LEAVES.match(line):
            name, start = open_.pop() if open_ else ("", 0)
            if name != left.group(1) or len(open_) > _DEEPEST:
                return {}
            pairs[start] = i
    return {} if open_ else pairs


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
