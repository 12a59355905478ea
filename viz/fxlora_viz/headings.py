"""The words above a panel: which model, how many parameters, what trains."""

from __future__ import annotations

from typing import Any

from fxlora_viz.names import clean, number, percent, quantity

Parts = tuple[tuple[str, bool], ...]  # (text, whether it is emphasised)


def heading(facts: dict[str, Any], index: int, count: int) -> tuple[str, Parts]:
    """Returns the title of a panel and the parts of the line below it.

    Args:
        facts: of the panel.
        index: its place on the sheet.
        count: how many panels there are.
    """
    model = clean(facts.get("model", ""), 60)
    trainable, total = int(facts.get("trainable", 0)), int(facts.get("total", 0))
    trains = (f"{quantity(trainable)} trainable ({percent(trainable, total)})", True)
    rewritten = int(facts.get("rewritten", 0))
    if count == 1:
        title = model
    elif index == 0:
        title = "Before"
    else:
        title = "After LoRA" if rewritten else "After"
    if not rewritten:
        start = f"{model} · " if title != model else ""
        if trainable == total:
            return title, ((f"{start}{quantity(total)} params, all trainable", False),)
        return title, ((f"{start}{quantity(total)} params · ", False), trains)
    start = f"{quantity(total)} params · " if count == 1 else ""
    return title, ((f"{start}{_settings(facts)} · ", False), trains, *_idle(facts))


def _idle(facts: dict[str, Any]) -> Parts:
    """Says how many adapters learn nothing; nothing where all of them learn."""
    idle, hung = int(facts.get("idle", 0)), int(facts.get("adapters_hung", 0))
    if not idle:
        return ()
    noun = "adapter" if hung == 1 else "adapters"
    verb = "learns" if idle == 1 else "learn"
    return ((" · ", False), (f"{idle} of {hung} {noun} {verb} nothing", True))


def _settings(facts: dict[str, Any]) -> str:
    calls, sites = int(facts["rewritten"]), int(facts["sites"])
    said = []
    if len(facts.get("adapters", ())) > 1:
        said.append(f"{len(facts['adapters'])} adapters")
    if facts.get("ranks"):
        said.append(f"r = {_range(facts['ranks'])}")
    if facts.get("alphas"):
        said.append(f"alpha = {_range(facts['alphas'])}")
    noun = "call site" if calls == 1 else "call sites"
    of = "" if calls == sites else f" of {sites} module{'' if sites == 1 else 's'}"
    said.append(f"{calls} {noun}{of} rewritten")
    return " · ".join(said)


def _range(values: tuple[Any, ...]) -> str:
    low, high = number(values[0]), number(values[-1])
    return low if low == high else f"{low}–{high}"
