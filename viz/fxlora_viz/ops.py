"""What an operation is to a reader: plumbing, a change of view, or work; by torch's names."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from fxlora_viz.names import number

# Sizes, devices, and the switches a trace leaves behind: no tensor flows through them.
_PLUMBING = frozenset(
    "size getattr dim numel ndimension storage_offset stride is_contiguous get_device "
    "device enter_grad_mode leave_grad_mode set_grad_enabled _set_grad_enabled item "
    "tolist is_floating_point element_size _assert _assert_async".split()
)
_PLUMBING_MODULES = frozenset(("InputGuards", "ByMode", "TrainOnly"))
# The same numbers in another shape, dtype or place; the value of the first argument passes.
_PASSING = frozenset(
    "view reshape transpose permute t T mT swapaxes swapdims movedim moveaxis flatten "
    "unflatten squeeze unsqueeze expand expand_as view_as reshape_as contiguous clone "
    "detach to type type_as float half bfloat16 double long int bool cpu cuda cast_like "
    "alias identity requires_grad_ getitem split chunk unbind narrow select "
    "index_select_dim tensor_split split_with_sizes repeat repeat_interleave dropout "
    "dropout1d dropout2d feature_dropout alpha_dropout atleast_1d atleast_2d atleast_3d "
    "squeeze_ unsqueeze_ transpose_ t_ dropout_ pad as_strided ravel broadcast_to "
    "rearrange real".split()
)
_PASSING_MODULES = frozenset(
    "Identity Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout "
    "Flatten Unflatten StableDropout DropPath".split()
)
_SYMBOLS = {"add": "+", "mul": "×", "sub": "−", "div": "÷", "truediv": "÷", "matmul": "@"}
_CIRCLES = ("+", "×", "−", "÷")
_SHORT = {"scaled_dot_product_attention": "sdpa", "setitem": "write", "getitem": "index"}


def name_of(node: Node) -> str:
    """Returns the bare name of what a node calls: `add` for `add_`, `__add__` and `torch.add`."""
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    bare = name.rpartition(".")[2] if node.op != "call_module" else name
    for prefix in ("__i", "__r", "__"):
        if bare.startswith(prefix) and bare.endswith("__") and bare != "__":
            short = bare[len(prefix) : -2]
            if short in _SYMBOLS or prefix == "__":
                return short
    return bare.rstrip("_") if bare.rstrip("_") else bare


def is_plumbing_name(node: Node) -> bool:
    """Whether a function or method call holds no tensor."""
    return node.op in ("call_function", "call_method") and name_of(node) in _PLUMBING


def is_plumbing_module(type_name: str) -> bool:
    """Whether a called module is a guard or a switch of the trace, not the model's."""
    return type_name in _PLUMBING_MODULES


def is_passing_module(type_name: str) -> bool:
    """Whether a called module is the identity in eval mode (dropout, also of paths) or reshapes."""
    return type_name in _PASSING_MODULES or type_name.endswith(("DropPath", "StochasticDepth"))


def is_passing(node: Node) -> bool:
    """Whether a call only changes the view, the dtype or the place of its first argument."""
    name = name_of(node)
    if name not in _PASSING or node.op not in ("call_function", "call_method"):
        return False
    if name == "getitem" and len(node.args) > 1:
        return not _has_node(node.args[1])  # indexing by a tensor is work
    return True


def _has_node(index: Any) -> bool:
    if isinstance(index, Node):
        # A size as an index selects; a tensor gathers. Sizes carry no dtype.
        return "dtype" in index.meta
    if isinstance(index, (tuple, list)):
        return any(_has_node(i) for i in index)
    return False


def symbol(node: Node) -> str:
    """Returns the sign of an arithmetic operation, or ""."""
    return _SYMBOLS.get(name_of(node), "")


def factor(node: Node) -> str:
    """Returns "×0.125" for a product with a plain number, "÷8" for a quotient by one, else ""."""
    sign = symbol(node)
    if (
        node.op not in ("call_function", "call_method")
        or sign not in ("×", "÷")
        or len(node.args) != 2
        or node.kwargs
    ):
        return ""
    left, right = node.args
    if sign == "×" and isinstance(right, Node):
        left, right = right, left
    plain = isinstance(left, Node) and isinstance(right, (int, float))
    return f"{sign}{number(right)}" if plain and not isinstance(right, bool) else ""


def is_circle(sign: str) -> bool:
    """Whether an operation on two tensors is drawn as a circle with its sign."""
    return sign in _CIRCLES


def title(node: Node) -> str:
    """Returns what an operation is called in the picture."""
    name = name_of(node)
    return _SHORT.get(name, name.strip("_"))
