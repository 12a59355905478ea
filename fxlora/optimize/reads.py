"""Not a pass over nodes but over the code they become: parameters are read from their dicts.

    self.layers.q_proj.weight
    ->  m2 = self._modules["layers"]._modules["q_proj"];  m2._parameters["weight"]

nn.Module finds every name by a Python call that failed to find it as an attribute first; a deep name
costs two microseconds. The dicts are what that call looks into, so whatever moves, loads or replaces
a parameter is seen, and bits stay.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fxlora.trace.guards import InputGuards
from fxlora.trace.regions import closed_regions

_LINE = re.compile(r"^(\w+(?: : [^=]+)? = )(self\b|getattr\(+)")
_HOP = re.compile(r"\.([A-Za-z_]\w*)")
_NAMED = re.compile(r', "([^"]*)"\)')


class Reads:
    """Rewrites the lines of generated code that walk from `self` to a parameter or a module.

    Args:
        root: the graph module; what is read here is only which names are what.
    """

    def __init__(self, root: nn.Module) -> None:
        self._kinds: dict[str, str] = {}
        self._guards: set[str] = set()
        for path, module in root.named_modules(remove_duplicate=False):
            prefix = f"{path}." if path else ""
            if path:
                self._kinds[path] = "_modules"
            if isinstance(module, InputGuards):
                self._guards.add(path)
            for kind in ("_parameters", "_buffers"):
                for name in getattr(module, kind):
                    self._kinds[prefix + name] = kind

    def __call__(self, body: list[str]) -> list[str]:
        """Returns the body of a function with quick readings, and with regions that are closed."""
        known: dict[str, str] = {"": "self"}
        out: list[str] = []
        for line in "".join(body).splitlines(keepends=True):
            out += self._line(line, known)
        return closed_regions(out)

    def _line(self, line: str, known: dict[str, str]) -> list[str]:
        found = _LINE.match(line)
        if found is None:
            return [line]
        left, right = found.group(1), line[found.start(2) :]
        names, rest = _chain(right)
        path = ".".join(names)
        if not names or path not in self._kinds:
            return [line]
        before: list[str] = []
        expression = self._reach(path, known, before)
        if path in self._guards:  # nobody hooks it, and nn.Module's call takes a microsecond
            expression += ".forward"
        return [*before, f"{left}{expression}{rest}"]

    def _reach(self, path: str, known: dict[str, str], before: list[str]) -> str:
        """Returns an expression for a path, and adds the lines that find what it stands in."""
        if path in known:
            return known[path]
        owner, _, name = path.rpartition(".")
        kind = self._kinds[path]
        held = f"{self._reach(owner, known, before)}.{kind}[{name!r}]"
        if kind != "_modules":
            return held
        known[path] = f"_m{len(known)}"
        before.append(f"{known[path]} = {held}\n")
        return known[path]


def _chain(text: str) -> tuple[list[str], str]:
    """Splits `getattr(self.layers, "0").weight;  x = None` into its names and what follows."""
    if text.startswith("getattr("):
        names, rest = _chain(text[len("getattr(") :])
        named = _NAMED.match(rest)
        if named is None:
            return [], text
        names, rest = [*names, named.group(1)], rest[named.end() :]
    elif text.startswith("self"):
        names, rest = [], text[len("self") :]
    else:
        return [], text
    while hop := _HOP.match(rest):
        names.append(hop.group(1))
        rest = rest[hop.end() :]
    return names, rest


def read_quickly(made: Any) -> None:
    """Lets a graph module's generated code read from the dicts of its modules."""
    made.graph._codegen._body_transformer = Reads(made)
    made.recompile()
