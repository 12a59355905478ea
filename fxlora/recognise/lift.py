"""The low-rank pairs of a graph as plain data beside the graph without them, and as PEFT's files."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from fxlora.checkpoint import CONFIG, WEIGHTS
from fxlora.errors import AdapterError, CheckpointError
from fxlora.keys import PREFIX
from fxlora.recognise.found import LowRank
from fxlora.recognise.match import recognise
from fxlora.recognise.strip import strip


@dataclass(frozen=True)
class Pair:
    """One adapter of one site, in PEFT's orientation.

    Attributes:
        site: the path of what holds the base weight.
        form: as `LowRank.form`.
        a, b: (r, in) and (out, r); of a convolution with its kernel.
        bias: of B, or None.
        scaling: the number s in s B A.
        dropout: on the input of A.
    """

    site: str
    form: str
    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    scaling: float
    dropout: float

    @property
    def r(self) -> int:
        """The rank."""
        return int(self.a.shape[0])


@dataclass(frozen=True)
class Lifted:
    """A graph without its low-rank pairs, and the pairs.

    Attributes:
        graph: the stripped graph.
        adapters: "default", "default_2", ... -> site -> its pair; the n-th pair of every site
            makes the n-th adapter.
    """

    graph: Any
    adapters: dict[str, dict[str, Pair]]

    def save(
        self, directory: str | os.PathLike[str], adapter: str = "default",
        rename: Callable[[str], str] = lambda site: site,
    ) -> Path:  # fmt: skip
        """Writes one adapter as a directory `peft.PeftModel.from_pretrained` loads.

        Args:
            directory: made when it is not there.
            adapter: which one.
            rename: turns a site's path in this graph into its path in the base model; a wrapper
                of one's own puts a level of its own in between (`q_proj.linear` for `q_proj`).

        Raises:
            AdapterError: when there is no such adapter.
            CheckpointError: when the pairs do not fit one `LoraConfig`.
        """
        from safetensors.torch import save

        if adapter not in self.adapters:
            raise AdapterError(
                f"no adapter {adapter!r} was lifted; there are {list(self.adapters)}"
            )
        pairs = {rename(site): p for site, p in self.adapters[adapter].items()}
        settings = settings_of(pairs, self._others(pairs))
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WEIGHTS).write_bytes(save(tensors_of(pairs), metadata={"format": "pt"}))
        (folder / CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")
        return folder

    def _others(self, pairs: dict[str, Pair]) -> list[str]:
        if not isinstance(self.graph, GraphModule):
            return []
        return [n for n, _ in self.graph.named_modules() if n not in pairs]


def lift(graph: GraphModule | ExportedProgram) -> Lifted:
    """Takes the low-rank pairs out of a graph, as data.

    Args:
        graph: as for `recognise`; read.

    Raises:
        AdapterError: as `strip`, and for a pair that is no plain LoRA (DoRA, a vector between the
            factors, a stack of experts), which these files cannot say.
    """
    sites: dict[str, dict[tuple[str, str], Pair]] = {}
    held, all_found = _tensors(graph), recognise(graph)
    own = _orientations(all_found)
    for found in all_found:
        made = _pair(found, held)
        key = (found.a, found.b)
        if found.base_turned != own[found.site]:  # x W beside x W^T: the factors change places
            made = replace(made, a=made.b.t(), b=made.a.t())
            key = (found.b, found.a)
        known = sites.setdefault(found.site, {})
        before = known.setdefault(key, made)
        if before.scaling != made.scaling:
            raise AdapterError(
                f"{found.site!r}: the pair {found.a!r}, {found.b!r} is scaled by {before.scaling} at "
                f"one call and by {made.scaling} at another; one adapter has one scaling"
            )
    adapters: dict[str, dict[str, Pair]] = {}
    for site, pairs in sites.items():
        for i, pair in enumerate(pairs.values()):
            name = "default" if i == 0 else f"default_{i + 1}"
            adapters.setdefault(name, {})[site] = pair
    return Lifted(strip(graph), adapters)


def _orientations(found: Iterable[LowRank]) -> dict[str, bool]:
    """Returns how every site's own map reads its weight: as its module does, or its first use."""
    own: dict[str, bool] = {}
    for p in sorted(found, key=lambda p: p.base.op != "call_module"):
        own.setdefault(p.site, p.base_turned)
    return own


