"""Where in a model a site stands: its container, its layer, and what it is for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxlora import layers
from fxlora.sites import Site
from fxlora.targets import SEQ_CLS_HEADS

ROLES = ("attention", "mlp", "experts", "router", "embedding", "head", "conv", "other")
_IN_ATTENTION = re.compile(r"attn|attention|mixer", re.IGNORECASE)
_IN_MLP = re.compile(r"mlp|feed_?forward|ffn|densereludense|intermediate|^fc\d*$|output", re.I)


@dataclass(frozen=True)
class Place:
    """Where a site stands in its model.

    Attributes:
        container: the list of layers it is in, `model.layers`; "" outside of any.
        layer: its index there; None outside of any.
        target: its name inside the layer, with further numbers left open: `mlp.experts.*.w1`.
    """

    container: str
    layer: int | None
    target: str


def place_of(name: str) -> Place:
    """Returns where a site stands, by its name.

    >>> place_of("model.layers.3.mlp.experts.7.w1")
    Place(container='model.layers', layer=3, target='mlp.experts.*.w1')
    >>> place_of("lm_head")
    Place(container='', layer=None, target='lm_head')
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit() and 0 < i < len(parts) - 1:
            inner = ["*" if p.isdigit() else p for p in parts[i + 1 :]]
            return Place(".".join(parts[:i]), int(part), ".".join(inner))
    return Place("", None, name)


def role_of(site: Site, model: nn.Module) -> str:
    """Returns what a site is for: one of `ROLES`.

    By its kind, by the model's own word for its output layer, and else by the names and classes of
    the modules around it; a name that says nothing gives "other".
    """
    if site.kind == "Embedding":
        return "embedding"
    if layers.is_conv(site.kind):
        return "conv"
    if site.name and site.name == head_of(model):
        return "head"
    around = site.name.split(".")
    if _is_router(site, model):
        return "router"
    if "experts" in around or (site.kind == "Parameter" and len(site.shape) == 3):
        return "experts"
    if site.kind == "MultiheadAttention":
        return "attention"
    for i in range(len(around) - 1, 0, -1):
        inside = ".".join(around[:i])
        words = (around[i - 1], type(layer_at(model, inside)).__name__)
        for role, words_of in (("attention", _IN_ATTENTION), ("mlp", _IN_MLP)):
            if any(words_of.search(w) for w in words):
                return role
    return "mlp" if around and _IN_MLP.search(around[-1]) else "other"


def layer_at(model: nn.Module, name: str) -> Any:
    """Returns the module of a name; the model itself for none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def head_of(model: nn.Module) -> str | None:
    """Returns the name of a model's output layer, if it says which that is."""
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    if head is None:
        head = next((h for n in SEQ_CLS_HEADS if (h := getattr(model, n, None)) is not None), None)
    return next((n for n, m in model.named_modules() if m is head), None) if head else None


def _is_router(site: Site, model: nn.Module) -> bool:
    """Whether a site chooses among experts that stand beside it, or around the module it is in."""
    owner = site.name.rpartition(".")[0]
    last = site.name.rpartition(".")[2] if site.kind != "Parameter" else owner.rpartition(".")[2]
    if last not in ("gate", "router", "classifier", "wg", "shared_expert_gate", "layer"):
        return False
    beside = {owner, owner.rpartition(".")[0]}
    return any(hasattr(layer_at(model, b), "experts") for b in beside)
