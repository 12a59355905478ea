"""A function in a process of its own: with a hard timeout, a peak of memory, and a cold cache.

The parent says `call("benchmarks.drawing:draw_one", {...}, timeout=60)`; the child prints JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_MARK = "benchmarks.child answers "


def call(
    where: str,
    given: dict[str, Any],
    *,
    timeout: float,
    path: Path = ROOT,
    patience: float = 4.0,
) -> dict[str, Any]:
    """Runs `where` ("module:function") in a new process on `given`, which are its keywords.

    Args:
        where: the function.
        given: its keywords, as JSON can hold them.
        timeout: seconds of CPU after which the process is ended, or a program it started.
        path: where the module is looked up first.
        patience: after so many times as many seconds by the clock everything is ended. A busy
            machine gives a process a part of a core, which is not its fault.

    Returns:
        What the function returned, a dictionary; or `{"failed": why}` when it raised, crashed or
        was stopped at the timeout.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.child", where, json.dumps(given)]
        command.append(str(int(timeout)))
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(path), str(ROOT), str(ROOT / "viz")]),
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "PYTHONWARNINGS": "ignore",
        }
        # A session of its own, so that what the child started (`dot`) ends with it.
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            out, err = child.communicate(timeout=patience * timeout)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            return {"failed": f"stopped at {patience * timeout:.0f} s"}
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
    for line in out.splitlines():
        if line.startswith(_MARK):
            answer: dict[str, Any] = json.loads(line.removeprefix(_MARK))
            if "SIGXCPU" in str(answer.get("failed")):  # what it had started was stopped
                return {"failed": f"stopped at {timeout:.0f} s of CPU"}
            return answer
    if child.returncode == -signal.SIGXCPU or "SIGXCPU" in err:
        return {"failed": f"stopped at {timeout:.0f} s of CPU"}
    last = (err.strip().splitlines() or ["no output"])[-1]
    return {"failed": f"exit {child.returncode}: {last[:110]}"}


def peak() -> int:
    """Returns the most memory this process has held since `reset_peak`, in bytes.

    Read from the process's own status: `getrusage` of a child starts at its parent's peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> int:
    """Forgets the peak so far where the system allows it; returns the peak from here on."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return peak()
    return peak()


def _main() -> None:
    import warnings

    from benchmarks.timing import said

    warnings.simplefilter("ignore")
    where, given, most = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_CPU, (most, most + 1))
    module, _, name = where.partition(":")
    try:
        answer = getattr(importlib.import_module(module), name)(**given)
    except Exception as e:  # noqa: BLE001 - a peer may fail in any way; its row says how
        answer = {"failed": said(e)}
    print(_MARK + json.dumps(answer))


if __name__ == "__main__":
    _main()
