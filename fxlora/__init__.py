"""fxlora: what a LoRA configuration does to a model, as a graph, before a GPU hour is spent."""

from fxlora.trace import trace

__all__ = ["trace"]
