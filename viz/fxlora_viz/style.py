"""The style sheet of an SVG: light, dark, or following the reader's scheme or the notebook's."""

from __future__ import annotations

import re

from fxlora_viz import theme

_COLOUR = re.compile("#[0-9A-F]{6}")
# How a notebook says that it is light or dark, which need not be what the system is: JupyterLab
# and nbconvert's pages, VS Code.
_LIGHT_HOSTS = ('[data-jp-theme-light="true"]', ".vscode-light", ".vscode-high-contrast-light")
_DARK_HOSTS = (
    '[data-jp-theme-light="false"]', ".vscode-dark",
    ".vscode-high-contrast:not(.vscode-high-contrast-light)",
)  # fmt: skip


def style_sheet(mode: str = "auto") -> str:
    """Returns the CSS of a drawing.

    Args:
        mode: "auto", "light" or "dark".
    """
    light = _rules()
    dark = _COLOUR.sub(lambda m: theme.DARK[m.group()], light)
    if mode == "dark":
        return dark
    return light if mode == "light" else f"{light}@media (prefers-color-scheme:dark){{{dark}}}"


def inline_style_sheet(mode: str, name: str) -> str:
    """Returns the CSS of a drawing that stands inside a notebook's page beside others.

    Args:
        mode: "auto" follows the notebook's theme where it says one, else the reader's scheme.
        name: the class of this drawing alone, so that no rule reaches another one.
    """
    fits = f".{name}{{max-width:100%;height:auto}}"
    if mode != "auto":
        return fits + style_sheet(mode).replace(".fxlora ", f".{name} ")
    rules = _rules().replace(".fxlora ", f".{name} ")
    rules = _COLOUR.sub(lambda m: f"var(--fx{m.group()[1:]})", rules)
    light = ";".join(f"--fx{c[1:]}:{c}" for c in theme.DARK)
    dark = ";".join(f"--fx{c[1:]}:{d}" for c, d in theme.DARK.items())

    def hosted(hosts: tuple[str, ...]) -> str:
        return ",".join(f"{h} .{name}" for h in hosts)

    return (
        f"{fits}.{name}{{{light}}}@media (prefers-color-scheme:dark){{.{name}{{{dark}}}}}"
        f"{hosted(_LIGHT_HOSTS)}{{{light}}}{hosted(_DARK_HOSTS)}{{{dark}}}{rules}"
    )


def _rules() -> str:
    rules = [
        _rule("text", fill=theme.INK),
        _rule(".fx_ground", fill=theme.BOXES["panel"][0]),
        _rule(".t", font_weight="bold"),
        _rule(".m", text_anchor="middle"),
        _rule(".d", fill=theme.DIM),
        _rule(".g", fill=theme.DIM, font_style="italic"),
        _rule(".n", fill=theme.ACCENT, font_weight="bold"),
        _rule(".h", fill=theme.HOT, font_weight="bold"),
        _rule(".fx_label_module .t", fill=theme.DIM),
        _rule(".fx_label_site .t", fill=theme.HOT),
        _rule(".fx_edge path", fill="none"),
        _rule(".fx_skip path", stroke_dasharray="4 3"),
    ]
    for name, (fill, _, _) in theme.BOXES.items():
        rules.append(_rule(f".fx_label_{name} rect", fill=fill))
    for name, (fill, line, wide) in {**theme.NODES, **theme.BOXES}.items():
        rules.append(_rule(f".fx_{name} .s", fill=fill, stroke=line, stroke_width=f"{wide:g}"))
    for name, (color, wide) in theme.EDGES.items():
        rules.append(_rule(f".fx_{name} path", stroke=color, stroke_width=f"{wide:g}"))
        rules.append(_rule(f".fx_{name} polygon", fill=color))
    rules += [
        _rule(".fx_trainable .d", fill=theme.HOT_TEXT),
        _rule(".fx_idle .s", stroke_dasharray="1.5 2.5"),
        _rule(".fx_unused .s", stroke_dasharray="1.5 2.5"),
        _rule(".fx_edge.fx_idle path", stroke_dasharray="1.5 2.5"),
        _rule(".fx_idle .d", fill=theme.HOT),
        _rule(".fx_label_site .d", fill=theme.HOT),
        _rule(".fx_fold .c", stroke=theme.CARD, stroke_width="1"),
        _rule(".fx_site .s", stroke_dasharray="4 3"),
        _rule(".fx_matched .s", stroke=theme.HOT, stroke_width="1.8", stroke_dasharray="5 3"),
    ]
    return "".join(rules)


def _rule(selector: str, **values: str) -> str:
    body = ";".join(f"{k.replace('_', '-')}:{v}" for k, v in values.items())
    return f".fxlora {selector}{{{body}}}"
