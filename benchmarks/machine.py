"""What a number was measured on: the processor, its cores, a GPU, and the versions of everything."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "torch",
    "peft",
    "transformers",
    "torchview",
    "torchlens",
    "torchinfo",
    "torchviz",
)


def machine() -> dict[str, str]:
    """Returns the machine, in words."""
    import torch

    found = {
        "processor": _processor(),
        "cores": f"{os.cpu_count()} shared",
        "memory": _memory(),
        "instructions": _instructions(),
        "threads": str(torch.get_num_threads()),
        "freed memory": "asked to be kept"
        if "MALLOC_TRIM_THRESHOLD_" in os.environ
        else "given back",
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Returns the version of Python, fxlora and every peer that is installed."""
    import fxlora

    found = {"Python": platform.python_version(), "fxlora": fxlora.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(key):
            return line.partition(":")[2].strip()
    return ""


def _processor() -> str:
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    family, model = _cpuinfo("cpu family"), _cpuinfo("model\t")
    return f"{name} (family {family}, model {model})" if family else name


def has_bf16() -> bool:
    """Whether the processor multiplies in bf16."""
    return bool({"avx512_bf16", "amx_bf16"} & set(_cpuinfo("flags").split()))


def _instructions() -> str:
    flags = set(_cpuinfo("flags").split())
    known = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return ", ".join(known) + ("" if has_bf16() else "; none for bf16")


def _memory() -> str:
    try:
        count = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return "unknown"
    return f"{count / 2**30:.0f} GiB"
