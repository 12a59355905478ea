"""Shows fxlora's graphs as pictures in a notebook, once fxlora_viz is imported there."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from torch.fx import GraphModule

from fxlora.facts import KEY, TraceInfo
from fxlora_viz.drawing import TooLargeError, draw
from fxlora_viz.engines import EngineError


def register() -> bool:
    """Makes IPython show traced and rewritten graphs as SVG; returns whether there is one."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    formatter = getattr(shell, "display_formatter", None)
    if formatter is None:
        return False
    formatter.formatters["image/svg+xml"].for_type(GraphModule, graph_svg)
    return True


def graph_svg(graph_module: Any) -> str | None:
    """Returns the picture of a graph; None, which leaves the text, for one that is not fxlora's.

    Where no picture can be had the text is left too, and a warning says what to do.
    """
    if not isinstance(getattr(graph_module, "meta", {}).get(KEY), TraceInfo):
        return None
    try:
        return draw(graph_module).inline_svg
    except (EngineError, TooLargeError) as error:
        warnings.warn(f"shown as text: {error}", stacklevel=2)
        return None
