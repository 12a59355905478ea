"""What moving, sharing and running twice must not change: writes in place, drawn numbers, state, order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fxlora_viz
import pytest
import torch
import transformers
from peft import LoraConfig
from torch import nn
from torch.fx import GraphModule
from torch.nn import functional as F

import fxlora
from fxlora.effects import effects
from fxlora.errors import UnsupportedError
from fxlora.lint import lint
from fxlora.memory import memory
from fxlora.optimize import report
from fxlora.optimize.run import MODES


def adapted(model: nn.Module, args: Any = (), kwargs: Any = None, **settings: Any) -> GraphModule:
    lora = fxlora.rewrite(
        fxlora.trace(model, args, kwargs),
        LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **settings}),
    )
    torch.manual_seed(1)
    for p in lora.parameters():
        if p.requires_grad:
            p.data.copy_(torch.randn_like(p) * 0.3)
    return lora


# ---- memory mode -------------------------------------------------------------------------------


def test_an_adapted_layer_that_feeds_another_is_grouped_after_it() -> None:
    model, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), torch.randn(2, 8)
    lora = adapted(model, (x,), target_modules=["0", "1", "2"])
    fast = fxlora.optimize(lora, mode="memory")
    assert report(fast).step("groups").changed == 3
    assert torch.equal(fast(x), lora(x))


def test_a_layer_that_is_called_again_and_again_is_grouped_call_by_call() -> None:
    model = transformers.AlbertModel(
        transformers.AlbertConfig(
            vocab_size=99, embedding_size=8, hidden_size=16, num_hidden_layers=3,
            num_attention_heads=2, intermediate_size=32, hidden_act="gelu",
        )
    ).eval()  # fmt: skip
    inputs = {"input_ids": torch.randint(0, 99, (2, 5))}
    lora = adapted(model, (), inputs, target_modules="all-linear")
    fast = fxlora.optimize(lora, mode="memory")
    assert torch.equal(fast(**inputs).last_hidden_state, lora(**inputs).last_hidden_state)


def t5() -> tuple[nn.Module, dict[str, Any], list[str]]:
    ids = torch.randint(3, 90, (2, 9))
    config = transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4
    )
    kwargs = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    return transformers.T5Model(config), kwargs, ["q", "k", "v"]


def phi() -> tuple[nn.Module, dict[str, Any], list[str]]:
    config = transformers.PhiConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, attention_dropout=0.1,
    )  # fmt: skip
    kwargs = {"input_ids": torch.randint(3, 90, (2, 9)), "use_cache": False}
    return transformers.PhiForCausalLM(config), kwargs, ["q_proj", "k_proj", "v_proj", "fc1"]


@pytest.mark.parametrize("build", [t5, phi])
@pytest.mark.parametrize("mode", ["exact", "memory"])
def test_dropouts_draw_their_numbers_in_the_order_of_the_plain_graph(
    build: Callable[[], tuple[nn.Module, dict[str, Any], list[str]]], mode: str
) -> None:
    model, kwargs, targets = build()
    lora = adapted(model.train(), (), kwargs, target_modules=targets, lora_dropout=0.1).train()
    fast = fxlora.optimize(lora, mode=mode).train()
    made = []
    for graph in (lora, fast):
        torch.manual_seed(0)
        made.append(graph(**kwargs)[0])
    assert torch.equal(*made)
    if mode == "memory":
        assert report(fast).step("groups").changed > 5


class Drawing(nn.Module):
    """Siblings with a drawn number between them."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.between = nn.Linear(16, 16), nn.Linear(16, 16), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.between(self.q(x)) + self.k(x)


@pytest.mark.parametrize(
    ("between", "together"),
    [
        (torch.tanh, True),
        (lambda y: y.view(-1, 16), True),
        (lambda y: F.dropout(y, 0.5), False),
        (lambda y: y + torch.rand(16), False),
        (lambda y: y + torch.randn_like(y), False),
        (lambda y: y + torch.empty(16).uniform_(0, 1), False),
        (lambda y: F.scaled_dot_product_attention(y[None], y[None], y[None], dropout_p=0.2)[0], False),
    ],
    ids=["tanh", "view", "dropout", "rand", "randn_like", "uniform_", "attention"],
)  # fmt: skip
def test_siblings_are_one_group_unless_numbers_are_drawn_between_their_dropouts(
    between: Callable[[torch.Tensor], torch.Tensor], together: bool
) -> None:
    x = torch.randn(3, 16)
    for dropout in (0.0, 0.3):
        lora = adapted(
            Drawing(between).train(), (x,), target_modules=["q", "k"], lora_dropout=dropout
        ).train()
        fast = fxlora.optimize(lora, mode="memory").train()
        found = sum(n.meta.get("role") == "group" for n in fast.graph.nodes)
        assert found == (1 if together or not dropout else 2)
        made = []
        for graph in (lora, fast):
            torch.manual_seed(0)
            made.append(graph(x))
        assert torch.equal(*made)


