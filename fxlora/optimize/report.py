"""What each pass of an optimization did and what it left, with the reason: data that prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch.fx import GraphModule, Node

from fxlora.facts import OPTIMIZED
from fxlora.text import table


@dataclass(frozen=True)
class Refusal:
    """One place a pass left as it was.

    Attributes:
        where: the site, module or node.
        why: the reason, a clause.
    """

    where: str
    why: str


@dataclass(frozen=True)
class Step:
    """What one pass did.

    Attributes:
        name: of the pass, as docs/speed.md lists it.
        changed: how many places it changed.
        refused: the places it looked at and left.
    """

    name: str
    changed: int = 0
    refused: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Report:
    """What an optimization did, pass by pass; prints as a table.

    Attributes:
        mode: "exact", "memory" or "inference".
        steps: one for each pass, in the order in which they ran.
    """

    mode: str
    steps: tuple[Step, ...]

    def step(self, name: str) -> Step:
        """Returns the step of a pass.

        Raises:
            KeyError: when no pass of that name ran.
        """
        for step in self.steps:
            if step.name == name:
                return step
        raise KeyError(f"no pass {name!r} ran; these did: {[s.name for s in self.steps]}")

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [(s.name, str(s.changed), str(len(s.refused))) for s in self.steps]
        lines = [f"mode={self.mode!r}", table(("pass", "changed", "left"), rows, right=(1, 2))]
        for step in self.steps:
            by_reason: dict[str, list[str]] = {}
            for r in step.refused:
                by_reason.setdefault(r.why, []).append(r.where)
            for why, where in by_reason.items():
                first = where[0] if len(where) == 1 else f"{where[0]} and {len(where) - 1:,} more"
                lines.append(f"{step.name} left {first}: {why}")
        return "\n".join(lines)


def report(fast: GraphModule) -> Report:
    """Returns what `fxlora.optimize` did to make a graph.

    Raises:
        TypeError: when the graph was not made by `fxlora.optimize`.
    """
    found = getattr(fast, "meta", {}).get(OPTIMIZED)
    if not isinstance(found, Report):
        raise TypeError(
            f"{type(fast).__name__} was not made by fxlora.optimize: call fxlora.optimize(lora) and "
            "pass its result"
        )
    return found


def site_of(node: Node) -> str:
    """Returns what a reader calls the place of a node: its site, else its module, else its name."""
    site = node.meta.get("site")
    return str(site or (node.target if node.op == "call_module" else node.name))
