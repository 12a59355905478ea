"""A pass: dropout that does nothing goes, and the rest becomes a function.

    self.lora_dropout(x)  ->  x                           an Identity, or p = 0
    self.drop(x)          ->  dropout(x, self.drop)       drawn in train mode, x itself in eval mode

Bits stay, the random state too: torch draws nothing for p = 0 or in eval mode. The graph goes on
following train() and eval().
"""

from __future__ import annotations

from torch import nn
from torch.fx import Graph, Node

from fxlora.optimize import functions
from fxlora.optimize.edit import drop, read, replaced, why_not_plain
from fxlora.optimize.report import Refusal, Step


def dropouts(graph: Graph, root: nn.Module) -> Step:
    """Removes identities, and flattens nn.Dropout."""
    changed, left = 0, []
    for node in [n for n in graph.nodes if n.op == "call_module"]:
        path = str(node.target)
        module = root.get_submodule(path)
        if type(module) not in (nn.Dropout, nn.Identity):
            continue
        why = why_not_plain(module)
        if not why and (node.kwargs or len(node.args) != 1 or not isinstance(node.args[0], Node)):
            why = "it is called with other arguments than one tensor"
        if not why and getattr(module, "inplace", False):
            why = "it writes into its input"
        if why:
            left.append(Refusal(path, why))
            continue
        x = node.args[0]
        assert isinstance(x, Node)
        if type(module) is nn.Identity or module.p == 0:
            drop(graph, node, x)
        else:
            replaced(graph, node, functions.dropout, (x, read(graph, node, root, path)))
        changed += 1
    return Step("dropouts", changed, tuple(left))
