"""What LoRA does to a network, step by step: one Linear, then a Sequential.

Run it with `python examples/what_lora_does.py [OUTPUT_FOLDER]`; it prints each step and leaves
`linear.svg` and `sequential.svg`.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from pathlib import Path

import fxlora_viz
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

import fxlora


def heading(text: str) -> None:
    """Prints a section title."""
    print(f"\n{text}\n{'=' * len(text)}")


def flags(model: nn.Module) -> None:
    """Prints name, shape and requires_grad of every parameter."""
    for name, p in model.named_parameters():
        print(f"  {name:<36} {tuple(p.shape)!s:<12} requires_grad={p.requires_grad}")


def one_linear(folder: Path) -> None:
    """Wraps a single nn.Linear(100, 200)."""
    heading("A single Linear")
    bare = nn.Linear(100, 200)
    config = LoraConfig(r=4, target_modules=["linear"])
    print("peft looks for names, and a bare nn.Linear has none:")
    try:
        get_peft_model(copy.deepcopy(bare), copy.deepcopy(config))
    except NoMatchingPeftModuleError as e:
        print(f"  peft:   {type(e).__name__}: {e}")
    try:
        fxlora.plan(fxlora.trace(bare), config)
    except fxlora.NoMatchError as e:
        print(f"  fxlora: {type(e).__name__}: {e}")

    print("\nSo wrap it and name it. Before:")
    model = nn.Sequential(OrderedDict(linear=bare))
    flags(model)
    traced = fxlora.trace(model)
    lora = fxlora.rewrite(traced, config)
    print("\nAfter: W and b are frozen, A (r x in) and B (out x r) train:")
    flags(lora)
    print("\nThe one call became base + scaling * B(A(dropout(x))):")
    print(lora.code.strip())
    fxlora_viz.draw(traced, lora).save(folder / "linear.svg")


def sequential(folder: Path) -> None:
    """Wraps nn.Sequential(Linear(10, 20), ReLU, Linear(20, 5))."""
    heading("A Sequential")
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    config = LoraConfig(r=4, target_modules=["0", "2"])
    print("Before, everything trains:")
    flags(model)
    traced = fxlora.trace(model)
    plan = fxlora.plan(traced, config)
    print(f"\nThe plan; nothing is changed yet:\n{plan}")
    lora = fxlora.rewrite(traced, plan)
    print("\nAfter:")
    flags(lora)
    x = torch.randn(3, 10)
    print(f"\nB starts at zero, so nothing moves at first: {torch.equal(lora(x), model(x))}")
    fxlora_viz.draw(traced, lora).save(folder / "sequential.svg")

    heading("Is that what peft does?")
    result = fxlora.compare(model, config, (x,))
    print(result)
    print(
        "\n220 of 545 parameters train, 40.3670 %. (A figure of 340 of 345, 98.55 %, goes round; "
        "it is wrong.)"
    )
    assert result.equal
    assert (result.trainable, result.total) == (220, 545)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
    target.mkdir(parents=True, exist_ok=True)
    one_linear(target)
    sequential(target)
    print(f"\nPictures: {target / 'linear.svg'}, {target / 'sequential.svg'}")
