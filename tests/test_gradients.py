"""Static requires_grad is autograd's own flag, for every tensor of either graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.fx import GraphModule, Interpreter, Node
from zoo import ZOO

import fxlora
from fxlora.gradients import requires_grad


class Recorder(Interpreter):
    """Runs a graph node by node and keeps every tensor."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.tensors: dict[Node, torch.Tensor] = {}

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, torch.Tensor):
            self.tensors[n] = out
        return out


def disagreements(graph: GraphModule, *inputs: Any) -> list[tuple[str, bool, bool]]:
    recorder = Recorder(graph)
    recorder.run(*inputs)
    flags = requires_grad(graph)
    assert recorder.tensors
    return [
        (n.name, flags[n], t.requires_grad)
        for n, t in recorder.tensors.items()
        if flags[n] != t.requires_grad
    ]


@pytest.mark.parametrize("name", ZOO)
def test_flags_are_autograd_s_on_the_zoo_before_and_after(name: str) -> None:
    entry = ZOO[name]
    inputs = entry.inputs(2, 16)
    traced = fxlora.trace(entry.build(), (), inputs)
    lora = fxlora.rewrite(traced, LoraConfig(r=4, target_modules=entry.targets))
    order = [n.target for n in traced.graph.nodes if n.op == "placeholder"]
    for graph in (traced, lora):
        assert disagreements(graph, *(inputs[k] for k in order)) == []


def test_flags_are_autograd_s_for_operations_that_cut() -> None:
    class Cuts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            h = self.lin(x)
            with torch.no_grad():
                frozen = self.lin(h)
            mask = h > 0
            out = torch.zeros_like(h)
            out[:, 0] = h[:, 0]
            plain = torch.zeros_like(h)
            plain[:, 1] = 1.0
            values, indices = h.topk(2)
            return (
                h.detach() + y, frozen * 2, mask.float(), out + 1, plain, values, indices,
                h.argmax(-1), y.view_as(h), y.type_as(h), torch.where(mask, h, y), h.sign(),
                h.data * 2, y.to(h), h.new_zeros(2), torch.ones_like(h) * y, h.long().float(),
            )  # fmt: skip

    inputs = (torch.randn(3, 4), torch.randn(3, 4))
    traced = fxlora.trace(Cuts(), inputs)
    assert disagreements(traced, *inputs) == []
    assert disagreements(fxlora.rewrite(traced, LoraConfig(target_modules=["lin"])), *inputs) == []


def test_a_frozen_base_carries_no_gradient_before_the_first_adapter() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    lora = fxlora.rewrite(fxlora.trace(model), LoraConfig(target_modules=["1"]))
    flags = {n.name: f for n, f in requires_grad(lora).items()}
    assert not flags["_0"]
    assert not flags["_1"]
    assert flags["_2"]


def test_an_input_that_requires_grad_says_so() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    traced = fxlora.trace(nn.Sequential(nn.ReLU()), (x,))
    assert [f for n, f in requires_grad(traced).items() if n.op == "placeholder"] == [True]
