"""What each kind of layer takes of LoRA: its adapter's shapes, and what it refuses.

The rules are those of peft.tuners.lora.layer, class by class; a refusal comes before anything is
changed, where PEFT raises with half of the model wrapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxlora.config import VARIANT_FIELDS, init_name, variant_of
from fxlora.errors import ConfigError, ConfigTypeError, UnsupportedError
from fxlora.freezing import UPCAST, bias_trains
from fxlora.sites import Site

KINDS = (
    "Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention", "Parameter",
)  # fmt: skip
_VARIANTS = {
    "Linear": ("dora", "mica", "kasa", "bdlora"),
    "Conv1D": ("dora", "mica", "bdlora"),
    "Embedding": ("dora", "mica"),
    "Conv1d": ("dora",),
    "Conv2d": ("dora",),
    "Conv3d": ("dora",),
    "MultiheadAttention": (),
    "Parameter": (),
}
_FACTORED = ("pissa", "olora", "orthogonal", "mica")


@dataclass(frozen=True)
class AdapterShape:
    """The parameters one adapter hangs below a site.

    Attributes:
        form: "branch" (a second path from the input), "rows" (an embedding's) or "delta" (added to
            the weight, because no call of the layer has it as its input).
        variant: "", "dora", "mica", "kasa", "bdlora-a", "bdlora-b" or "bdlora" (neither factor).
        parameters: name below the site, with `{}` for the adapter's name -> shape.
        frozen: those of them that do not train.
    """

    form: str
    variant: str
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    frozen: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """How many numbers the adapter has."""
        return sum(torch.Size(s).numel() for _, s in self.parameters)

    @property
    def trainable(self) -> int:
        """How many of them train."""
        return sum(torch.Size(s).numel() for n, s in self.parameters if n not in self.frozen)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a parameter, such as `lora_A.{}.weight`."""
        return dict(self.parameters)[name]


def is_conv(kind: str) -> bool:
    """Whether a kind is one of torch's convolutions."""
    return kind in ("Conv1d", "Conv2d", "Conv3d")


def adapter_shape(site: Site, module: Any, config: Any, r: int, experts: int) -> AdapterShape:
    """Returns what the configuration hangs below a site.

    Args:
        site: the site.
        module: the live layer (None for a bare parameter); read.
        config: the resolved configuration.
        r: rank of this site.
        experts: how many maps a 3-D parameter holds, else 1.

    Raises:
        ConfigError: when the layer does not take what the configuration says, as in PEFT.
    """
    check(site, module, config, r)
    variant = _variant(site, config)
    frozen: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]]
    if site.kind == "Embedding":
        shapes = {
            "lora_embedding_A.{}": (r, site.in_features),
            "lora_embedding_B.{}": (site.out_features, r),
        }
        if variant == "mica":
            frozen = ("lora_embedding_B.{}",)
    else:
        shapes = dict(_pair(site, module, r * experts))
        if variant.startswith("bdlora-"):
            _block(site, shapes, variant[-1], config.use_bdlora)
        if config.lora_bias:
            shapes["lora_B.{}.bias"] = (site.out_features,)
        if variant == "mica":
            frozen = ("lora_B.{}.weight",)
    if variant == "dora":
        shapes["lora_magnitude_vector.{}.weight"] = _magnitude(site)
    if variant == "kasa":
        shapes["lora_diag.{}"] = (r,)
    if config.inference_mode:  # bias="all" lets every `.bias` train all the same, lora_bias too
        frozen = tuple(n for n in shapes if not bias_trains(n, config.bias, frozenset()))
    loose = [n for n in frozen if n.endswith(".{}")]
    if loose and module.weight.dtype in UPCAST:
        # peft's cast makes a new parameter of one that hangs in no module, and a new one trains.
        frozen = tuple(n for n in frozen if n not in loose)
    return AdapterShape(_form(site.kind), variant, tuple(shapes.items()), frozen)


def _form(kind: str) -> str:
    if kind in ("Parameter", "MultiheadAttention"):
        return "delta"
    return "rows" if kind == "Embedding" else "branch"


