"""What target_modules names on a given model: None, "all-linear" and v4's MoE names resolved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fxlora.errors import ConfigError
from fxlora.sites import kind_of
from fxlora.trace.shell import tree

SEQ_CLS_HEADS = ("score", "classifier")  # peft.utils.constants.SEQ_CLS_HEAD_NAMES


@dataclass(frozen=True)
class AllLinear:
    """What "all-linear" came to: the layer it leaves out, as the model's output layer."""

    head: str | None


def resolve_targets(config: Any, model: nn.Module) -> AllLinear | None:
    """Fills in `target_modules` where it is None or "all-linear"; says so when it was the latter."""
    _moe_names(config, model)
    if config.target_modules is None:
        config.target_modules = _by_model_type(model, required=not config.target_parameters)
    targets = config.target_modules
    if not isinstance(targets, str) or targets.lower() != "all-linear":
        return None
    # peft.tuners.tuners_utils._maybe_include_all_linear_layers
    names = {
        n for n, m in tree(model, remove_duplicate=True) if kind_of(type(m)) in ("Linear", "Conv1D")
    }
    head = _output_layer(config, model)
    config.target_modules = names - {head}
    return AllLinear(head)


def _moe_names(config: Any, model: nn.Module) -> None:
    """Renames v4 MoE targets as PEFT does on transformers 5, with PEFT's own table."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return
    from peft.utils import transformers_weight_conversion as conversion

    convert = getattr(conversion, "convert_peft_config_for_transformers", None)
    if convert is None:
        return
    try:
        convert(config, model=model, conversions=None)
    except ValueError as e:
        raise ConfigError(f"{e} (target_modules={config.target_modules!r})") from None


def model_type(model: nn.Module) -> str | None:
    """Returns the transformers model type of a model, if it has one."""
    return getattr(getattr(model, "config", None), "model_type", None)


def _by_model_type(model: nn.Module, required: bool) -> set[str] | str | None:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    kind = model_type(model)
    found = KNOWN.get(kind)
    if found is None and not required:
        return None
    if found is None:
        what = f"model type {kind!r}" if kind else f"a {type(model).__name__}"
        raise ConfigError(
            f"target_modules is not set and PEFT has no default for {what}. "
            'Name the modules, or say target_modules="all-linear"'
        )
    return found if isinstance(found, str) else set(found)


def _output_layer(config: Any, model: nn.Module) -> str | None:
    from fxlora.trace.examples import is_transformers

    if not is_transformers(model):
        return None
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None and str(getattr(config.task_type, "value", config.task_type)) == "SEQ_CLS":
        head = next((h for n in SEQ_CLS_HEADS if (h := getattr(model, n, None))), None)
    if head is None:
        return None
    return next((n for n, m in tree(model) if m is head), None)
