"""What peft makes of the same model and config: wrapped beside it, never in it."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import torch
from torch import nn

from fxlora.trace.shell import frozen_view

_CHAIN = re.compile(r"(?:\.base_layer)+\.(?!lora_|base_layer)")


def common_name(name: str) -> str:
    """Returns our name for a parameter of the module PEFT wrapped (without `base_model.model.`).

    PEFT puts a wrapped module's own parameters below `.base_layer`; we leave them where they were.

    >>> common_name("layers.0.q_proj.base_layer.weight")
    'layers.0.q_proj.weight'
    >>> common_name("mlp.experts.base_layer.lora_A.default.weight")
    'mlp.experts.base_layer.lora_A.default.weight'
    """
    name = name.replace(".original_module.", ".").replace(".token_adapter.base_layer.", ".")
    return re.sub(r"^base_layer\.(?!lora_)", "", _CHAIN.sub(".", name))


def twin(model: nn.Module) -> nn.Module:
    """Returns a deep copy of a model that shares its weights.

    PEFT wraps in place and freezes; the copy takes that, the model keeps its flags.
    """
    memo: dict[int, Any] = {}
    for p in model.parameters():
        view = frozen_view(p)
        memo[id(p)] = view if view is p else view.requires_grad_(p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = b
    for m in model.modules():
        for value in m.__dict__.values():  # old-style weight_norm keeps its result as an attribute
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
    return copy.deepcopy(model, memo)


def wrap(model: nn.Module, config: Any, seed: int) -> Any:
    """Returns `peft.get_peft_model` of a twin of the model and a copy of the config.

    Args:
        model, config: read, never changed.
        seed: set before PEFT draws the adapter's random numbers.

    Raises:
        Whatever peft raises.
    """
    from peft import get_peft_model

    # OLoRA subtracts from the base weight in place, so it gets weights of its own to do that in.
    in_place = str(config.init_lora_weights).lower() == "olora"
    copied = copy.deepcopy(model) if in_place else twin(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        return get_peft_model(
            copied, copy.deepcopy(config), low_cpu_mem_usage=_draws_nothing(model, config)
        )


def _draws_nothing(model: nn.Module, config: Any) -> bool:
    """Whether PEFT may make the adapters on meta: it draws them on the CPU, and drops the numbers."""
    plain = config.init_lora_weights in (True, False, "gaussian") and not config.use_dora
    special = any(
        getattr(config, k, None)
        for k in ("kasa_config", "use_bdlora", "arrow_config", "corda_config", "eva_config",
                  "loftq_config", "target_parameters", "trainable_token_indices", "layer_replication")
    )  # fmt: skip
    return plain and not special and all(p.device.type == "meta" for p in model.parameters())


def wrapped(peft_model: Any) -> nn.Module:
    """Returns the wrapped base model inside a PeftModel."""
    inner: nn.Module = peft_model.base_model.model
    return inner
