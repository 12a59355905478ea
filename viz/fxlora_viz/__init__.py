"""Drawings of fxlora's graphs: traced, or before and after a LoRA rewrite.

fxlora_viz.draw(traced, lora).save("lora.svg")
"""

from fxlora_viz.drawing import Drawing, Options, TooLargeError, draw
from fxlora_viz.engines import EngineError, available_engines
from fxlora_viz.notebook import register as _register

__all__ = ["Drawing", "EngineError", "Options", "TooLargeError", "available_engines", "draw"]

_register()
