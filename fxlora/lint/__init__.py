"""The linter: rules with stable ids over a traced graph and a plan, before a GPU hour is spent.

report = fxlora.lint.lint(traced, config)
print(report)
"""

from fxlora.lint.context import Options
from fxlora.lint.finding import Finding, Report, Rule, Severity
from fxlora.lint.run import lint
from fxlora.lint.settings import Settings

__all__ = ["Finding", "Options", "Report", "Rule", "Settings", "Severity", "lint"]
