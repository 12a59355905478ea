"""Model (+ example inputs) -> torch.fx.GraphModule, with everything the later layers read."""

from __future__ import annotations

from fxlora.trace.tracer import trace

__all__ = ["trace"]
