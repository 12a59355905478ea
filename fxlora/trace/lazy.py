"""A GraphModule whose code is generated when somebody asks for it: most graphs are only read."""

from __future__ import annotations

import weakref
from typing import Any

from torch.fx import Graph, GraphModule


class _Forward:
    """`forward` until there is code: reading it, of the module or of its class, makes the code.

    Every GraphModule is the one instance of a class of its own.
    """

    def __get__(self, module: Any, owner: Any) -> Any:
        made = owner._made() if module is None else module
        made.recompile()
        return vars(owner)["forward"] if module is None else made.forward


class LazyGraphModule(GraphModule):
    """A GraphModule that is equal to its like in everything but when its code is made."""

    forward = _Forward()

    @property
    def graph(self) -> Graph:
        """The graph."""
        return self._graph

    @graph.setter
    def graph(self, graph: Graph) -> None:
        own: Any = type(self)
        own._made = weakref.ref(self)
        self._graph = graph
        graph.owning_module = self
        if "forward" in vars(own):
            del own.forward

    @property
    def code(self) -> str:
        """The code of `forward`."""
        if "forward" not in vars(type(self)):
            self.recompile()
        made: str = self._code
        return made

    def __reduce__(self) -> Any:
        # What is pickled is the code, taken from the attributes before they could be made.
        _ = self.code
        return super().__reduce__()

    def __str__(self) -> str:
        _ = self.code
        return super().__str__()
