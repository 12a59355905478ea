"""torch.compile on both sides: a cold compile in a process each, then both in one, interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from benchmarks import child, models
from benchmarks.models import INNER, OPTIMIZED, PEFT, PLAIN
from benchmarks.record import Case, timed
from benchmarks.running import backward
from benchmarks.timing import Contender, Samples, interleave

TIMEOUT = 240.0
_TOKENS = 32
_PAIRS = [(ours, peer) for ours in (PLAIN, OPTIMIZED) for peer in (PEFT, INNER)]


def run(quick: bool, say: Callable[[str], None]) -> list[Case]:
    """Measures the cold compile and the compiled step; only in the full run, for its minutes."""
    if quick:
        return []
    cold: dict[str, Samples] = {}
    notes: dict[str, str] = {}
    for name in _names():
        say(f"compile: cold, {name}")
        got = child.call("benchmarks.compiled:cold", {"name": name}, timeout=TIMEOUT)
        if "failed" in got:
            cold[name] = Samples(failed=got["failed"])
        else:
            cold[name] = Samples([got["cpu"]], [got["wall"]])
            notes[f"graph breaks, {name}"] = str(got["breaks"])
    say("compile: both compiled, interleaved")
    got = child.call("benchmarks.compiled:warm", {}, timeout=2 * TIMEOUT)
    warm = {k: Samples(v["cpu"], v["wall"]) for k, v in got.items() if k != "failed"}
    what = "Llama 4 x 512, fp32, 32 tokens"
    return [
        timed("compile", f"cold compile of a step, {what}", cold, _PAIRS, notes=notes),
        timed("compile", f"compiled step, {what}", warm, _PAIRS, notes=_why(got)),
    ]


def _why(got: dict[str, Any]) -> dict[str, str]:
    return {"not measured": got["failed"]} if "failed" in got else {}


def _names() -> list[str]:
    import fxlora

    return [PEFT, INNER, PLAIN, *([OPTIMIZED] if hasattr(fxlora, "optimize") else [])]


def _sides() -> models.Sides:
    model = models.small_llama(torch.float32, layers=4, hidden=512, inner=1376, vocab=1000)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    inputs = {"input_ids": torch.randint(0, 1000, (1, _TOKENS))}
    return models.sides(model, config, inputs, "fp32", train=True)


def _step(module: nn.Module, inputs: dict[str, Any]) -> Contender:
    compiled = torch.compile(module)

    def once(_: Any) -> None:
        backward(compiled, inputs, "fp32", "cpu", dx=False)
        for p in module.parameters():
            p.grad = None

    return Contender(once)


def cold(name: str) -> dict[str, Any]:
    """Compiles one side in this process, whose cache is empty; returns the first step's seconds."""
    torch.set_num_threads(1)
    made = _sides()
    module = made.named()[name]
    breaks = torch._dynamo.explain(module)(**made.inputs).graph_break_count
    torch._dynamo.reset()
    step = _step(module, made.inputs)
    wall, cpu = time.perf_counter(), _cpu()
    step.run(None)
    return {"cpu": _cpu() - cpu, "wall": time.perf_counter() - wall, "breaks": breaks}


def _cpu() -> float:
    """Returns the CPU seconds of this process and of the compilers it ran."""
    import os

    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def warm() -> dict[str, Any]:
    """Compiles every side, then times their steps in turn."""
    torch.set_num_threads(1)
    made = _sides()
    contenders = {k: _step(v, made.inputs) for k, v in made.named().items()}
    found = interleave(contenders, seconds=10, rounds=(3, 15))
    failed = {k: v.failed for k, v in found.items() if v.failed}
    if failed:
        return {"failed": "; ".join(f"{k}: {v}" for k, v in failed.items())}
    return {k: {"cpu": v.cpu, "wall": v.wall} for k, v in found.items()}
