"""What runs a rewritten graph fast: passes over it, after which it is there to be executed only.

lora = fxlora.rewrite(traced, config)
fast = fxlora.optimize(lora)            # the same bits, the same parameters, fewer steps
print(report(fast))                     # what every pass changed and what it left, with reasons
"""

from fxlora.optimize.frontier import Frontier, frontier
from fxlora.optimize.report import Refusal, Report, Step, report
from fxlora.optimize.run import optimize

__all__ = ["Frontier", "Refusal", "Report", "Step", "frontier", "optimize", "report"]
