"""The errors fxlora raises; every message names the value, the candidates and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxloraError(Exception):
    """The base class of every error fxlora raises on purpose."""


class TraceError(FxloraError):
    """A model that cannot be traced: names the line of the model's code and what to do."""


class GuardError(FxloraError, ValueError):
    """An input that a traced graph does not stand for (a size, a flag, a mode)."""


class ConfigError(FxloraError, ValueError):
    """A `LoraConfig` value that cannot be honoured; raised before anything is changed."""


class ConfigTypeError(ConfigError, TypeError):
    """A `LoraConfig` value of the wrong type; a TypeError, as it is in PEFT."""


class NoMatchError(ConfigError):
    """A configuration that adapts nothing (PEFT raises NoMatchingPeftModuleError)."""


class UnsupportedError(ConfigError, NotImplementedError):
    """A field or a layer fxlora does not rewrite; refused by name, never ignored."""


class AdapterError(FxloraError, ValueError):
    """An adapter that is not there, or cannot be put beside, merged or combined with another."""


class CheckpointError(FxloraError, ValueError):
    """An adapter directory that does not fit the graph; nothing was loaded from it."""


class ModelSpecError(FxloraError, ValueError):
    """A model named on the command line that cannot be built."""


class UsageError(FxloraError, ValueError):
    """A command line whose options do not go together, or a file that cannot be written."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Returns `" Did you mean 'x'?"` for the nearest candidate, or an empty string.

    >>> did_you_mean("prj", ["proj", "head"])
    " Did you mean 'proj'?"
    >>> did_you_mean("zzz", ["proj", "head"])
    ''
    """
    near = difflib.get_close_matches(name, list(dict.fromkeys(candidates)), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