def _pair(site: Site, module: Any, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    if is_conv(site.kind):
        kernel = tuple(module.kernel_size)
        yield "lora_A.{}.weight", (inner, site.in_features, *kernel)
        one = (1,) * len(kernel)
        yield "lora_B.{}.weight", (site.out_features, inner // module.groups, *one)
        return
    yield "lora_A.{}.weight", (inner, site.in_features)
    yield "lora_B.{}.weight", (site.out_features, inner)


def _magnitude(site: Site) -> tuple[int, ...]:
    if is_conv(site.kind):
        return (1, site.out_features, *(1,) * (len(site.shape) - 2))
    return (site.out_features,)


# ---- BD-LoRA -----------------------------------------------------------------------------------


def _variant(site: Site, config: Any) -> str:
    variant = variant_of(config)
    return _blocked(site, config.use_bdlora) if variant == "bdlora" else variant


def _blocked(site: Site, bd: Any) -> str:
    """Says which factor of a site is block-diagonal (arXiv 2510.23346; BdLoraLinearVariant.init)."""
    in_a = any(p in site.name for p in bd.target_modules_bd_a or ())
    in_b = any(p in site.name for p in bd.target_modules_bd_b or ())
    if in_a and in_b:
        raise ConfigError(
            f"use_bdlora: {site.name!r} matches target_modules_bd_a and target_modules_bd_b; one of "
            "lora_A and lora_B is block-diagonal"
        )
    if bd.match_strict and not (in_a or in_b):
        raise ConfigError(
            f"use_bdlora: {site.name!r} matches neither target_modules_bd_a nor target_modules_bd_b; "
            "name it there, or say match_strict=False"
        )
    return "bdlora-a" if in_a else "bdlora-b" if in_b else "bdlora"


def _block(site: Site, shapes: dict[str, tuple[int, ...]], which: str, bd: Any) -> None:
    if site.kind == "Conv1D":
        raise UnsupportedError(
            f"use_bdlora: {site.name!r} is a Conv1D, and peft makes block-diagonal factors from a "
            f"layer's in_features and out_features, which a Conv1D does not have. Leave it out of "
            f"target_modules_bd_{which}, or of target_modules with exclude_modules=[{site.name!r}]"
        )
    name = f"lora_{which.upper()}.{{}}.weight"
    rows, columns = shapes[name]
    if rows % bd.nblocks or columns % bd.nblocks:
        raise ConfigError(
            f"use_bdlora: nblocks={bd.nblocks} does not divide a weight of {rows} x {columns}"
        )
    shapes[name] = (rows, columns // bd.nblocks)


# ---- refusals ----------------------------------------------------------------------------------


class GroupsError(ConfigError):
    """Grouped convolutions whose groups do not divide the rank.

    Attributes:
        layers: name -> (rank, groups).
    """

    def __init__(self, layers: dict[str, tuple[int, int]]) -> None:
        self.layers = layers
        first, (r, groups) = next(iter(layers.items()))
        more = f", and {len(layers) - 1} more refuse it too" if len(layers) > 1 else ""
        ranks = {name: g for name, (_, g) in layers.items()}
        super().__init__(
            f"{first!r} has groups={groups}, which does not divide r={r}{more}; give "
            f"{'each' if more else 'it'} another rank with rank_pattern={ranks}"
        )


def check(site: Site, module: Any, config: Any, r: int) -> None:
    """Raises ConfigError where the layer does not take what the configuration says."""
    kind, name = site.kind, site.name
    variant = variant_of(config)
    if variant and variant not in _VARIANTS[kind]:
        takes = ", ".join(_VARIANTS[kind]) or "plain LoRA only"
        raise ConfigError(
            f"{VARIANT_FIELDS[variant]}: {name!r} is a {site.type_name}, which does not take "
            f"{variant!r} ({takes}). Leave it out with exclude_modules=[{name!r}]"
        )
    how = init_name(config)
    if site.rows:
        check_part(site, f"a part of {site.owner!r}", variant, how)
    if isinstance(how, str) and how.startswith(_FACTORED):
        _check_factored(site, how, r)
    if variant == "kasa" and r >= min(site.in_features, site.out_features):
        most = min(site.in_features, site.out_features)
        raise ConfigError(
            f"kasa_config with r={r} on {name!r}, whose weight has {most} singular values: KaSA drops "
            f"r of them and needs one to be left, so r must be below {most}"
        )
    if kind == "Embedding" and config.lora_bias:
        raise ConfigError(
            f"lora_bias=True with {name!r}: an Embedding's adapter has no bias. Leave it out with "
            f"exclude_modules=[{name!r}]"
        )
    if is_conv(kind) and r % module.groups:
        raise GroupsError({name: (r, module.groups)})
    if kind == "MultiheadAttention":
        _check_attention(name, module)


def check_part(site: Site, what: str, variant: str, how: Any) -> None:
    """Refuses what needs a weight of its own, for an adapter of a part or of one call of a layer."""
    factors = isinstance(how, str) and how.startswith(_FACTORED)
    if not variant and not factors:
        return
    field = VARIANT_FIELDS[variant] if variant else f"init_lora_weights={how!r}"
    raise ConfigError(
        f"{field} is about the whole weight, and the adapter of {site.name!r} is for {what}. Use "
        "plain LoRA with init_lora_weights=True or 'gaussian', or adapt the layer as a whole"
    )


def check_past(site: Site, past: list[Any], variant: str, bias: bool) -> None:
    """Refuses to adapt uses of a weight past its module where the algebra is not plain LoRA's."""
    if all(n.op == "call_module" for n in past):
        return
    if is_conv(site.kind):
        raise UnsupportedError(
            f"reach='uses': {past[0].name} convolves with the weight of {site.name!r} by itself; "
            "only linear maps are adapted there. Leave it out with "
            f"exclude_modules=[{site.name!r}]"
        )
    if bias or variant not in ("", "mica"):
        field = "lora_bias=True" if bias else VARIANT_FIELDS[variant]
        raise UnsupportedError(
            f"reach='uses' with {field}: {past[0].name} reads the weight of "
            f"{site.name!r} past the module, where plain LoRA only is known. Leave it out with "
            f"exclude_modules=[{site.name!r}]"
        )


def _check_factored(site: Site, how: str, r: int) -> None:
    if is_conv(site.kind) or site.kind in ("MultiheadAttention", "Parameter"):
        raise ConfigError(
            f"init_lora_weights={how!r} factors a linear layer's weight, and {site.name!r} is a "
            f"{site.type_name}. Leave it out, or use True, False or 'gaussian'"
        )
    most = min(site.in_features, site.out_features)
    where = f"init_lora_weights={how!r} with r={r} on {site.name!r}"
    if how == "orthogonal" and r % 2 and site.kind != "Embedding":
        raise ConfigError(f"{where}: the rank must be even")
    if how == "mica" and r > most:
        raise ConfigError(f"{where}: its weight has rank {most} at most")
    if how.startswith(("pissa", "olora")) and site.kind != "Embedding" and r > most:
        raise ConfigError(
            f"{where}: its weight has rank {most} at most (PEFT makes a smaller adapter and says "
            "nothing)"
        )


def _check_attention(name: str, module: nn.MultiheadAttention) -> None:
    if not module._qkv_same_embed_dim:
        raise ConfigError(
            f"{name!r} has kdim={module.kdim}, vdim={module.vdim} beside embed_dim="
            f"{module.embed_dim}; its three projections must have equal sizes"
        )
    if not isinstance(module.out_proj, nn.Linear):
        raise ConfigTypeError(f"{name}.out_proj is a {type(module.out_proj).__name__}, no Linear")


def check_parameters(names: list[str], config: Any, fan_in_fan_out: bool) -> None:
    """Raises ConfigError where target_parameters does not go with another field, as in PEFT.

    Args:
        names: the parameters it selects.
        config: a LoraConfig.
        fan_in_fan_out: the field's value once the layers have corrected it.
    """
    if not names:
        return
    for field in ("lora_dropout", "lora_bias", "use_dora", "kasa_config"):
        if getattr(config, field):
            raise ConfigError(
                f"{field}={getattr(config, field)!r} does not go with target_parameters (here "
                f"{names[0]!r}): the adapter is added to the weight, there is no input to act on"
            )
    if fan_in_fan_out:
        why = (
            "set"
            if config.fan_in_fan_out
            else "which PEFT sets when it meets a Conv1D, the last layer target_modules selects"
        )
        raise ConfigError(
            f"fan_in_fan_out=True ({why}) does not go with target_parameters (here {names[0]!r}); "
            "adapt the parameters in a second adapter"
        )


def is_bitsandbytes(module: nn.Module) -> bool:
    """Whether a layer is one of bitsandbytes' quantized Linears."""
    return type(module).__module__.partition(".")[0] == "bitsandbytes"


def casts_branch(module: nn.Module, model: nn.Module) -> bool:
    """Whether peft wraps a layer in its bitsandbytes class, which casts the branch, not the sum.

    It does where the model says that it was loaded so, as transformers' quantized models do.
    """
    flag = "is_loaded_in_4bit" if "4bit" in type(module).__name__ else "is_loaded_in_8bit"
    return is_bitsandbytes(module) and bool(getattr(model, flag, False))


def is_quantized(module: Any) -> bool:
    """Whether a layer's weight is packed, so that nothing can be added to it or drawn from it."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return False
    packed = (
        type(weight) not in (nn.Parameter, torch.Tensor) and type(weight.data) is not torch.Tensor
    )
    return is_bitsandbytes(module) or packed or not weight.is_floating_point()


def check_quantized(site: Site, module: Any, config: Any) -> None:
    """Refuses what a quantized layer does not take.

    Plain adapters stand beside bitsandbytes' and torchao's layers as they do beside any Linear.
    """
    package = type(module).__module__.partition(".")[0]
    if package in ("eetq", "aqlm", "awq", "gptqmodel", "hqq", "transformer_engine"):
        raise UnsupportedError(
            f"{site.name!r} is a {site.type_name} of {package}, which PEFT wraps in a class of its "
            "own that fxlora does not know"
        )
    if not is_quantized(module):
        return
    how = init_name(config)
    asked = variant_of(config) or (how if isinstance(how, str) and how != "gaussian" else "")
    if asked:
        raise UnsupportedError(
            f"{site.name!r} is a quantized {site.type_name}: {asked!r} needs its weight in floating "
            "point. Use plain LoRA there, or adapt the model before it is quantized"
        )
