"""The formats a drawing is written in, as the name of its file asks for."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from fxlora_viz.engines import EngineError

FORMATS = (".svg", ".dot", ".png", ".pdf", ".html", ".graphml", ".mmd", ".json")


def suffix_of(path: str | os.PathLike[str]) -> str:
    """Returns the format a file name asks for.

    Raises:
        ValueError: names the formats there are.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(
            f"cannot draw into {str(path)!r}: its suffix {suffix!r} is none of {', '.join(FORMATS)}"
        )
    return suffix


def convert(svg: str, suffix: str) -> bytes:
    """Returns an SVG as PNG or PDF.

    Raises:
        EngineError: names what to install.
    """
    if importlib.util.find_spec("cairosvg"):
        cairosvg = importlib.import_module("cairosvg")
        if suffix == ".png":
            return bytes(cairosvg.svg2png(svg.encode(), scale=2, background_color="white"))
        return bytes(cairosvg.svg2pdf(svg.encode(), background_color="white"))
    program = shutil.which("rsvg-convert")
    if program is not None:
        command = [program, "-f", suffix[1:], "-b", "white", "-z", "2" if suffix == ".png" else "1"]
        done = subprocess.run(command, input=svg.encode(), capture_output=True, check=True)
        return done.stdout
    raise EngineError(
        f"nothing here turns SVG into {suffix}: install it with `pip install cairosvg` (or "
        "rsvg-convert); .svg and .html need neither"
    )


def html_page(svg: str, title: str) -> str:
    """Returns a page that shows a drawing and needs nothing from anywhere else."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title>"
        '<meta name="viewport" content="width=device-width">'
        "<style>:root{color-scheme:light dark}body{margin:0;display:grid;place-items:start center}"
        "svg{max-width:100%;height:auto}</style></head>\n"
        f"<body>\n{svg}</body></html>\n"
    )
