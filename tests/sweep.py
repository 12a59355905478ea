"""Every class of transformers' auto-mappings, from its default config cut small, on meta."""

from __future__ import annotations

import copy
import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

import fxlora
from fxlora.errors import FxloraError, TraceError

# Task -> transformers' mappings for it. A class of two tasks counts under the first.
TASKS = {
    "causal LM": ("MODEL_FOR_CAUSAL_LM_MAPPING",),
    "seq2seq LM": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",),
    "masked LM": ("MODEL_FOR_MASKED_LM_MAPPING",),
    "sequence classification": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",),
    "image classification": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",),
    "audio classification": ("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",),
    "speech recognition": ("MODEL_FOR_CTC_MAPPING", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING"),
}

# Settings that make default configs small without changing what their layers are.
_COUNTS = frozenset(
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
    "num_encoder_layers num_decoder_layers num_blocks".split()
)
# Left open by a default config, and needed: by a classifier that must find the end of each row, by
# a recognizer whose alphabet depends on the language, by a router.
_OPEN = {"pad_token_id": 0, "vocab_size": 32, "num_experts_per_tok": 2}
_LISTS = frozenset(
    "layer_types layers_block_type mlp_layer_types attention_layers no_rope_layers "
    "hybrid_override_pattern layers_types activation_sparsity_pattern".split()
)


@dataclass
class Row:
    """What became of one class."""

    task: str
    name: str
    status: str  # equal, differs, peft, trace, build, plan
    detail: str = ""
    sites: int = 0
    seconds: float = 0.0
    dynamic: bool = False


def classes() -> Iterator[tuple[str, str, type, type]]:
    """Yields (task, class name, config class, model class), each class once."""
    import transformers

    seen = set()
    for task, mappings in TASKS.items():
        for mapping in mappings:
            table = getattr(transformers, mapping)
            for config_class in table:
                found = table[config_class]
                for model_class in found if isinstance(found, (tuple, list)) else (found,):
                    if model_class.__name__ not in seen:
                        seen.add(model_class.__name__)
                        yield task, model_class.__name__, config_class, model_class


def small_config(config_class: type) -> Any:
    """Returns a default config with two layers of each kind it repeats."""
    config = config_class()
    for part in parts_of(config):
        # Of a model in stages, all stages stay, with two blocks each.
        stages = {k for k, v in part.attribute_map.items() if v == "num_stages"}
        for name in sorted(_COUNTS - stages):
            if isinstance(getattr(part, name, None), int) and getattr(part, name) > 2:
                setattr(part, name, 2)
        for name in sorted(_LISTS):
            value = getattr(part, name, None)
            if isinstance(value, list) and len(value) > 2:
                setattr(part, name, value[:2])
        if getattr(part, "num_kv_shared_layers", None):
            part.num_kv_shared_layers = 0  # of two layers none can share
        if isinstance(getattr(part, "depths", None), (list, tuple)):
            part.depths = type(part.depths)(min(d, 2) for d in part.depths)
    return config


def parts_of(config: Any) -> list[Any]:
    """Returns a config and the configs in it."""
    inner = [v for v in vars(config).values() if hasattr(v, "to_dict")]
    return [config, *(part for v in inner for part in parts_of(v))]


def fill(config: Any) -> Any:
    """Gives a value to what a default config leaves open and the model then needs."""
    for part in parts_of(config):
        for name, value in _OPEN.items():
            if getattr(part, name, value) is None:
                setattr(part, name, value)
        if part.is_encoder_decoder and getattr(part, "decoder_start_token_id", None) is None:
            part.decoder_start_token_id = 0
    return config


def fill_all(config: Any) -> Any:
    """Fills also what most models work out for themselves, for those that do not."""
    for part in parts_of(config):
        heads = getattr(part, "num_attention_heads", None)
        more = {"n_routed_experts": 8, "n_shared_experts": 1, "num_key_value_heads": heads}
        if isinstance(heads, int) and isinstance(getattr(part, "hidden_size", None), int):
            more["head_dim"] = part.hidden_size // heads
        for name, value in more.items():
            if getattr(part, name, value) is None:
                setattr(part, name, value)
    return config


def build(config_class: type, model_class: type) -> torch.nn.Module:
    """Builds a class on meta: from its config cut to two layers, else from the whole default.

    Raises:
        Exception: what the class said of its default config.
    """
    errors = []
    makers = (small_config, lambda c: c(), lambda c: fill_all(small_config(c)))
    for make in makers:
        try:
            config = fill(make(config_class))
            wanted = model_class.config_class
            if wanted is not None and not isinstance(config, wanted):
                parts = [v for v in vars(config).values() if isinstance(v, wanted)]
                config = parts[0] if parts else config.get_text_config()
            with torch.device("meta"):
                model = model_class(config).eval()
            return model.to("meta")  # a legacy constructor leaves a parameter on the CPU
        except Exception as e:
            errors.append(e)
    raise errors[1]


def check(task: str, name: str, config_class: type, model_class: type) -> Row:
    """Builds one class and compares it with peft; the row says what it cost, too."""
    start = time.process_time()
    try:
        model = build(config_class, model_class)
    except Exception as e:
        return Row(task, name, "build", f"{type(e).__name__}: {str(e)[:200]}")
    row = compare(task, name, model)
    row.seconds = round(time.process_time() - start, 2)
    return row


def lora(model: torch.nn.Module) -> Any:
    """Returns the sweep's config: all linear layers, and the experts that are bare parameters."""
    from peft import LoraConfig

    experts = sorted(
        {".".join(n.split(".")[-2:]) for n, p in model.named_parameters() if _is_expert(n, p)}
    )
    return LoraConfig(r=4, target_modules="all-linear", target_parameters=experts or None)


def _is_expert(name: str, p: torch.nn.Parameter) -> bool:
    return p.dim() == 3 and name.split(".")[-2:-1] == ["experts"]


def compare(task: str, name: str, model: torch.nn.Module) -> Row:
    """Traces, plans and rewrites one model, and compares it with peft."""
    row = Row(task, name, "equal")
    config = lora(model)
    try:
        result = fxlora.compare(model, config, run=False)
    except TraceError as e:
        return Row(task, name, "trace", str(e)[:400])
    except FxloraError as e:
        return Row(task, name, "plan", f"{type(e).__name__}: {str(e)[:400]}")
    except Exception as e:
        return refused(row, model, config, e)
    row.sites = len(result.plan.adapted)
    row.dynamic = not any("sizes are fixed" in n for n in result.notes)
    if "/peft/tuners/" in result.certificate.problem:
        row.status, row.detail = "peft", f"fails when it runs: {result.certificate.problem[:300]}"
    elif not result.equal:
        row.status, row.detail = "differs", "; ".join(result.differences[:3])[:600]
    return row


def refused(row: Row, model: torch.nn.Module, config: Any, error: Exception) -> Row:
    """Returns the row of a comparison that failed: as peft's doing only if peft fails by itself."""
    from peft import get_peft_model

    row.detail = f"{type(error).__name__}: {str(error)[:400]}"
    try:
        traced = fxlora.trace(model)
        plan = fxlora.plan(traced, config)
        row.sites = len(plan.adapted)
        fxlora.rewrite(traced, plan)
    except Exception as e:
        row.detail = f"{type(e).__name__}: {str(e)[:400]}"
    try:
        get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
        row.status = "differs"
    except Exception as e:
        row.status = "peft" if str(e) == str(error) else "differs"
    return row


def main(only: set[str]) -> None:
    """Prints one row per class, as JSON lines; of these classes or tasks, or of all."""
    warnings.simplefilter("ignore")
    for entry in classes():
        if not only or only & {*entry[:2]}:
            print(json.dumps(asdict(check(*entry))), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(set(sys.argv[1:]))
