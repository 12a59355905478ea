"""torch.compile takes a rewritten and an optimized graph whole, with the same bits before fusion."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from matrix import ROWS
from torch.fx import GraphModule
from zoo import tensors

import fxlora

WAYS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "exact": {},
    "memory": {"mode": "memory"},
    "inference": {"mode": "inference"},
    "checkpoint": {"checkpoint": True},
}
IDS = ("model-llama-all-linear", "parameter-experts-both")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(
    id: str, dtype: torch.dtype, way: str
) -> tuple[GraphModule, tuple[Any, ...], dict[str, Any]]:
    row = next(r for r in ROWS if r.id == id)
    args, kwargs = row.inputs()
    args = tuple(a.to(dtype) if a.is_floating_point() else a for a in args)
    lora = fxlora.rewrite(fxlora.trace(row.build().to(dtype), args, kwargs), row.config())
    torch.manual_seed(2)
    for p in lora.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.1)
    settings = WAYS[way]
    return (lora if settings is None else fxlora.optimize(lora, **settings)), args, kwargs


def run(model: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [t.detach() for t in tensors(model(*args, **kwargs))]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("id", IDS)
def test_the_whole_graph_is_compiled_without_a_break(id: str, way: str) -> None:
    graph, args, kwargs = made(id, torch.float32, way)
    compiled = torch.compile(graph.train(), fullgraph=True, backend="eager")
    mine, eager = run(compiled, args, kwargs), run(graph, args, kwargs)
    assert all(map(torch.equal, mine, eager))


def test_a_mixture_with_target_parameters_has_one_graph_and_no_break() -> None:
    # In bf16: torch's own grouped_mm cannot be traced by dynamo in float32 on a CPU.
    graph, args, kwargs = made("model-qwen3-moe-parameters", torch.bfloat16, "exact")
    found = torch._dynamo.explain(graph.train())(*args, **kwargs)
    assert (found.graph_break_count, found.graph_count) == (0, 1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_numbers_of_the_eager_graph() -> None:
    logging.getLogger("torch").setLevel(logging.ERROR)
    graph, args, kwargs = made("model-llama-all-linear", torch.float32, "exact")
    compiled = torch.compile(graph.eval(), fullgraph=True)
    for mine, eager in zip(run(compiled, args, kwargs), run(graph, args, kwargs), strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-5)
