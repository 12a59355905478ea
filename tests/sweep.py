"""Every class of a transformers auto-mapping, from its default config cut to two layers, on meta."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

import fxlora
from fxlora.errors import FxloraError, TraceError

# Settings that make default configs small without changing what their layers are.
_SMALL = {
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
}


@dataclass
class Row:
    """What became of one class."""

    name: str
    status: str  # equal, differs, peft, trace, build, plan
    detail: str = ""
    sites: int = 0
    seconds: float = 0.0
    dynamic: bool = False


def classes(mapping: str) -> Iterator[tuple[str, type, type]]:
    """Yields (class name, config class, model class) of one auto-mapping, each class once."""
    import transformers

    seen = set()
    table = getattr(transformers, mapping)
    for config_class in table:
        found = table[config_class]
        for model_class in found if isinstance(found, (tuple, list)) else (found,):
            if model_class.__name__ not in seen:
                seen.add(model_class.__name__)
                yield model_class.__name__, config_class, model_class


def small_config(config_class: type) -> Any:
    """Returns a default config with two layers of each kind it repeats."""
    config = config_class()
    for part in (config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))):
        layers = 2
        for name, value in _SMALL.items():
            if isinstance(getattr(part, name, None), int) and getattr(part, name) > value:
                setattr(part, name, value)
        for name in ("layer_types", "layers_block_type", "mlp_layer_types", "attention_layers",
                     "no_rope_layers", "hybrid_override_pattern", "layers_types"):  # fmt: skip
            value = getattr(part, name, None)
            if isinstance(value, list) and len(value) > layers:
                setattr(part, name, value[:layers])
    return config


def build(config_class: type, model_class: type) -> torch.nn.Module:
    """Builds a class on meta: from its config cut to two layers, else from the whole default."""
    for make in (small_config, lambda c: c()):
        try:
            config = make(config_class)
            wanted = model_class.config_class
            if wanted is not None and not isinstance(config, wanted):
                parts = [v for v in vars(config).values() if isinstance(v, wanted)]
                config = parts[0] if parts else config.get_text_config()
            with torch.device("meta"):
                return model_class(config).eval()
        except Exception as e:
            error = e
    raise error


def check(name: str, config_class: type, model_class: type, certificate: bool = True) -> Row:
    """Traces, plans and rewrites one class for all-linear, and compares it with peft."""
    from peft import LoraConfig

    row = Row(name, "equal")
    start = time.process_time()
    try:
        model = build(config_class, model_class)
    except Exception as e:
        return Row(name, "build", f"{type(e).__name__}: {str(e)[:200]}")
    try:
        result = fxlora.compare(model, LoraConfig(r=4, target_modules="all-linear"), run=False)
    except TraceError as e:
        return Row(name, "trace", str(e)[:400])
    except FxloraError as e:
        return Row(name, "plan", f"{type(e).__name__}: {str(e)[:400]}")
    except Exception as e:
        return Row(name, "peft", f"{type(e).__name__}: {str(e)[:400]}")
    row.sites = len(result.plan.adapted)
    row.dynamic = not any("sizes are fixed" in n for n in result.notes)
    if "/peft/tuners/" in result.certificate.problem:
        return Row(
            name, "peft", f"fails when it runs: {result.certificate.problem[:300]}", row.sites
        )
    if not result.equal:
        row.status, row.detail = "differs", "; ".join(result.differences[:3])[:600]
    row.seconds = time.process_time() - start
    return row


if __name__ == "__main__":
    import json

    warnings.simplefilter("ignore")
    only = set(sys.argv[2:])
    for entry in classes(sys.argv[1] if len(sys.argv) > 1 else "MODEL_FOR_CAUSAL_LM_MAPPING"):
        if not only or entry[0] in only:
            print(json.dumps(asdict(check(*entry))), flush=True)  # noqa: T201
