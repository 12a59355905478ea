"""Someone else's graph -> the low-rank pairs in it, by structure: recognise, strip, lift."""

from __future__ import annotations

from fxlora.recognise.found import Found, LowRank
from fxlora.recognise.lift import Lifted, lift
from fxlora.recognise.match import recognise
from fxlora.recognise.strip import strip

__all__ = ["Found", "Lifted", "LowRank", "lift", "recognise", "strip"]