def _tensors(graph: GraphModule | ExportedProgram) -> dict[str, torch.Tensor]:
    if isinstance(graph, ExportedProgram):
        return {k: v for k, v in {**graph.state_dict, **graph.constants}.items()
                if isinstance(v, torch.Tensor)}  # fmt: skip
    return {**dict(graph.named_parameters(remove_duplicate=False)),
            **dict(graph.named_buffers(remove_duplicate=False))}  # fmt: skip


def _pair(found: LowRank, held: dict[str, torch.Tensor]) -> Pair:
    if found.gains:
        raise AdapterError(f"{found.site!r} has a DoRA gain; strip takes it off, lift does not yet")
    if found.rows != ():
        raise AdapterError(
            f"{found.site!r}: the pair {found.a!r}, {found.b!r} is for {found.where} of the layer only, "
            "and PEFT's adapters are for all of it"
        )
    scaling = found.scaling
    for name in found.scaled_by:
        value = held.get(name)
        if value is None or value.numel() != 1 or value.device.type == "meta":
            raise AdapterError(
                f"{found.site!r}: the pair is scaled by {name!r}, which is no single number, and a "
                "LoraConfig has one scaling a site"
            )
        scaling *= float(value)
    a, b = (held[n].detach() for n in (found.a, found.b))
    a, b = (t.t() if turned else t for t, turned in zip((a, b), found.turned, strict=True))
    if found.form == "delta" and (a.shape[0] != found.r or b.shape[1] != found.r):
        raise AdapterError(f"{found.site!r} is a stack of weights; lift takes one weight at a time")
    bias = held[found.b_bias].detach() if found.b_bias else None
    return Pair(found.site, found.form, a, b, bias, scaling, found.dropout)


def tensors_of(pairs: dict[str, Pair]) -> dict[str, torch.Tensor]:
    """Returns what the file holds: PEFT's name on disk -> tensor."""
    out: dict[str, torch.Tensor] = {}
    for site, p in pairs.items():
        names = ("lora_embedding_A", "lora_embedding_B") if p.form == "rows" else (
            "lora_A.weight", "lora_B.weight")  # fmt: skip
        for name, value in zip(names, (p.a, p.b), strict=True):
            out[f"{PREFIX}{site}.{name}"] = value.cpu().contiguous().clone()
        if p.bias is not None:
            out[f"{PREFIX}{site}.lora_B.bias"] = p.bias.cpu().contiguous().clone()
    return out


def settings_of(pairs: dict[str, Pair], others: list[str]) -> dict[str, Any]:
    """Returns a LoraConfig as JSON that gives every site its rank and its scaling.

    Raises:
        CheckpointError: when dropout or the bias of B differ, of which a LoraConfig has one each.
    """
    for what, of in (("dropout", lambda p: p.dropout), ("lora_bias", lambda p: p.bias is not None)):
        first: dict[Any, str] = {}
        for site, p in pairs.items():
            first.setdefault(of(p), site)
        if len(first) > 1:
            raise CheckpointError(
                f"{what} differs between sites ({', '.join(f'{s!r}: {v}' for v, s in first.items())}) "
                "and a LoraConfig has one: save them as adapters of their own"
            )
    one = next(iter(pairs.values()))
    (r, alpha), _ = Counter((p.r, alpha_of(p)) for p in pairs.values()).most_common(1)[0]
    # A list matches dotted suffixes too; where that reaches another module, a pattern does not.
    wide = any(n.endswith(f".{site}") for n in others for site in pairs)
    names: Any = "|".join(map(re.escape, pairs)) if wide else list(pairs)
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": one.dropout,
        "lora_bias": one.bias is not None,
        "bias": "none",
        "inference_mode": True,
        "target_modules": names,
        "rank_pattern": {f"^{re.escape(s)}": p.r for s, p in pairs.items() if p.r != r},
        "alpha_pattern": {
            f"^{re.escape(s)}": alpha_of(p) for s, p in pairs.items() if alpha_of(p) != alpha
        },
    }


def alpha_of(pair: Pair) -> float:
    """Returns the alpha for which alpha / r is the pair's scaling, to the bit where one exists.

    >>> p = Pair("q", "branch", torch.zeros(3, 4), torch.zeros(4, 3), None, 16 / 3, 0.0)
    >>> alpha_of(p)
    16.0
    """
    near = pair.scaling * pair.r
    tries = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return next((a for a in tries if a / pair.r == pair.scaling), near)
