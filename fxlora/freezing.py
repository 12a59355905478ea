"""Which parameters train after a rewrite: base ones by the `bias` field, and what a cast thaws."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import torch

# peft.tuners.tuners_utils.cast_adapter_dtype: these are trained in float32.
UPCAST = {torch.float16, torch.bfloat16} | {
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
}


def bias_trains(
    name: str, bias: str, adapted: AbstractSet[str], whole: tuple[str, ...] = ()
) -> bool:
    """Whether PEFT leaves the base parameter `name` trainable.

    Args:
        name: the parameter's name in the base model.
        bias: LoraConfig.bias; "all" is every name ending in `.bias` (an `in_proj_bias` does not),
            "lora_only" the biases of adapted layers.
        adapted: the names of the adapted modules.
        whole: prefixes of the modules of which a copy trains as a whole: the original is frozen.

    Source: peft.tuners.tuners_utils.BaseTuner._mark_only_adapters_as_trainable.

    >>> bias_trains("fc.bias", "all", set()), bias_trains("fc.bias", "lora_only", {"out"})
    (True, False)
    """
    if name.startswith(whole):
        return False
    if bias == "all":
        return name == "bias" or name.endswith(".bias")
    if bias.endswith("_only"):
        owner, _, last = name.rpartition(".")
        return last == "bias" and owner in adapted
    return False