@pytest.mark.parametrize("shape", [(3, 16), (2, 3, 16)])
@pytest.mark.parametrize("mode", MODES)
def test_the_result_of_an_adapted_layer_may_be_written_into(
    mode: str, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape)
    lora = adapted(
        nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True)), (x,), target_modules=["0"]
    )
    fast = fxlora.optimize(lora, mode=mode)
    gradients = []
    for graph in (lora, fast):
        graph.zero_grad()
        graph(x).sum().backward()
        gradients.append([p.grad.clone() for p in graph.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> Any:
        return self.q(x), self.k(x)


@pytest.mark.parametrize("mode", MODES)
def test_a_sibling_no_loss_reads_gets_no_gradient_and_no_zeros(mode: str) -> None:
    x = torch.randn(3, 16, requires_grad=True)
    fast = fxlora.optimize(adapted(Two(), (x,), target_modules=["q", "k"]), mode=mode)
    fast(x)[0].square().sum().backward()
    found = {n: p.grad for n, p in fast.named_parameters() if p.requires_grad}
    assert {n.partition(".")[0] for n, g in found.items() if g is not None} == {"q"}
    assert x.grad is not None


def test_layers_that_read_the_encoder_are_grouped_and_checkpointed_layer_by_layer() -> None:
    config = transformers.BartConfig(
        vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=64,
        decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    ids = torch.randint(3, 90, (2, 9))
    kwargs = {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
    model = transformers.BartModel(config).eval()
    lora = adapted(model, (), kwargs, target_modules="all-linear")
    fast = fxlora.optimize(lora, mode="memory", checkpoint=True)
    assert report(fast).step("checkpoints").changed == 5
    assert torch.equal(fast(**kwargs)[0], lora(**kwargs)[0])


# ---- writes between siblings -------------------------------------------------------------------


class Written(Two):
    """Siblings of one x, which is written into between them."""

    def __init__(self, write: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1
        a = self.q(x)
        self.write(x)
        return a + self.k(x)


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "itself": lambda x: x.mul_(2),
    "row": lambda x: x[:, 0].zero_(),
    "view": lambda x: x.view(-1).mul_(3),
    "of a view": lambda x: x.t()[1:].add_(1),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 3), (torch.bfloat16, 3000)])
def test_siblings_read_what_is_there_when_it_is_their_turn(
    mode: str, write: str, dtype: torch.dtype, rows: int
) -> None:
    x = torch.randn(rows, 16).to(dtype)
    lora = adapted(Written(WRITES[write]).to(dtype), (x,), target_modules=["q", "k"])
    fast = fxlora.optimize(lora, mode=mode)
    with torch.no_grad():
        if mode != "inference":
            assert torch.equal(fast(x), lora(x))
        torch.testing.assert_close(fast(x), lora(x), rtol=2e-2, atol=2e-2)
    if dtype is torch.bfloat16:  # in float32 torch refuses the backward pass of the plain graph too
        made = []
        for graph in (lora, fast):
            graph.zero_grad()
            graph(x).float().sum().backward()
            made.append([p.grad.clone() for p in graph.parameters() if p.requires_grad])
        torch.testing.assert_close(*made)


def test_a_gate_that_is_written_into_before_the_product_is_no_swiglu() -> None:
    class Gate(Two):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            g = self.q(x) * 1
            a = F.silu(g)
            g.mul_(2)
            return a * self.k(x)

    x = torch.randn(3, 16)
    lora = adapted(Gate(), (x,), target_modules=["k"])
    fast = fxlora.optimize(lora, mode="memory")
    assert report(fast).step("swiglus").refused[0].why == "the gate is written to in place"
    assert torch.equal(fast(x), lora(x))


# ---- layers that are run twice -----------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.l(x))


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(8, 8)
        self.register_buffer("n", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n.mul_(2)
        return self.l(x) * self.n


class Row(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x[:, 0].mul_(2.0)
        return self.l(x)


class Cast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.l(x)


class Net(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.e, self.layers = nn.Linear(8, 8), nn.ModuleList([kind(), kind()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.e(x)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("kind", [Normed, Counted, Row])
def test_a_layer_with_state_is_not_run_twice(kind: type[nn.Module]) -> None:
    x, states, gradients = torch.randn(5, 8), [], []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = Net(kind).train()
        lora = adapted(model, (x,), target_modules=["e", "l"])
        fast = fxlora.optimize(lora, checkpoint=checkpoint).train()
        fast(x).sum().backward()
        states.append([b.clone() for b in model.buffers()])
        gradients.append([p.grad.clone() for p in fast.parameters() if p.requires_grad])
        if checkpoint:
            step = report(fast).step("checkpoints")
            assert (step.changed, len(step.refused)) == (0, 2)
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def autocast_depth() -> int:
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


def test_a_layer_that_is_run_twice_leaves_its_autocast_behind() -> None:
    x = torch.randn(4, 8)
    fast = fxlora.optimize(adapted(Net(Cast), (x,), target_modules=["l"]), checkpoint=True)
    assert report(fast).step("checkpoints").changed == 2
    fast(x).float().sum().backward()
    assert autocast_depth() == 0
    before = fast(x)
    with torch.no_grad():
        for name, p in fast.named_parameters():
            if "lora_" in name:
                p.add_(1.0)
    assert not torch.equal(fast(x), before)  # no cast of a weight before the step is kept


# ---- what reads the plain graph ----------------------------------------------------------------


@pytest.mark.parametrize("settings", [*({"mode": m} for m in MODES), {"checkpoint": True}])
@pytest.mark.parametrize("reader", [effects, lint, fxlora_viz.draw])
def test_what_reads_peft_s_steps_refuses_an_optimized_graph(
    reader: Callable[[GraphModule], Any], settings: dict[str, Any]
) -> None:
    x = torch.randn(4, 8)
    fast = fxlora.optimize(adapted(Net(Row), (x,), target_modules=["e"]), **settings)
    with pytest.raises(UnsupportedError, match=r"before fxlora\.optimize"):
        reader(fast)


def test_a_checkpointed_graph_is_neither_optimized_again_nor_measured() -> None:
    x = torch.randn(4, 8)
    fast = fxlora.optimize(adapted(Net(Cast), (x,), target_modules=["e"]), checkpoint=True)
    with pytest.raises(UnsupportedError, match="checkpointed already"):
        fxlora.optimize(fast)
    with pytest.raises(UnsupportedError, match="memory reads the plain graph"):
        memory(fast, (x,))
