"""Every class of the sweep, backwards: what autograd gives a gradient, and what the graph says.

On the meta device: autograd decides there as anywhere which parameters get a gradient, and needs no
numbers for it. Prints one row per class, as JSON lines.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from sweep import build, classes, lora
from torch.fx import GraphModule
from zoo import tensors

import fxlora
from fxlora.effects import reached_parameters
from fxlora.errors import FxloraError
from fxlora.trace import examples


@dataclass
class Row:
    """What became of one class: agree, differs, run (a backward fails on meta), trace, build."""

    name: str
    status: str
    detail: str = ""
    reached: int = 0
    adapters: int = 0
    seconds: float = 0.0


def check(name: str, config_class: type, model_class: type) -> Row:
    """Rewrites one class and runs it and its backward pass."""
    start = time.process_time()
    try:
        model = build(config_class, model_class)
    except Exception as e:
        return Row(name, "build", f"{type(e).__name__}: {str(e)[:200]}")
    try:
        row = compare(name, model)
    except FxloraError as e:
        return Row(name, "trace", str(e)[:200])
    row.seconds = round(time.process_time() - start, 2)
    return row


def compare(name: str, model: torch.nn.Module) -> Row:
    """Holds the parameters a graph says are reached to those a backward pass reaches."""
    graph, inputs = rewritten(model)
    try:
        try:
            backward(graph, inputs)
        except RuntimeError as e:
            if "BF16" not in str(e):
                raise
            # torch's grouped product of experts knows one dtype on meta.
            graph, inputs = rewritten(model.to(torch.bfloat16))
            backward(graph, inputs)
    except Exception as e:
        return Row(name, "run", f"{type(e).__name__}: {str(e)[:200]}")
    found = {n for n, p in graph.named_parameters() if p.grad is not None}
    said = reached_parameters(graph)
    row = Row(name, "agree", reached=len(found))
    row.adapters = sum(".lora_B." in n for n, _ in graph.named_parameters())
    if found != said:
        row.status = "differs"
        row.detail = (
            f"only said: {sorted(said - found)[:3]}; only found: {sorted(found - said)[:3]}"
        )
    return row


def rewritten(model: torch.nn.Module) -> tuple[GraphModule, dict[str, Any]]:
    """Returns a model's graph with the sweep's adapters, and inputs for it."""
    inputs = examples.inputs(model)
    return fxlora.rewrite(fxlora.trace(model, (), inputs), lora(model)), inputs


def backward(graph: GraphModule, inputs: dict[str, Any]) -> None:
    """Runs a graph, and a backward pass from everything it gives that requires grad."""
    for p in graph.parameters():
        p.grad = None
    # A graph that fails inside a no_grad region of its own leaves gradients off for the next one.
    with torch.enable_grad():
        out = graph(**inputs)
        made = tensors(out.to_tuple() if hasattr(out, "to_tuple") else out)
        roots = [t.float().square().sum() for t in made if t.requires_grad]
        if roots:
            torch.stack(roots).sum().backward()


def main(only: set[str]) -> None:
    """Prints the rows of these classes, or of all."""
    warnings.simplefilter("ignore")
    for _, name, config_class, model_class in classes():
        if not only or name in only:
            print(json.dumps(asdict(check(name, config_class, model_class))), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(set(sys.argv[1:]))
