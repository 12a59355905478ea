"""Static requires_grad is autograd's own flag, for every tensor of either graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F
from zoo import ZOO

import fxlora
from fxlora.gradients import requires_grad
from fxlora.lint import Options, Settings, lint


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


class Under(nn.Module):
    """A layer, and a function of it and an input."""

    def __init__(self, function: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.same, self.flat, self.drop = nn.Identity(), nn.Flatten(), nn.Dropout(0.5)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


VIEWS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "view": lambda m, y: y.view(8, 2),
    "getitem": lambda m, y: y[0],
    "picked": lambda m, y: y[[0]],
    "expand": lambda m, y: y.expand(2, 4, 4),
    "reshape": lambda m, y: y.reshape(-1),
    "contiguous": lambda m, y: y.contiguous(),
    "made contiguous": lambda m, y: y.t().contiguous(),
    "dropout": lambda m, y: F.dropout(y, 0.5, m.training),
    "dropout layer": lambda m, y: m.drop(y),
    "layers": lambda m, y: m.flat(m.same(y)),
    "chunks": lambda m, y: y.chunk(2)[1],
    "detached": lambda m, y: y.detach().view(-1),
    "as integers": lambda m, y: y.view(torch.int32),
    "weight": lambda m, y: m.lin.weight.t(),
    "sum": lambda m, y: y.sum(),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_taken_under_no_grad_requires_grad_as_its_tensor_does(
    name: str, training: bool
) -> None:
    def function(m: Any, x: torch.Tensor) -> Any:
        y = m.lin(x)
        with torch.no_grad():
            z = VIEWS[name](m, y)
        return z * 2, z

    x = torch.randn(4, 4)
    traced = fxlora.trace(Under(function).train(training), (x,))
    assert disagreements(traced, x) == []
    assert disagreements(traced.train(not training), x) == []


def _written_through_one_of_two_views(m: Any, x: torch.Tensor) -> Any:
    y = x * 1
    one, other, detached = y.view(-1), y.t(), y.detach()
    one.add_(m.lin(x).view(-1))
    return y, other, detached


def _switched_off(m: Any, x: torch.Tensor) -> Any:
    y = m.lin(x)
    view = y.view(-1)
    early = y * 2
    y.detach_()
    return early, y * 2, view.view(2, 8) * 2


CHANGES: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "written through one of two views": _written_through_one_of_two_views,
    "switched off": _switched_off,
    "switched on": lambda m, x: (y := m.lin(x).detach(), y.view(-1), y.requires_grad_(), y * 2),
    "left off": lambda m, x: m.lin(x).detach().requires_grad_(requires_grad=False) * 2,
    "left off by position": lambda m, x: m.lin(x).detach().requires_grad_(False) * 2,
    "made with it": lambda m, x: torch.zeros_like(m.lin(x), requires_grad=True) * 2,
    "of the same device": lambda m, x: torch.eye(4, device=m.lin(x).device) * 2,
    "of the same dtype": lambda m, x: torch.tensor(2.0, dtype=m.lin(x).dtype) * 2,
    "counted": lambda m, x: (m.lin(x).norm(p=0), torch.linalg.vector_norm(m.lin(x), 0)),
    "together": lambda m, x: [t * 2 for t in torch.broadcast_tensors(m.lin(x), x, x[0])],
    "gridded": lambda m, x: [t * 2 for t in torch.meshgrid(m.lin(x)[0], x[0], indexing="ij")],
    "into integers": lambda m, x: (i := x.long(), i.__setitem__(0, m.lin(x)[0]), i.float() * 2),
    "a statistic": lambda m, x: (s := x[0] * 1, F.batch_norm(m.lin(x), s, x[1].abs(), None, None, True)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_flags_are_autograd_s_where_a_tensor_changes(name: str) -> None:
    x = torch.randn(4, 4)
    traced = fxlora.trace(Under(CHANGES[name]), (x,))
    assert disagreements(traced, x) == []


def test_positions_by_the_size_of_an_input_require_no_grad() -> None:
    class Positions(nn.Embedding):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.arange(x.shape[1], device=x.device))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.places, self.two = nn.Linear(4, 4), Positions(8, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.one(x)
            return self.two(h + self.places(h))

    x = torch.randn(2, 3, 4)
    lora = fxlora.rewrite(fxlora.trace(Model(), (x,)), LoraConfig(target_modules=["one"]))
    assert disagreements(lora, x) == []


@pytest.mark.parametrize("asking", [True, False])
@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"bias": "lora_only"}, {"use_dora": True, "bias": "lora_only"}],
)
def test_flags_are_autograd_s_behind_an_adapter(settings: dict[str, Any], asking: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    config = LoraConfig(target_modules=["0", "2"], **settings)
    x = torch.randn(2, 4, requires_grad=asking)
    lora = fxlora.rewrite(fxlora.trace(model, (x,)), config)
    assert disagreements(lora, x) == []


def test_attention_s_weights_do_not_require_grad_for_its_output_layer_s_sake() -> None:
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(4, 2)

        def forward(self, x: torch.Tensor) -> Any:
            out, weights = self.mha(x, x, x)
            return out * 2, weights * 2

    x = torch.randn(2, 3, 4)
    lora = fxlora.rewrite(fxlora.trace(Weights(), (x,)), LoraConfig(target_modules=["mha"]))
    for p in lora.mha.lora_A.parameters():
        p.requires_grad_(False)
    for p in lora.mha.lora_B.parameters():
        p.requires_grad_(False)
    assert disagreements(lora, x) == []


def asked(out: torch.Tensor) -> None:
    out.requires_grad_()


def set_on(out: torch.Tensor) -> None:
    out.requires_grad = True


def asked_for_nothing(out: torch.Tensor) -> None:
    out.requires_grad_(False)


@pytest.mark.parametrize("ask", [asked, set_on, asked_for_nothing])
def test_a_hook_that_asks_for_a_gradient_is_heard(ask: Callable[[torch.Tensor], None]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    for p in model[0].parameters():
        p.requires_grad_(False)
    model[0].register_forward_hook(lambda m, args, out: ask(out))
    x = torch.randn(2, 4)
    traced = fxlora.trace(model, (x,))
    assert disagreements(traced, x) == []
    lora = fxlora.rewrite(traced, LoraConfig(target_modules=["2"]))
    assert disagreements(lora, x) == []


def test_gradients_asked_of_a_model_s_inputs_are_heard_and_pass_a_checkpoint() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=99,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).train()
    model.enable_input_require_grads()
    kwargs = {"input_ids": torch.ones(2, 6, dtype=torch.long), "use_cache": False}
    settings = LoraConfig(target_modules=["down_proj"], layers_to_transform=[1])
    traced = fxlora.trace(model, (), kwargs)
    lora = fxlora.rewrite(traced, settings)
    order = [str(n.target) for n in lora.graph.nodes if n.op == "placeholder"]
    assert disagreements(lora, *(kwargs[n] for n in order)) == []
    reentrant = Settings(options=Options(gradient_checkpointing="reentrant"))
    assert "FXL407" not in {f.rule for f in lint(traced, settings, reentrant)}
