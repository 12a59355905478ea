"""Regions of a forward in a graph's code: entered, left, left by an error too, and compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import fxlora
from fxlora.trace.regions import closed_regions


class Nested(nn.Module):
    """A region inside a region, and one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.a, self.b = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.a(self.b.weight)
            with torch.no_grad():
                x = self.emb(ids)
            y = y + self.b(y)
        with torch.no_grad():
            z = self.emb(ids)
        return self.a(x + z) + y.float()[:2]


def state() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")


def graphs() -> list[GraphModule]:
    traced = fxlora.trace(Nested(), (torch.tensor([1, 2]),))
    fast = fxlora.optimize(traced)
    return [traced, fast, copy.deepcopy(traced), copy.deepcopy(fast)]


@pytest.mark.parametrize("at", range(4), ids=["plain", "optimized", "copy", "copy of optimized"])
def test_an_error_inside_leaves_the_regions(at: int) -> None:
    graph = graphs()[at]
    with pytest.raises(IndexError):
        graph(torch.tensor([1, 20]))
    assert state() == (True, False)
    assert graph(torch.tensor([1, 2])).requires_grad


def test_nested_regions_compute_what_the_model_does() -> None:
    ids = torch.tensor([1, 2])
    for graph in graphs():
        model = Nested()
        model.load_state_dict(graph.state_dict(), strict=False)
        assert torch.equal(graph(ids), model(ids))


def test_regions_are_compiled_without_a_break() -> None:
    ids = torch.tensor([1, 2])
    for graph in graphs()[:2]:
        torch._dynamo.reset()
        compiled = torch.compile(graph, fullgraph=True, backend="eager")
        assert torch.equal(compiled(ids), graph(ids))


def test_what_does_not_nest_is_left_as_it_is() -> None:
    lines = [
        "enter_grad_mode = enter_grad_mode(False)\n",
        "enter_autocast = enter_autocast('cpu', None, True, True)\n",
        "x = y + 1\n",
        "leave_grad_mode = leave_grad_mode(enter_grad_mode)\n",
        "leave_autocast = leave_autocast(enter_autocast)\n",
    ]
    assert closed_regions(lines) == lines
    nested = "".join(closed_regions([*lines[:3], lines[4], lines[3]]))
    assert nested.splitlines()[1:3] == ["try:", "    pass"]
    assert "    with enter_autocast.region('cpu', None, True, True):" in nested


def test_a_region_of_which_nothing_is_left_is_still_code() -> None:
    lines = ["g = enter_grad_mode(False)\n", "# COUNTER: 1\n", "h = leave_grad_mode(g)\n"]
    compile("".join(closed_regions(lines)), "region", "exec")
