"""How one torch call is spelled as a node: the operator, the method or the function of the source."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch

getitem = operator.getitem

# The call is an effect even when it returns no tensor.
_EFFECTS = {torch.manual_seed}

_OPERATORS = {
    name: getattr(operator, name.strip("_"))
    for name in (
        "__add__ __sub__ __mul__ __truediv__ __floordiv__ __mod__ __pow__ __matmul__ __neg__ "
        "__pos__ __invert__ __lshift__ __rshift__ __lt__ __le__ __gt__ __ge__ __eq__ __ne__ "
        "__getitem__ __setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __imod__ "
        "__ipow__ __ilshift__ __irshift__ __iand__ __ior__ __ixor__"
    ).split()
}
_OPERATORS |= {"__and__": operator.and_, "__or__": operator.or_, "__xor__": operator.xor}
_OPERATORS |= {"__abs__": operator.abs, "__idiv__": operator.itruediv}
_REFLECTED: dict[str, Any] = {
    f"__r{name}__": function
    for name, function in {
        "add": operator.add,
        "sub": operator.sub,
        "mul": operator.mul,
        "truediv": operator.truediv,
        "div": operator.truediv,
        "floordiv": operator.floordiv,
        "mod": operator.mod,
        "pow": operator.pow,
        "matmul": operator.matmul,
        "and": operator.and_,
        "or": operator.or_,
        "xor": operator.xor,
        "lshift": operator.lshift,
        "rshift": operator.rshift,
    }.items()
}

# torch wraps these and leaves them the names `pow` and `pow_`, by which no module has them.
_POWERS = {torch.Tensor.__pow__: operator.pow, torch.Tensor.__ipow__: operator.ipow}


def normal(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Returns the call as a reader would write it: `getattr(x, "T")`, `operator.add(2, x)`."""
    name = getattr(func, "__name__", "")
    owner: Any = getattr(func, "__self__", None)
    if name == "__get__" and hasattr(owner, "__name__"):
        return getattr, (args[0], owner.__name__), {}
    if name == "__set__" and hasattr(owner, "__name__"):
        return setattr, (args[0], owner.__name__, args[1]), {}
    if func is torch.Tensor.type:
        return func, tuple(map(_named, args)), {k: _named(v) for k, v in kwargs.items()}
    if func in _POWERS and not kwargs:
        return _POWERS[func], args, kwargs
    if name in _OPERATORS and not kwargs:
        return _OPERATORS[name], args, kwargs
    if name in _REFLECTED and len(args) == 2 and not kwargs:
        # Python itself calls x.__radd__(2) for operator.add(2, x).
        return _REFLECTED[name], (args[1], args[0]), kwargs
    return func, args, kwargs


_SILENT_NAMES = frozenset(
    "__repr__ __str__ __format__ __len__ __hash__ __dir__ __reduce_ex__ dim size stride numel "
    "is_floating_point is_complex is_contiguous element_size storage_offset data_ptr "
    "untyped_storage register_hook _is_view has_names get_device is_inference".split()
)


def is_silent(func: Any) -> bool:
    """Whether a call says something about a tensor and makes none."""
    return getattr(func, "__name__", "") in _SILENT_NAMES


def has_effect(func: Any) -> bool:
    """Whether a call must be recorded although it returns no tensor."""
    try:
        return func in _EFFECTS
    except TypeError:
        return False


def tensor_type(value: Any) -> str | None:
    """Returns the name of a legacy tensor type, which `Tensor.type` takes in its place.

    A class prints as `<class 'torch.FloatTensor'>`, which a graph's code cannot read.

    >>> tensor_type(torch.LongTensor), tensor_type(torch.cuda.HalfTensor), tensor_type(torch.long)
    ('torch.LongTensor', 'torch.cuda.HalfTensor', None)
    """
    if not isinstance(value, type) or type(value) is not type(torch.FloatTensor):
        return None
    return f"{value.__module__}.{value.__name__}"


def _named(value: Any) -> Any:
    return "torch.Tensor" if value is torch.Tensor else tensor_type(value) or value


def spelling(func: Any, args: tuple[Any, ...]) -> tuple[str, Any]:
    """Returns the node kind and target for a call torch dispatched.

    `x + y` is a call of `operator.add`, `x.view(...)` a `call_method`, `F.linear` a
    `call_function`.
    """
    name = getattr(func, "__name__", "")
    if _is_method(func, name, args):
        return "call_method", name
    return "call_function", func


def _is_method(func: Any, name: str, args: tuple[Any, ...]) -> bool:
    if not args or not isinstance(args[0], torch.Tensor):
        return False
    found = getattr(torch.Tensor, name, None)
    return found is func or getattr(func, "__objclass__", None) is torch._C.TensorBase


class Applied:
    """The target of a node that calls an autograd function of the model's own.

    While a model is traced `cls.apply` is a patch that records, so no graph may hold on to that; and
    torch.fx would look for torch's own under the name `torch.autograd.function.apply`.
    """

    __module__ = __name__

    def __init__(self, function: Any) -> None:
        self.function = function
        self.__name__ = self.__qualname__ = "apply"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Applies the function."""
        return self.function.apply(*args, **kwargs)


@functools.cache
def applied(function: Any) -> Applied:
    """Returns the target for calls of an autograd function, the same one for each."""
    return Applied(function)


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.matmul(a, b[0]) if b.dim() == 3 and a.dim() == 2 else torch.matmul(a, b)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The products of `at::_scaled_dot_product_attention_math`, which is what runs on meta.

    Its softmax, causal triangle, scale and dropout change no size and compare none.
    """
    given = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    plain = all(t.dim() == 4 and t.device.type == "meta" for t in given) and not (
        is_causal and attn_mask is not None
    )
    if not plain or len({t.dtype for t in given[:3]}) > 1:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scores = query @ key.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores + attn_mask
    return scores.to(value.dtype) @ value


# torch's own fake kernels for the first two accept bfloat16 only, and the third takes dozens of calls;
# a stand-in has the same shape, dtype and gradient flow, and is never part of the graph.
_STAND_INS = {
    "grouped_mm": _grouped_mm,
    "_grouped_mm": _grouped_mm,
    "scaled_dot_product_attention": _attention,
}


def on_fakes(func: Any) -> Any:
    """Returns the function to run on fake tensors for a call; the call itself as a rule."""
    return _STAND_INS.get(getattr(func, "__name__", ""), func)
