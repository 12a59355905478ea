"""The dtype a node says is the one it gives, and the certificate believes no node that says another."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.fx import GraphModule, Interpreter, Node
from transformers.pytorch_utils import Conv1D

import fxlora
from fxlora import branches, nodes
from fxlora.canonical import canonical
from fxlora.dtypes import true_dtypes

INDICES = torch.arange(10).view(2, 5)


class Net(nn.Module):
    """An embedding, and one layer of every other kind behind it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(30, 16)
        self.lin = nn.Linear(16, 12)
        self.turned = Conv1D(8, 12)
        self.conv1 = nn.Conv1d(8, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)
        self.to(dtype)

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        x = self.turned(self.lin(self.emb(i)))
        x = self.conv1(x.transpose(1, 2))
        return self.conv2(x[:, :, None]).squeeze(2).transpose(1, 2)


class Attention(nn.Module):
    """Attention, whose adapters are added to its weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(30, 16)
        self.att = nn.MultiheadAttention(16, 2, batch_first=True)
        self.lin = nn.Linear(16, 12)
        self.to(dtype)

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        x = self.emb(i)
        return self.lin(self.att(x, x, x)[0])


@functools.cache
def traced(made: type[nn.Module], dtype: torch.dtype) -> GraphModule:
    return fxlora.trace(made(dtype), (INDICES,))


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYERS = ["emb", "lin", "turned", "conv1", "conv2"]


class _Watch(Interpreter):
    """Runs a graph and keeps what every node gives."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.given: dict[Node, torch.dtype] = {}

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, torch.Tensor) and n.op != "output":
            self.given[n] = out.dtype
        return out


def wrong_dtypes(graph: GraphModule, inputs: Any) -> list[tuple[str, Any, Any, Any]]:
    """Returns every node that says or is told another dtype than it gives: (node, given, said, told)."""
    watch = _Watch(graph)
    watch.run(inputs)
    told = true_dtypes(graph)
    assert any(n.meta.get("role") == "sum" for n in watch.given)
    return [
        (n.name, d, n.meta.get("dtype"), told[n])
        for n, d in watch.given.items()
        if not n.meta.get("dtype") == told[n] == d
    ]


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain-dropout": {"lora_dropout": 0.1},
    "dora": {"use_dora": True},
    "dora-bias": {"use_dora": True, "bias": "all"},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_node_says_the_dtype_it_gives(layer: str, dtype: torch.dtype, settings: str) -> None:
    config = LoraConfig(r=4, target_modules=[layer], **SETTINGS[settings])
    lora = fxlora.rewrite(traced(Net, dtype), config)
    assert wrong_dtypes(lora, INDICES) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", ["lin", "turned"])
def test_dora_with_dropout_says_the_dtypes_of_train_mode(layer: str, dtype: torch.dtype) -> None:
    config = LoraConfig(r=4, target_modules=[layer], use_dora=True, lora_dropout=0.1)
    lora = fxlora.rewrite(traced(Net, dtype), config)
    assert wrong_dtypes(lora.train(), INDICES) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["att"]},
        {"target_parameters": ["lin.weight"]},
        {"target_modules": ["lin"], "trainable_token_indices": {"emb": [1, 3]}},
        {"target_modules": ["lin"], "use_rslora": True, "init_lora_weights": "gaussian"},
    ],
    ids=lambda s: next(reversed(s)),
)
def test_an_adapter_of_a_weight_says_the_dtypes_it_gives(
    settings: dict[str, Any], dtype: torch.dtype
) -> None:
    lora = fxlora.rewrite(traced(Attention, dtype), LoraConfig(r=4, **settings))
    assert wrong_dtypes(lora, INDICES) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_dora_is_peft_s_in_every_dtype(layer: str, dtype: torch.dtype) -> None:
    config = LoraConfig(r=4, target_modules=[layer], use_dora=True)
    found = fxlora.compare(Net(dtype), config, (INDICES,))
    assert found.equal, found.differences
    assert found.certificate.equal
    assert found.outputs
    assert all(d.equal for d in (*found.outputs, *found.gradients))


