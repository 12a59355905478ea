"""Which of its names a module is called by: aliases apart, as torch.export keeps them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch import nn

from fxlora.trace.shell import tree


class Paths(contextlib.AbstractContextManager["Paths"]):
    """Resolves a module object to the name it was reached by.

    A module with one name is its name. Where a model has aliases (`self.b = self.a`), each
    attribute access gives its own stand-in: a second object of the same class over the same
    `__dict__`, so it is the module in everything but identity, and identity tells the name.
    torch.export does the same.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names: dict[int, list[str]] = {}
        for name, m in tree(model):
            self._names.setdefault(id(m), []).append(name)
        self._stand_ins: dict[tuple[int, str], nn.Module] = {}
        self._paths: dict[int, str] = {}
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> Paths:
        if any(len(names) > 1 for names in self._names.values()):
            for patch in self._watchers():
                self._patches.enter_context(patch)
        return self

    def __exit__(self, *exc: object) -> None:
        self._patches.close()

    def of(self, module: nn.Module) -> str | None:
        """Returns the path a call of `module` goes by; None for a module outside the model."""
        if id(module) in self._paths:
            return self._paths[id(module)]
        names = self._names.get(id(module))
        return None if names is None else names[0]

    def _note(self, child: Any, parent: nn.Module, name: str) -> Any:
        if not isinstance(child, nn.Module) or len(self._names.get(id(child), ())) < 2:
            return child
        above = self.of(parent)
        if above is None:
            return child
        path = f"{above}.{name}" if above else name
        if path not in self._names[id(child)]:
            return child
        key = (id(parent), name)
        if key not in self._stand_ins:
            made: nn.Module = object.__new__(type(child))
            made.__dict__ = child.__dict__
            self._stand_ins[key] = made
            self._paths[id(made)] = path
        return self._stand_ins[key]

    def _watchers(self) -> Iterator[Any]:
        note = self._note

        def getattr_(original: Callable[..., Any]) -> Callable[..., Any]:
            def watched(module: nn.Module, name: str) -> Any:
                return note(original(module, name), module, name)

            return watched

        def iter_(original: Callable[..., Any]) -> Callable[..., Any]:
            def watched(module: nn.Module) -> Iterator[Any]:
                for name, child in zip(list(module._modules), original(module), strict=False):
                    yield note(child, module, name)

            return watched

        def getitem(original: Callable[..., Any]) -> Callable[..., Any]:
            def watched(module: nn.Module, key: Any) -> Any:
                child = original(module, key)
                if isinstance(key, int):
                    key = str(key + len(module._modules) if key < 0 else key)
                return note(child, module, key) if isinstance(key, str) else child

            return watched

        def items(original: Callable[..., Any]) -> Callable[..., Any]:
            def watched(module: nn.Module) -> Any:
                return [(k, note(v, module, k)) for k, v in original(module)]

            return watched

        def values(_: Callable[..., Any]) -> Callable[..., Any]:
            def watched(module: nn.Module) -> Any:
                return [note(v, module, k) for k, v in module._modules.items()]

            return watched

        yield mock.patch.object(nn.Module, "__getattr__", getattr_(nn.Module.__getattr__))
        for owner in (nn.ModuleList, nn.Sequential):
            yield mock.patch.object(owner, "__iter__", iter_(owner.__iter__))
            yield mock.patch.object(owner, "__getitem__", getitem(owner.__getitem__))
        yield mock.patch.object(nn.ModuleDict, "__getitem__", getitem(nn.ModuleDict.__getitem__))
        yield mock.patch.object(nn.ModuleDict, "items", items(nn.ModuleDict.items))
        yield mock.patch.object(nn.ModuleDict, "values", values(nn.ModuleDict.values))
