"""Drawing: one SVG of a model with LoRA, by fxlora_viz and by the drawers people use today."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks import child, models
from benchmarks.record import Case

OURS = "fxlora_viz"
MODELS = ("the seed", "Llama-8B", "GPT-2")


def run(quick: bool, say: Callable[[str], None]) -> Iterator[Case]:
    """Draws every model with every drawer, each in a process of its own under a hard timeout."""
    timeout = 20.0 if quick else 45.0
    for name in MODELS[:1] if quick else MODELS:
        values: dict[str, dict[str, Any]] = {}
        for drawer in DRAWERS:
            say(f"drawing: {name}, {drawer}")
            values[drawer] = child.call(
                "benchmarks.drawing:draw_one", {"drawer": drawer, "name": name}, timeout=timeout
            )
        yield Case("drawing", name, "s", values, (), tuple(_ratios(values)))


def _ratios(values: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    ours = values[OURS]
    if "failed" in ours:
        return []
    return [
        {
            "ours": OURS,
            "peer": name,
            "median": v["median"] / ours["median"],
            "wall": v["wall"] / ours["wall"],
        }
        for name, v in values.items()
        if name != OURS and "failed" not in v
    ]


def draw_one(drawer: str, name: str) -> dict[str, Any]:
    """Draws one model with one drawer, in this process; says what the picture is like.

    The model is peft's, wrapped, for the others; for us it is the model itself, and tracing and
    rewriting it are in the time.
    """
    DRAWERS[drawer](*_model("the seed"), Path("warm"))  # first calls are not the picture's
    model, given = _model(name)
    path = Path("picture")
    children = _children()
    wall, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        DRAWERS[drawer](model, given, path)
    spent = time.process_time() - cpu + _children() - children
    return {
        "median": spent,
        "wall": time.perf_counter() - wall,
        **_facts(path.with_suffix(".svg").read_text(encoding="utf-8", errors="replace")),
    }


def _children() -> float:
    """Returns the CPU seconds of the processes that have ended: `dot` is one."""
    import os

    times = os.times()
    return times.children_user + times.children_system


def _facts(svg: str) -> dict[str, Any]:
    """Reads an SVG: its drawn nodes, its canvas in points, its bytes."""
    size = re.search(r'viewBox="[-\d.]+ [-\d.]+ ([\d.]+) ([\d.]+)"', svg)
    return {
        "nodes": len(re.findall(r'class="(?:node|fx)[ "]', svg)),
        "width": float(size.group(1)) if size else 0.0,
        "height": float(size.group(2)) if size else 0.0,
        "bytes": len(svg.encode()),
    }


def _model(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(models.SEED)
    if name == "the seed":
        return models.seed(torch.float32), (torch.randn(2, 10),)
    if name == "GPT-2":
        return models.gpt2(torch.float32).eval(), (torch.randint(0, 1000, (1, 16)),)
    return models.llama(name), (torch.zeros(1, 16, dtype=torch.long, device="meta"),)


def _config(model: nn.Module) -> LoraConfig:
    if isinstance(model, nn.Sequential):
        return LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"])
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


class _Answer(nn.Module):
    """A wrapped model whose answer is one tensor, which is what the drawers take."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the model."""
        if x.is_floating_point():
            return self.model(x)
        return self.model(input_ids=x).logits


def _wrapped(model: nn.Module) -> nn.Module:
    return get_peft_model(model, _config(model))


Given = tuple[torch.Tensor, ...]


def _fxlora(model: nn.Module, given: Given, path: Path) -> None:
    import fxlora_viz

    import fxlora

    traced = fxlora.trace(model, given if isinstance(model, nn.Sequential) else ())
    lora = fxlora.rewrite(traced, _config(model))
    fxlora_viz.draw(traced, lora).save(str(path.with_suffix(".svg")))


def _torchview(model: nn.Module, given: Given, path: Path, depth: int = 3) -> None:
    import torchview

    # The meta device is torchview's own default: it reads shapes, not values.
    made = torchview.draw_graph(
        _Answer(_wrapped(model)),
        input_data=given,
        depth=depth,
        device=given[0].device,
    )
    made.visual_graph.render(filename=str(path), format="svg")
    _moved(path)


def _moved(path: Path) -> None:
    """Finds what a drawer wrote under graphviz's own naming, name.gv.svg or name.svg.svg."""
    for found in Path().glob(f"{path.name}*.svg"):
        found.rename(path.with_suffix(".svg"))


def _torchview_deep(model: nn.Module, given: Given, path: Path) -> None:
    _torchview(model, given, path, depth=100)


def _torchlens(model: nn.Module, given: Given, path: Path, folded: bool = False) -> None:
    import torchlens

    kept = torchlens.trace(_Answer(_wrapped(model)), given[0])
    more = {"fold_repeats": True} if folded else {}
    kept.draw(vis_outpath=str(path), vis_fileformat="svg", vis_save_only=True, **more)
    _moved(path)


def _torchlens_folded(model: nn.Module, given: Given, path: Path) -> None:
    _torchlens(model, given, path, folded=True)


def _fx_drawer(model: nn.Module, given: Given, path: Path) -> None:
    from torch.fx.passes.graph_drawer import FxGraphDrawer

    # symbolic_trace follows neither peft's wrapper nor transformers; export gives it an fx graph.
    wrapped = _wrapped(model)
    small = isinstance(model, nn.Sequential)
    inputs = {} if small else {"input_ids": given[0], "use_cache": False}
    graph = torch.export.export(wrapped, given if small else (), inputs, strict=False).graph_module
    FxGraphDrawer(graph, "model").get_dot_graph().write(str(path.with_suffix(".dot")))
    _dot(path)


def _torchviz(model: nn.Module, given: Given, path: Path) -> None:
    import torchviz

    wrapped = _Answer(_wrapped(model))
    out = wrapped(*given)
    made = torchviz.make_dot(out, params=dict(wrapped.named_parameters()))
    path.with_suffix(".dot").write_text(made.source, encoding="utf-8")
    _dot(path)


def _dot(path: Path) -> None:
    command = ["dot", "-Tsvg", str(path.with_suffix(".dot")), "-o", str(path.with_suffix(".svg"))]
    subprocess.run(command, check=True, capture_output=True)


DRAWERS: dict[str, Callable[[nn.Module, Given, Path], None]] = {
    OURS: _fxlora,
    "torchview": _torchview,
    "torchview, depth 100": _torchview_deep,
    "torchlens": _torchlens,
    "torchlens, folded": _torchlens_folded,
    "FxGraphDrawer": _fx_drawer,
    "torchviz": _torchviz,
}
