"""The matrix goes red for one wrong thing: each mutation of our own code must fail its rows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix import ROWS, Row
from torch.fx import GraphModule

import fxlora
from fxlora import branches, layers, nodes

# The package's attribute of that name is the function.
REWRITE = sys.modules["fxlora.rewrite"]
BY_NAME = {r.id: r for r in ROWS}
Patch = Callable[[pytest.MonkeyPatch], None]


def same(row: Row) -> bool:
    args, kwargs = row.inputs()
    return fxlora.compare(row.build(), row.config(), args, kwargs).differences == ()


def outputs_are_peft_s(row: Row) -> bool:
    """Whether a run alone, without names, flags and certificate, sees no difference."""
    args, kwargs = row.inputs()
    found = fxlora.compare(row.build(), row.config(), args, kwargs)
    return bool(found.outputs) and all(d.equal for d in (*found.outputs, *found.gradients))


def scaling_dropped(m: pytest.MonkeyPatch) -> None:
    m.setattr(branches._Branch, "_scaled", lambda self, b: b)


def scaling_of_a_weight_dropped(m: pytest.MonkeyPatch) -> None:
    add = nodes.Inserter.add

    def unscaled(self: Any, role: str, op: str, target: Any, args: Any, *rest: Any) -> Any:
        args = (args[0], 1.0) if role == "scale" else args
        return add(self, role, op, target, args, *rest)

    m.setattr(nodes.Inserter, "add", unscaled)


def transpose_flipped(m: pytest.MonkeyPatch) -> None:
    add = nodes.Inserter.add

    def flipped(self: Any, role: str, op: str, target: Any, args: Any, *rest: Any) -> Any:
        if target == "permute":
            args = (args[0], 2, 1, 0)
        if target == "transpose":
            args = (args[0], 0, 0)
        return add(self, role, op, target, args, *rest)

    m.setattr(nodes.Inserter, "add", flipped)


def cast_moved(m: pytest.MonkeyPatch) -> None:
    m.setattr(layers, "casts_branch", lambda *_: True)


def one_call_skipped(m: pytest.MonkeyPatch) -> None:
    whole = branches.insert_branches
    seen: set[str] = set()

    def skip(graph: Any, root: Any, base: Any, entries: Any, quirks: Any) -> None:
        name = entries[0][1].name
        if name not in seen:
            seen.add(name)
            whole(graph, root, base, entries, quirks)

    m.setattr(branches, "insert_branches", skip)


def one_bias_frozen(m: pytest.MonkeyPatch) -> None:
    trains = REWRITE.bias_trains
    m.setattr(
        REWRITE,
        "bias_trains",
        lambda name, *rest: trains(name, *rest) and not name.startswith("lin0"),
    )


def adapters_in_the_wrong_order(m: pytest.MonkeyPatch) -> None:
    made = REWRITE.build

    def swapped(base: GraphModule, plan: Any, *rest: Any) -> Any:
        held = made(base, plan, *rest)
        for part in held.parts.values():
            for p in part.parameters() if isinstance(part, torch.nn.Module) else ():
                p.data = p.data.flip(0)
        return held

    m.setattr(REWRITE, "build", swapped)


MUTATIONS: list[tuple[Patch, tuple[str, ...], bool]] = [
    # The mutation, rows it must turn red, whether a run alone must see it too.
    (scaling_dropped, ("linear-alpha-32", "conv-2d-dora", "text-embedding-dora"), True),
    (scaling_of_a_weight_dropped, ("parameter-rslora", "linear-alpha-32"), True),
    (transpose_flipped, ("parameter-experts-transposed", "parameter-experts-both"), True),
    (cast_moved, ("linear-bf16", "text-conv1d-bf16"), True),
    (one_call_skipped, ("linear-called-three-times", "linear-called-three-times-dora"), True),
    (one_bias_frozen, ("linear-bias-all", "linear-bias-lora-only"), False),
    (adapters_in_the_wrong_order, ("linear-first", "conv-1d"), False),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("mutate", "name", "runs"),
    [(m, n, runs) for m, names, runs in MUTATIONS for n in names],
    ids=lambda v: getattr(v, "__name__", v) if not isinstance(v, bool) else "",
)
def test_a_mutation_of_our_code_turns_its_row_red(
    mutate: Patch, name: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = BY_NAME[name]
    assert same(row)
    mutate(monkeypatch)
    try:
        assert not same(row)
        assert not runs or not outputs_are_peft_s(row)
    except RuntimeError as e:
        # A flipped transpose of unequal sides does not even run, which is as red as can be.
        assert "must match" in str(e) or "Expected" in str(e)  # noqa: PT017
