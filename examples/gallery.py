"""Draws every picture of docs/gallery.md, and the page itself: `python examples/gallery.py [NAME ...]`.

Models are built on the meta device from default configs: no weights, no GPU, a few minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fxlora_viz
import torch
from peft import LoraConfig
from torch import nn
from torch.fx import GraphModule

import fxlora
from fxlora import models

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
LLAMA = str(HERE / "llama-8b.json")


@dataclass(frozen=True)
class Entry:
    """One picture.

    Attributes:
        name: of the file.
        title: of its section.
        text: what to look at.
        build: makes the model.
        config: fields of the LoraConfig.
        inputs: makes the example inputs; () where fxlora makes its own.
        options: of the drawing.
    """

    name: str
    title: str
    text: str
    build: Callable[[], nn.Module]
    config: dict[str, Any]
    inputs: Callable[[], tuple[torch.Tensor, ...]] = tuple
    options: dict[str, Any] = field(default_factory=dict)

    def graphs(self) -> tuple[GraphModule, GraphModule]:
        """Returns the model traced, and rewritten."""
        torch.manual_seed(0)
        traced = fxlora.trace(self.build().eval(), self.inputs())
        return traced, fxlora.rewrite(traced, LoraConfig(**self.config))

    def drawing(self) -> fxlora_viz.Drawing:
        """Returns the picture."""
        return fxlora_viz.draw(*self.graphs(), **self.options)


class Block(nn.Module):
    """Two convolutions."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, padding=1)
        self.norm = nn.GroupNorm(8, out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the block."""
        return torch.relu(self.conv2(torch.relu(self.norm(self.conv1(x)))))


class UNet(nn.Module):
    """Down, up, and what was seen on the way down beside what comes up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([Block(3, 32), Block(32, 64)])
        self.mid = Block(64, 128)
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(128, 64, 2, 2), nn.ConvTranspose2d(64, 32, 2, 2)]
        )
        self.join = nn.ModuleList([Block(128, 64), Block(64, 32)])
        self.head = nn.Conv2d(32, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Runs the net."""
        seen, x = [], image
        for block in self.down:
            x = block(x)
            seen.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.mid(x)
        for up, block in zip(self.up, self.join, strict=True):
            x = block(torch.cat([up(x), seen.pop()], 1))
        out: torch.Tensor = self.head(x)
        return out


class Walls(nn.Module):
    """One adapter of every verdict."""

    def __init__(self) -> None:
        super().__init__()
        self.read_past, self.partial, self.unused, self.cut, self.dead, self.live = (
            nn.Linear(8, 8) for _ in range(6)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Runs the net."""
        y = nn.functional.linear(x, self.read_past.weight, self.read_past.bias)
        z = self.partial(y) + nn.functional.linear(y, self.partial.weight)
        stopped = self.cut(z).detach()
        self.dead(z)
        out: torch.Tensor = self.live(torch.relu(z) + stopped)
        return out


def on_meta(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Returns a maker whose parameters take no memory."""

    def build() -> nn.Module:
        with torch.device("meta"):
            return make()

    return build


def known(model: str) -> Callable[[], nn.Module]:
    """Returns a maker of a transformers model type, or of a config file."""
    return lambda: models.build(model)


def _gemma3() -> nn.Module:
    import transformers

    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig())


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def _seed() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))


def lora(*targets: str, **more: Any) -> dict[str, Any]:
    """Returns the fields of a LoraConfig."""
    return {"r": 8, "lora_alpha": 16, "target_modules": list(targets), **more}


ALL = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
GALLERY = [
    Entry("sequential", "The smallest", "Two Linear layers of an nn.Sequential.", _seed,
          lora("0", "2", r=4, lora_alpha=4)),
    Entry("llama-8b", "Llama 8B", "32 equal layers are drawn once, with all seven projections adapted.",
          known(LLAMA), lora(r=16, lora_alpha=32) | ALL),
    Entry("walls", "Adapters that learn nothing",
          "One layer for each verdict of [effects](effects.md): its weight is read past it, it is "
          "never called, its gradient is cut, it reaches no output. Dotted adapters learn nothing.",
          Walls, lora("read_past", "partial", "unused", "cut", "dead", "live", r=4),
          lambda: (torch.zeros(2, 8),)),
    Entry("encoder", "nn.TransformerEncoder",
          "nn.MultiheadAttention reads the weight of its out_proj past the module: the adapter there "
          "is bypassed.", on_meta(_encoder), lora("out_proj", "linear1", r=4),
          lambda: (torch.zeros(2, 10, 64, device="meta"),)),
    Entry("mamba", "Mamba", "dt_proj is bypassed in every layer.", known("mamba"), lora() | ALL),
    Entry("albert", "ALBERT", "One layer, called twelve times: its adapters are shared by the calls.",
          known("albert"), lora("query", "value")),
    Entry("gpt2", "GPT-2", "Conv1D layers.", known("gpt2"), lora("c_attn", "c_proj")),
    Entry("bert", "BERT", "An encoder with masks, which are named where they are read.",
          known("bert"), lora("query", "value")),
    Entry("vit", "ViT", "A head trained as a whole beside the adapters.", known("vit"),
          lora("q_proj", "v_proj")),
    Entry("swin", "Swin", "Stages of growing width: those that are as the first but for sizes are on a "
          "card.", known("swin"), lora("q_proj", "v_proj")),
    Entry("t5", "T5", "Encoder and decoder.", known("t5"), lora("q", "v")),
    Entry("whisper", "Whisper", "Convolutions, encoder, decoder.", known("whisper"),
          lora("q_proj", "v_proj")),
    Entry("qwen3-moe", "Qwen3-MoE", "Experts are one node.", known("qwen3_moe"),
          lora("q_proj", "v_proj")),
    Entry("deepseek-v3", "DeepSeek-V3", "Three dense layers and 58 with experts; adapted are the "
          "low-rank projections of its attention.", known("deepseek_v3"),
          lora("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
    Entry("gemma3", "Gemma 3", "Five layers with a sliding window, one without, and so on: each kind "
          "is drawn once, and a card stands for the rest.", on_meta(_gemma3), lora("q_proj", "v_proj")),
    Entry("mamba2", "Mamba 2", "64 layers without attention.", known("mamba2"),
          lora("in_proj", "out_proj")),
    Entry("unet", "A UNet", "Adapted convolutions; what goes across is dashed or goes around.",
          on_meta(UNet), lora("conv1", "conv2", r=4),
          lambda: (torch.zeros(1, 3, 64, 64, device="meta"),)),
    Entry("focus", "One module close up", "`focus=\"model.layers.0.self_attn\"` with DoRA, to the right.",
          known(LLAMA), lora("q_proj", "v_proj", r=16, lora_alpha=32, use_dora=True),
          options={"focus": "model.layers.0.self_attn", "direction": "LR"}),
    Entry("depth", "From far", "`depth=2` draws modules closed; `theme=\"dark\"`.", known(LLAMA),
          lora(r=16, lora_alpha=32) | ALL, options={"depth": 2, "theme": "dark"}),
]  # fmt: skip


def page() -> str:
    """Returns docs/gallery.md."""
    parts = [
        "# Gallery\n\nEvery picture here is made by `python examples/gallery.py`, from default "
        "configs and without weights.\nHow to read them: [Pictures](drawing.md).\n"
    ]
    for entry in GALLERY:
        told = (
            f"{entry.text}\n\n![{entry.title} before and after LoRA](pictures/{entry.name}.svg)\n"
        )
        parts.append(f"## {entry.title}\n\n{told}")
    return "\n".join(parts)


def main(names: list[str]) -> None:
    """Draws the named pictures, or all, and writes the page."""
    (DOCS / "gallery.md").write_text(page(), encoding="utf-8")
    for entry in GALLERY:
        if not names or entry.name in names:
            drawing = entry.drawing()
            path = drawing.save(DOCS / "pictures" / f"{entry.name}.svg")
            layout, size = drawing.layout, path.stat().st_size
            nodes = drawing.graph.number_of_nodes()
            print(
                f"{entry.name:12} {nodes:4} nodes {size:7} bytes {layout.width:5.0f} x {layout.height:5.0f}"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
