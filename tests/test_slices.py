"""A fused layer's parts: the rows that autograd says reach the query, the key and the value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import fxlora
from fxlora.example_inputs import for_model
from fxlora.slices import Slice, slices

Rows = dict[str, tuple[int, ...]]
_SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def _model(kind: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**_SMALL, **settings})
    config._attn_implementation = "sdpa"
    return transformers.AutoModelForCausalLM.from_config(config).eval()


FUSED: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "phi3": (
        lambda: _model("phi3", num_key_value_heads=2), ("q", "k", "v", "gate", "up"),
    ),
    "gpt2": (lambda: _model("gpt2", n_embd=32, n_layer=1, n_head=4), ("q", "k", "v")),
    "gpt_neox": (lambda: _model("gpt_neox"), ("q", "k", "v")),
    "falcon": (lambda: _model("falcon"), ("q", "k", "v")),
    "gpt_bigcode": (lambda: _model("gpt_bigcode", n_embd=32, n_layer=1, n_head=4), ("q", "k", "v")),
    "persimmon": (lambda: _model("persimmon"), ("q", "k", "v")),
}  # fmt: skip


@contextmanager
def attention_inputs() -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """Collects what reaches torch's attention while a model runs."""
    seen: list[tuple[torch.Tensor, ...]] = []
    real = F.scaled_dot_product_attention

    def spy(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((q, k, v))
        return real(q, k, v, *args, **kwargs)

    F.scaled_dot_product_attention = spy  # type: ignore[assignment]
    try:
        yield seen
    finally:
        F.scaled_dot_product_attention = real


def rows(part: Slice) -> tuple[int, ...]:
    return tuple(i for r in part.rows for i in r)


def reached(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Rows]:
    """Returns, layer by layer, the rows whose weights change the query, the key and the value."""
    with attention_inputs() as seen:
        model(**kwargs)
    found: dict[str, Rows] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, Conv1D)):
            continue
        for part, value in zip("qkv", seen[0], strict=True):
            (grad,) = torch.autograd.grad(
                (value * torch.randn_like(value)).sum(), layer.weight, retain_graph=True,
                allow_unused=True,
            )  # fmt: skip
            if grad is not None:
                grad = grad.t() if isinstance(layer, Conv1D) else grad
                hit = grad.abs().sum(1).nonzero().flatten().tolist()
                found.setdefault(name, {})[part] = tuple(hit)
    return found


@pytest.mark.parametrize("name", FUSED)
def test_the_rows_of_a_part_are_those_autograd_finds_at_that_input_of_the_attention(
    name: str,
) -> None:
    model = FUSED[name][0]()
    args, kwargs = for_model(model, (), None)
    found = slices(fxlora.trace(model, args, kwargs))
    assert {s.part for s in found} == set(FUSED[name][1])
    attending = [s for s in found if s.part in "qkv"]
    true = reached(model, kwargs)
    assert len(attending) == 3
    for part in attending:
        assert rows(part) == true[part.site][part.part]


def test_gate_is_the_activated_half() -> None:
    found = slices(fxlora.trace(FUSED["phi3"][0](), **_call("phi3")))
    where = {s.part: s.where for s in found if s.site.endswith("gate_up_proj")}
    assert where == {"gate": "0:48", "up": "48:96"}


def _call(name: str) -> dict[str, Any]:
    args, kwargs = for_model(FUSED[name][0](), (), None)
    return {"args": args, "kwargs": kwargs}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "stablelm", "glm"])
def test_a_rotated_or_normed_projection_is_not_fused(kind: str) -> None:
    model = _model(kind, num_key_value_heads=4, head_dim=8)
    found = slices(fxlora.trace(model, *for_model(model, (), None)))
    assert {s.part for s in found} <= {"gate", "up"}
    assert not [s for s in found if "self_attn" in s.site]


class Net(nn.Module):
    """A fused layer and a way to use it."""

    def __init__(self, use: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fused = nn.Linear(4, 12)
        self.use = use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(self.fused(x))


def _parts(use: Callable[[torch.Tensor], torch.Tensor]) -> list[tuple[str, str]]:
    traced = fxlora.trace(Net(use), (torch.randn(2, 3, 4),))
    return [(s.part, s.where) for s in slices(traced)]


def test_parts_without_a_known_role_are_numbered() -> None:
    assert _parts(lambda y: y[..., :4].tanh() + y[..., 4:8].cos() * y[..., 8:].sin()) == [
        ("0", "0:4"), ("1", "4:8"), ("2", "8:12"),
    ]  # fmt: skip


def test_a_layer_whose_whole_output_is_read_is_not_fused() -> None:
    assert _parts(lambda y: y[..., :6] + y[..., 6:]) == [("0", "0:6"), ("1", "6:12")]
    assert _parts(lambda y: y[..., :6] + y.sum(-1, keepdim=True)) == []


def test_overlapping_slices_are_no_parts() -> None:
    assert _parts(lambda y: y[..., :7].tanh() + y[..., 5:].cos()) == []


def test_up_before_gate_is_told_by_the_activation() -> None:
    def use(y: torch.Tensor) -> torch.Tensor:
        up, gate = y.chunk(2, -1)
        return up * F.silu(gate)

    assert _parts(use) == [("up", "0:6"), ("gate", "6:12")]


def test_interleaved_parts_have_a_range_for_every_head() -> None:
    def use(y: torch.Tensor) -> torch.Tensor:
        a, b = y.view(*y.shape[:2], 2, 2, 3).unbind(3)
        return a.tanh() + b.cos()

    traced = fxlora.trace(Net(use), (torch.randn(2, 3, 4),))
    assert [s.rows for s in slices(traced)] == [
        (range(0, 3), range(6, 9)), (range(3, 6), range(9, 12)),
    ]  # fmt: skip


def test_the_three_parts_of_torch_attention() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.mha(x, x, x)[0]
            return out

    found = slices(fxlora.trace(Attends(), (torch.randn(2, 3, 8),)))
    assert [(s.name, s.where) for s in found] == [
        ("mha.q", "0:8"), ("mha.k", "8:16"), ("mha.v", "16:24"),
    ]  # fmt: skip
