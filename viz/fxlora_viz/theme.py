"""Colours and measures, light and dark; the only file that knows them."""

from __future__ import annotations

FONT = "Helvetica,Arial,sans-serif"
TITLE, TEXT, TAG = 12.5, 10.0, 9.0
PAD = 24.0  # points around the widest line of a node
MAX_TEXT = 240.0  # a wider line is shortened in the middle
CIRCLE = 20.0
TRAPEZIUM = (89.28, 36.0)
SLANT = 0.208  # how far Graphviz's trapezium leans, as a share of its width
SHADOW = 5.0  # offset of the cards behind a fold

# What is drawn -> fill, line, line width. Shape, weight and dash carry the meaning as well.
NODES: dict[str, tuple[str, str, float]] = {
    "frozen": ("#EDF1F6", "#8492A6", 1.0),
    "trainable": ("#FFE3C7", "#B04A00", 2.4),
    "idle": ("#FFFFFF", "#B04A00", 1.4),
    "unused": ("#FFFFFF", "#8492A6", 1.0),
    "again": ("#F5F8FB", "#4E79A7", 1.8),
    "op": ("#FFFFFF", "#A9B4C2", 1.0),
    "io": ("#E1EBF7", "#4E79A7", 1.2),
    "sum": ("#FFFFFF", "#7C8798", 1.3),
}
EDGES: dict[str, tuple[str, float]] = {
    "kept": ("#7C8798", 1.1),
    "quiet": ("#B3BCC8", 1.0),
    "added": ("#B04A00", 2.0),
    "idle": ("#B04A00", 1.0),
}
BOXES: dict[str, tuple[str, str, float]] = {
    "panel": ("#FFFFFF", "#D3DAE3", 1.2),
    "fold": ("#F5F8FB", "#4E79A7", 1.8),
    "block": ("#F5F8FB", "#4E79A7", 1.4),
    "module": ("#FFFFFF", "#D3DAE3", 1.0),
    "site": ("#FFF9F3", "#B04A00", 1.1),
}
INK, DIM, ACCENT, HOT = "#1B2430", "#5B6675", "#1F5A96", "#B04A00"
HOT_TEXT = "#A84600"  # small text on the fill of what trains

CARD = "#9DB7D6"  # the cards behind a fold

DARK = {
    "#9DB7D6": "#3C5876",
    "#EDF1F6": "#2A3442",
    "#8492A6": "#8896AB",
    "#FFE3C7": "#54300F",
    "#B04A00": "#FF9A4D",
    "#A84600": "#FF9A4D",
    "#FFFFFF": "#171D26",
    "#A9B4C2": "#5C6878",
    "#E1EBF7": "#1C344F",
    "#4E79A7": "#7FB0E6",
    "#7C8798": "#95A1B2",
    "#B3BCC8": "#566170",
    "#D3DAE3": "#364150",
    "#F5F8FB": "#1D2530",
    "#FFF9F3": "#2A211A",
    "#1B2430": "#E8EDF3",
    "#5B6675": "#A5B0BF",
    "#1F5A96": "#9CC7F5",
}
MARGINS = {"panel": 18, "fold": 16, "block": 16, "module": 12, "site": 9}
LABELS = {"panel": 20.0, "fold": 13.0, "block": 13.0, "module": 11.5, "site": 11.5}
INSETS = {"panel": 18.0, "fold": 14.0, "block": 14.0, "module": 10.0, "site": 10.0}
TOPS = {"panel": 30.0, "fold": 20.0, "block": 20.0, "module": 16.0, "site": 16.0}
NOTES = {"panel": 11.0, "fold": 9.5, "block": 9.5, "site": 9.5}
