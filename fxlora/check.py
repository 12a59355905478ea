"""Which tensor of an adapter file lands where in a graph; what is missing, unexpected, misshapen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from fxlora.errors import did_you_mean
from fxlora.facts import info
from fxlora.html import Printed
from fxlora.keys import PREFIX, Entry, entries
from fxlora.text import count, table

_REQUIRED = ("adapter", "bias")


@dataclass(frozen=True)
class Row:
    """One tensor, of the file or of the graph.

    Attributes:
        key: its name on disk.
        name: its name in the graph; "" when the graph has no place for it.
        site: the site or module it lands on.
        kind: "adapter", "bias", "again", "embedding" or "" (see `fxlora.keys.Entry`).
        status: "fits", "missing", "unexpected" or "misshapen".
        note: the shapes, or the nearest name.
    """

    key: str
    name: str
    site: str
    kind: str
    status: str
    note: str = ""


@dataclass(frozen=True)
class Check(Printed):
    """What a file holds against what a graph needs; prints what does not fit.

    Attributes:
        rows: one for every tensor, the file's first.
        tensors: name on disk (as the graph has it) -> tensor.
        adapter: the adapter's name in the graph.
    """

    rows: tuple[Row, ...]
    tensors: dict[str, torch.Tensor] = field(repr=False, default_factory=dict)
    adapter: str = ""

    @property
    def fits(self) -> bool:
        """Whether nothing is missing, unexpected or misshapen."""
        return all(r.status == "fits" for r in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns the check as plain data, for JSON."""
        from dataclasses import asdict

        return {
            "fits": self.fits,
            "counts": dict(Counter(r.status for r in self.rows)),
            "rows": [asdict(r) for r in self.rows],
        }

    def _parts(self) -> Iterable[str]:
        bad = [r for r in self.rows if r.status != "fits"]
        good = len(self.rows) - len(bad)
        sites = {r.site for r in self.rows if r.status == "fits"}
        lines = [f"{count(good, 'tensor')} fit, on {count(len(sites), 'module')}"]
        tally = Counter(r.status for r in bad)
        lines += [f"{count(n, 'tensor')} {status}" for status, n in sorted(tally.items())]
        if bad:
            cells = [(r.status, r.key.removeprefix(PREFIX), r.note) for r in bad[:20]]
            lines += ["", table(("status", "tensor", "note"), cells)]
        if len(bad) > 20:
            lines.append(f"... and {len(bad) - 20} more")
        return lines


def check_tensors(
    lora: GraphModule, adapter: str, tensors: dict[str, torch.Tensor], config: Any
) -> Check:
    """Holds the tensors of a file against an adapter of a graph; loads nothing.

    Args:
        lora: a graph with the adapter in it.
        adapter: its name.
        tensors: of the file, by their names on disk; meta tensors will do.
        config: the file's LoraConfig.
    """
    wanted = {e.key: e for e in entries(lora, adapter)}
    held = {**dict(lora.named_parameters(remove_duplicate=False)), **dict(lora.named_buffers())}
    tensors = _as_written(tensors, wanted, lora, adapter, config)
    rows = [_row(k, t, wanted, held) for k, t in tensors.items()]
    for key, entry in wanted.items():
        if key not in tensors and entry.kind in _REQUIRED:
            near = did_you_mean(key, [k for k in tensors if k not in wanted])
            shape = tuple(held[entry.name].shape)
            rows.append(
                Row(key, entry.name, entry.site, entry.kind, "missing", f"needed as {shape}.{near}")
            )
    return Check(tuple(rows), tensors, adapter)


def _row(
    key: str, tensor: torch.Tensor, wanted: dict[str, Entry], held: dict[str, torch.Tensor]
) -> Row:
    entry = wanted.get(key)
    if entry is None:
        near = did_you_mean(key.removeprefix(PREFIX), [w.removeprefix(PREFIX) for w in wanted])
        return Row(key, "", "", "", "unexpected", f"no place for it in the graph.{near}")
    there, here = tuple(tensor.shape), tuple(held[entry.name].shape)
    if there != here:
        note = f"{there} on disk, {here} in the graph"
        return Row(key, entry.name, entry.site, entry.kind, "misshapen", note)
    return Row(key, entry.name, entry.site, entry.kind, "fits")


def _as_written(
    tensors: dict[str, torch.Tensor], wanted: dict[str, Entry], lora: GraphModule, adapter: str,
    config: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Renames keys of older files: torch.compile's `_orig_mod.`, and v4's names of MoE experts."""
    made: dict[str, torch.Tensor] = {}
    for k, t in tensors.items():
        made.setdefault(_place(k.replace("_orig_mod.", ""), wanted), t)
    if all(k in wanted for k in made):
        return made
    model = info(lora).model
    if not hasattr(getattr(model, "config", None), "model_type"):
        return made
    from peft.utils import transformers_weight_conversion as conversion

    convert = getattr(conversion, "convert_peft_adapter_state_dict_for_transformers", None)
    if convert is None:
        return made
    converted = convert(
        model=model, peft_config=config, adapter_state_dict=dict(made), adapter_name=adapter
    )
    named = re.compile(rf"\.{re.escape(adapter)}(?=\.|$)")
    return {_prefixed(named.sub("", k)): t for k, t in converted.items()}


def _place(key: str, wanted: dict[str, Entry]) -> str:
    """Returns the key this graph has for a base tensor that PEFT wrote under another of its names.

    With bias="all" PEFT writes a whole module's bias twice, and which layers are wrapped depends on
    the other adapters the model had.
    """
    if key in wanted or not key.endswith(".bias"):
        return key
    stem = key.removesuffix(".bias").removesuffix(".base_layer")
    # Of a copy: inside a container its key keeps the name the adapter was saved under.
    inside = re.sub(r"\.modules_to_save\.[^.]+\.(?=.)", ".", key)
    copied = key.replace(".modules_to_save.", ".")
    for other in (inside, copied, f"{stem}.bias", f"{stem}.base_layer.bias"):
        if other in wanted:
            return other
    return key


def _prefixed(key: str) -> str:
    return key if key.startswith(PREFIX) else PREFIX + key