def _norm_is_rounded(m: pytest.MonkeyPatch) -> None:
    """The mistake that was here: the norm of a bf16 embedding's DoRA was cast to bf16."""
    norm = branches._Branch._norm

    def rounded(self: Any, weight: Node, delta: Node) -> Node:
        out = norm(self, weight, delta)
        dtype = weight.meta["dtype"]
        return self._new.add("magnitude", "call_method", "to", (out, dtype), (16,), dtype)

    m.setattr(branches._Branch, "_norm", rounded)


def _and_says_so_before(m: pytest.MonkeyPatch) -> None:
    """With it, what hid it: the sum in the norm said that it is in the dtype of the weight."""
    _norm_is_rounded(m)
    add = nodes.Inserter.add

    def like_the_weight(self: Any, role: str, op: str, target: Any, *rest: Any) -> Node:
        node = add(self, role, op, target, *rest)
        if role == "magnitude" and (target in ("add", "detach") or target is torch.linalg.norm):
            node.meta["dtype"] = torch.bfloat16
        return node

    m.setattr(nodes.Inserter, "add", like_the_weight)


@pytest.mark.parametrize("mistake", [_norm_is_rounded, _and_says_so_before])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_certificate_believes_no_node_that_says_a_wrong_dtype(
    monkeypatch: pytest.MonkeyPatch, device: str, mistake: Any
) -> None:
    mistake(monkeypatch)
    model = Net(torch.bfloat16).to(device)
    config = LoraConfig(r=4, target_modules=["emb"], use_dora=True)
    found = fxlora.compare(model, config, (INDICES.to(device),))
    assert not found.certificate.equal
    assert "cast to torch.bfloat16" in found.certificate.difference[0]  # type: ignore[index]


def test_a_wrong_dtype_alone_changes_no_certificate() -> None:
    config = LoraConfig(r=4, target_modules=["lin"], use_dora=True)
    lora = fxlora.rewrite(traced(Net, torch.bfloat16), config)
    before = canonical(lora).digest
    for node in lora.graph.nodes:
        if node.meta.get("role") not in (None, "base"):
            node.meta["dtype"] = torch.float64
    assert canonical(lora).digest == before


def test_what_takes_a_node_s_place_has_its_dtype() -> None:
    lora = fxlora.rewrite(traced(Net, torch.bfloat16), LoraConfig(r=4, target_modules=["lin"]))
    base = next(n for n in lora.graph.nodes if n.meta.get("role") == "base")
    wide = next(n for n in lora.graph.nodes if n.meta.get("role") == "sum")
    with pytest.raises(AssertionError, match=wide.name):
        nodes.redirect([], base, wide)


class Regions(nn.Module):
    """Layers inside a torch.autocast of the model's own, and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.conv, self.turned = nn.Linear(8, 8), nn.Conv1d(4, 4, 1), Conv1D(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.turned(self.conv(self.lin(x)))
        return self.head(y.float())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("layer", ["lin", "conv", "turned", "head"])
def test_inside_the_models_own_autocast_adapters_compute_in_its_dtype(
    layer: str, dropout: float
) -> None:
    x = torch.randn(3, 4, 8)
    config = LoraConfig(r=2, target_modules=[layer], lora_dropout=dropout)
    lora = fxlora.rewrite(fxlora.trace(Regions(), (x,)), config)
    said = {n.name: n.meta.get("dtype") for n in lora.graph.nodes}
    watch = _Watch(lora)
    watch.run(x)
    assert {n.name: d for n, d in watch.given.items()} == {
        n.name: said[n.name] for n in watch.given
    }
    found = fxlora.compare(Regions(), config, (x,))
    assert found.equal, found.differences
