"""What an adapter reaches beyond PEFT: every use of a weight, parts of fused layers, single calls.

PEFT wraps modules, so its adapters are where a module is called, whole, and shared by every call.
A graph knows more places:

- "uses": every node that reads a matched weight, by another name of the module or past it
  (`F.linear(x, layer.weight)`, the projections inside nn.MultiheadAttention);
- "slices": the parts of a fused layer, addressed as q, k, v, gate and up;
- "calls": an adapter of its own for every call of a shared layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn
from torch.fx import GraphModule

from fxlora.errors import ConfigError, ConfigTypeError, did_you_mean
from fxlora.sites import Call, Site
from fxlora.slices import slices_of

REACH = ("uses", "slices", "calls")


def checked(reach: str | Iterable[str]) -> tuple[str, ...]:
    """Returns the asked reach in a fixed order.

    Args:
        reach: names out of REACH: one, several, or none for PEFT's own reach.

    Raises:
        ConfigError: for any other value.

    >>> checked("slices"), checked({"calls", "uses"}), checked(())
    (('slices',), ('uses', 'calls'), ())
    """
    asked = (reach,) if isinstance(reach, str) else reach
    if not isinstance(asked, Iterable):
        raise ConfigTypeError(f"reach={reach!r}: one or several of {list(REACH)}")
    asked = tuple(asked)
    for name in asked:
        if name not in REACH:
            near = did_you_mean(name, REACH) if isinstance(name, str) else ""
            raise ConfigError(f"reach has {name!r}: one or several of {list(REACH)}.{near}")
    return tuple(n for n in REACH if n in asked)


def with_slices(found: Sequence[Site], traced: GraphModule) -> list[Site]:
    """Returns the sites, each fused one followed by its parts as sites of their own.

    A part is named below its layer, `self_attn.qkv_proj.q`, and, where no module has that name,
    beside it too: `self_attn.q_proj`.
    """
    taken = {n for n, _ in traced.named_modules(remove_duplicate=False)}
    out: list[Site] = []
    for site in found:
        out.append(site)
        for s in slices_of(site, traced):
            beside = f"{site.name.rpartition('.')[0]}.{s.part}_proj".lstrip(".")
            known = not s.part.isdigit() and beside not in taken
            out.append(
                replace(
                    site, name=s.name, out_features=s.out_features, aliases=(beside,) * known,
                    of=site.name, rows=s.rows,
                )
            )  # fmt: skip
    return out


def one_call(site: Site, index: int, call: Call) -> Site:
    """Returns the site of a single call of a shared layer: `query.call_3`."""
    return replace(site, name=f"{site.name}.call_{index}", calls=(call,), of=site.of or site.name)


def weight_names(site: Site, root: nn.Module) -> set[str]:
    """Returns every name of the site's weight: by each name of the module that owns it."""
    owner, _, last = site.weight_name.rpartition(".")
    module = root.get_submodule(owner)
    return {
        f"{name}.{last}" if name else last
        for name, m in root.named_modules(remove_duplicate=False)
        if m is module
    }
