"""Start-up: whole processes, from nothing to an answer, against the imports they cannot avoid."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.child import ROOT
from benchmarks.record import Case, timed
from benchmarks.timing import Samples

CONFIG = ROOT / "examples" / "llama-8b.json"
TORCH, IMPORT = "import torch", "import fxlora"
FLOOR = "import torch, transformers, peft"
MODEL = "import torch, peft, LlamaForCausalLM"
PLAN = "fxlora plan"
COMMANDS = {
    TORCH: ["-c", "import torch"],
    IMPORT: ["-c", "import fxlora"],
    FLOOR: ["-c", "import torch, transformers, peft"],
    # transformers loads a model's code when it is first named; a plan of a Llama has to name it.
    MODEL: ["-c", "import torch, peft; from transformers import LlamaForCausalLM"],
    PLAN: ["-m", "fxlora", "plan", str(CONFIG), "-t", "all-linear", "-r", "16"],
}


def run(quick: bool, say: Callable[[str], None]) -> list[Case]:
    """Measures every command in turn, forwards and backwards."""
    found = {name: Samples() for name in COMMANDS}
    for name in COMMANDS:  # once before the clock: byte code is written, files are read
        _process(COMMANDS[name])
    for number in range(1 if quick else 4):
        say(f"startup: round {number + 1}")
        twice: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
        for name in [*COMMANDS, *reversed(COMMANDS)]:
            twice[name].append(_process(COMMANDS[name]))
        for name, pairs in twice.items():
            found[name].cpu.append(statistics.mean(cpu for cpu, _ in pairs))
            found[name].wall.append(statistics.mean(wall for _, wall in pairs))
    over = statistics.median(a - b for a, b in zip(found[PLAN].cpu, found[MODEL].cpu, strict=True))
    notes = {"fxlora plan above its imports": f"{over:.2f} s"}
    pairs = [(IMPORT, TORCH), (PLAN, FLOOR), (PLAN, MODEL)]
    return [
        timed(
            "startup",
            "whole process, Llama-8B from its config",
            found,
            pairs,
            floors=(TORCH, FLOOR, MODEL),
            notes=notes,
        )
    ]


def _process(arguments: list[str]) -> tuple[float, float]:
    """Runs a command to its end; returns its CPU and wall seconds."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "viz")])}
    before, wall = os.times(), time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, env=env, cwd=Path(ROOT)
    )
    after = os.times()
    cpu = (
        after.children_user - before.children_user + after.children_system - before.children_system
    )
    return cpu, time.perf_counter() - wall
