"""The same rows on a GPU, when one is there: time, the peak of its memory, launches per site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from benchmarks import models, running
from benchmarks.models import PEFT
from benchmarks.record import Case, sized


def run(quick: bool, say: Callable[[str], None]) -> list[Case]:
    """Measures every model of the CPU's table on the GPU; nothing without one."""
    if not torch.cuda.is_available():
        return []
    cases = []
    for work in running.works(quick):
        for regime, passes, steps in _at(work, quick):
            for tokens in passes:
                say(f"gpu: {work.name}, {regime}, {tokens} tokens")
                cases.append(running.measure(work, regime, tokens, train=False, device="cuda"))
            for tokens in steps:
                cases.append(running.measure(work, regime, tokens, train=True, device="cuda"))
                cases += _counts(work, regime, tokens)
    return cases


def _at(work: running.Work, quick: bool) -> Any:
    """Returns regimes and sizes: a GPU has no trouble with the ones a CPU leaves out."""
    if quick:
        return work.at
    sizes = (1, 16, 128, 1024)
    return tuple((regime, sizes, sizes) for regime in models.REGIMES)


def _counts(work: running.Work, regime: str, tokens: int) -> list[Case]:
    """Measures the peak of memory and the launches of one step on every side."""
    torch.manual_seed(models.SEED)
    dtype = models.base_dtype(regime)
    inputs = {k: v.to("cuda") for k, v in work.inputs(tokens, dtype).items()}
    made = models.sides(
        work.make(dtype), LoraConfig(**work.config), inputs, regime, train=True, device="cuda"
    )
    named = made.named()
    sites = sum("lora_A" in n for n, _ in made.plain.named_parameters())
    base = float(launches(made.base, made, regime, dx=True))
    peaks, counts = {}, {}
    for name, module in named.items():
        peaks[name] = float(peak(module, made, regime))
        counts[name] = (launches(module, made, regime, dx=False) - base) / sites
    where = f"{work.name}, {regime}, {tokens} tokens, step"
    pairs = [(ours, PEFT) for ours in named if ours not in (PEFT, models.INNER)]
    return [
        sized("gpu", f"{where}, peak", peaks, pairs),
        replace(sized("gpu", f"{where}, launches per site", counts, pairs), unit="launches"),
    ]


def peak(module: nn.Module, made: models.Sides, regime: str) -> int:
    """Returns the peak of the GPU's memory in one step, above what stood before it."""
    running.backward(module, made.inputs, regime, "cuda", dx=False)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    running.backward(module, made.inputs, regime, "cuda", dx=False)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(module: nn.Module, made: models.Sides, regime: str, *, dx: bool) -> int:
    """Returns how many kernels one forward and backward pass launches."""
    from torch.profiler import ProfilerActivity, profile

    running.backward(module, made.inputs, regime, "cuda", dx=dx)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        running.backward(module, made.inputs, regime, "cuda", dx=dx)
        torch.cuda.synchronize()
    return sum(1 for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA)
