"""The node that refuses an input the traced graph does not stand for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch

from fxlora.errors import GuardError
from fxlora.trace import sizes
from fxlora.trace.shell import GraphHelper

_FUNCTIONS: dict[str, Any] = {f.__name__: f for f in (*sizes._BY_NAME.values(), sizes.choose)}
_FUNCTIONS.update(ceil=math.ceil, floor=math.floor, pow=pow)
_SCOPE: dict[str, Any] = {"__builtins__": {}, **_FUNCTIONS}


@functools.cache
def _code(conditions: tuple[str, ...]) -> CodeType:
    """Returns conditions as one compiled expression: a call of the graph must not parse text."""
    return compile(" and ".join(f"({c})" for c in conditions), "<guards>", "eval")


def _test(
    ranks: tuple[int, ...],
    fixed: tuple[tuple[int, int, int], ...],
    symbols: dict[str, tuple[int, int]],
    conditions: tuple[str, ...],
) -> Callable[[tuple[Any, ...]], bool]:
    """Returns one compiled expression that is true where no check of the shapes would raise."""
    parts = [f"isinstance(t[{i}], Tensor) and t[{i}].dim() == {r}" for i, r in enumerate(ranks)]
    parts += [f"t[{i}].size({dim}) == {size}" for i, dim, size in fixed]
    if conditions:
        met = " and ".join(f"({c})" for c in conditions)
        given = ", ".join(f"t[{i}].size({d})" for i, d in symbols.values())
        parts.append(f"(lambda {', '.join(symbols)}: {met})({given})")
    scope = {**_SCOPE, "Tensor": torch.Tensor, "isinstance": isinstance}
    made: Callable[[tuple[Any, ...]], bool] = eval(
        f"lambda t: {' and '.join(parts) or True}", scope
    )
    return made


class _Missing:
    """Stands for an argument the traced call was given and this call was not."""

    def __repr__(self) -> str:
        return "None"


class InputGuards(GraphHelper):
    """Checks the inputs of a traced graph before it runs.

    A concrete trace follows one path through the model's Python code. Wherever that path was
    chosen by a size, a flag or train/eval, the choice is written down here and checked.

    Args:
        names: one text per tensor input, as a reader would write it (`batch['mask']`).
        ranks: the number of dimensions of each tensor input.
        fixed: (index, dimension, size) for each dimension the trace fixed.
        symbols: symbol -> (index, dimension).
        conditions: Python text over the symbols, each of which must hold.
        constants: argument name -> the value it had in the trace.
        mode: None, or the only value of `training` the graph stands for.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        ranks: tuple[int, ...],
        fixed: tuple[tuple[int, int, int], ...],
        symbols: dict[str, tuple[int, int]],
        conditions: tuple[str, ...],
        constants: dict[str, Any],
        mode: bool | None = None,
    ) -> None:
        super().__init__()
        self.names = names
        self.ranks = ranks
        self.fixed = fixed
        self.symbols = symbols
        self.conditions = conditions
        self.constants = constants
        self.mode = mode
        self.mode_reason = ""
        self.path = "_guards"
        self._holds: Callable[[tuple[Any, ...]], bool] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what is compiled: it can be neither copied nor pickled."""
        return {**self.__dict__, "_holds": None}

    def forward(self, tensors: tuple[Any, ...], constants: tuple[Any, ...] = ()) -> None:
        """Raises `GuardError` when an input is not one the graph stands for."""
        if torch.compiler.is_compiling():
            return  # dynamo guards its own inputs, and could not follow the text below
        if constants:
            self._check_constants(constants)
        if self._holds is None:
            self._holds = _test(self.ranks, self.fixed, self.symbols, self.conditions)
        if not self._holds(tensors):
            self._check_shapes(tensors)  # says which
        if self.mode is not None and self.training != self.mode:
            now, was = ("train", "eval") if self.training else ("eval", "train")
            raise GuardError(
                f"this graph was traced in {was} mode and the model takes another path in {now} "
                f"mode{self.mode_reason}: call model.{now}() and trace it again"
            )

    def _check_constants(self, constants: tuple[Any, ...]) -> None:
        for (name, expected), got in zip(self.constants.items(), constants, strict=True):
            if type(got) is not type(expected) or got != expected:
                raise GuardError(
                    f"{name}={got!r}: this graph was traced with {name}={expected!r} and stands "
                    "for that value only; trace the model again with the new one"
                )

    def _check_shapes(self, tensors: tuple[Any, ...]) -> None:
        for name, rank, t in zip(self.names, self.ranks, tensors, strict=True):
            if not isinstance(t, torch.Tensor):
                raise GuardError(
                    f"{name} is missing: this graph was traced with it; "
                    f"it takes {', '.join(self.names)}"
                )
            if t.dim() != rank:
                raise GuardError(
                    f"{name} has shape {tuple(t.shape)}; this graph was traced with "
                    f"{rank} dimensions there"
                )
        for index, dim, size in self.fixed:
            got = tensors[index].size(dim)
            if got != size:
                raise GuardError(
                    f"{self.names[index]}.size({dim}) is {got}; this graph stands for {size} only. "
                    "Trace the model again with this size"
                )
        if self.conditions:
            values = {s: tensors[i].size(d) for s, (i, d) in self.symbols.items()}
            if not eval(_code(self.conditions), _SCOPE, values):
                broken = next(c for c in self.conditions if not eval(_code((c,)), _SCOPE, values))
                raise GuardError(self._violation(broken, values))

    def _violation(self, condition: str, values: dict[str, int]) -> str:
        names = [f"{self.names[i]}.size({d})={values[s]}" for s, (i, d) in self.symbols.items()]
        meaning = ", ".join(
            f"{s} is {self.names[i]}.size({d})"
            for s, (i, d) in self.symbols.items()
            if s in condition
        )
        return (
            f"the inputs ({', '.join(names)}) leave the path this graph was traced on: it needs "
            f"{condition}, where {meaning}. Trace the model again with such an input"
        )


class ByMode(GraphHelper):
    """Returns one constant in train mode and another in eval mode.

    A model's own `if self.training` or `training=self.training` becomes a call of this module,
    placed below the module that asked, so that `train()` and `eval()` reach it.
    """

    def __init__(self, train: Any, eval: Any) -> None:
        super().__init__()
        self.train_value = train
        self.eval_value = eval

    def forward(self) -> Any:
        """Returns the constant of the current mode."""
        return self.train_value if self.training else self.eval_value

    def extra_repr(self) -> str:
        """Shows both constants."""
        return f"train={self.train_value!r}, eval={self.eval_value!r}"


class TrainOnly(GraphHelper):
    """Runs a function for its effect on the random state, in train mode only.

    Layer-drop draws a random number per layer in train mode even when its probability is zero;
    leaving the draw out would shift every dropout mask after it.
    """

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function in train mode; returns None in eval mode."""
        return self.function(*args, **kwargs) if self.training else None
