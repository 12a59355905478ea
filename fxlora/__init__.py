"""fxlora: what a LoRA configuration does to a model, as a graph, before a GPU hour is spent.

traced = fxlora.trace(model, args, kwargs)
plan = fxlora.plan(traced, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
lora = fxlora.rewrite(traced, plan)
result = fxlora.compare(model, config, args, kwargs)
"""

from fxlora import adapters
from fxlora.checkpoint import load_adapter, save_adapter
from fxlora.compare import Comparison, compare
from fxlora.effects import effects
from fxlora.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    FxloraError,
    GuardError,
    NoMatchError,
    TraceError,
    UnsupportedError,
)
from fxlora.merge import merge
from fxlora.optimize import optimize
from fxlora.plan import Plan, plan
from fxlora.rewrite import rewrite
from fxlora.trace import trace

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "CheckpointError",
    "Comparison",
    "ConfigError",
    "FxloraError",
    "GuardError",
    "NoMatchError",
    "Plan",
    "TraceError",
    "UnsupportedError",
    "adapters",
    "compare",
    "effects",
    "load_adapter",
    "merge",
    "optimize",
    "plan",
    "rewrite",
    "save_adapter",
    "trace",
]
