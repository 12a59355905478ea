"""How wide a text is: the Helvetica metrics table, so that every engine draws the same boxes."""

from __future__ import annotations

import unicodedata

# Advance widths of the printable ASCII characters, in thousandths of the font size (Adobe AFM).
_REGULAR = (
    278, 278, 355, 556, 556, 889, 667, 191, 333, 333, 389, 584, 278, 333, 278, 278,
    556, 556, 556, 556, 556, 556, 556, 556, 556, 556, 278, 278, 584, 584, 584, 556,
    1015, 667, 667, 722, 722, 667, 611, 778, 722, 278, 500, 667, 556, 833, 722, 778,
    667, 778, 722, 667, 611, 722, 667, 944, 667, 667, 611, 278, 278, 278, 469, 556,
    333, 556, 556, 500, 556, 556, 278, 556, 556, 222, 222, 500, 222, 833, 556, 556,
    556, 556, 333, 500, 278, 556, 500, 722, 500, 500, 500, 334, 260, 334, 584,
)  # fmt: skip
_BOLD = (
    278, 333, 474, 556, 556, 889, 722, 238, 333, 333, 389, 584, 278, 333, 278, 278,
    556, 556, 556, 556, 556, 556, 556, 556, 556, 556, 333, 333, 584, 584, 584, 611,
    975, 722, 722, 722, 722, 667, 611, 778, 722, 278, 556, 722, 611, 833, 722, 778,
    667, 778, 722, 667, 611, 722, 667, 944, 667, 667, 611, 333, 278, 333, 584, 556,
    333, 556, 611, 556, 611, 556, 333, 611, 611, 278, 278, 556, 278, 889, 611, 611,
    611, 611, 389, 556, 333, 611, 556, 778, 556, 556, 500, 389, 280, 389, 584,
)  # fmt: skip
_OTHER = {"×": 584, "·": 278, "…": 1000, "–": 556, "→": 1000, "−": 584}
_WIDE = 1000
_UNKNOWN = 650


def width(text: str, size: float, bold: bool = False) -> float:
    """Returns the width of one line of text, in points."""
    table = _BOLD if bold else _REGULAR
    return sum(_advance(c, table) for c in text) * size / 1000


def fit(text: str, limit: float, size: float, bold: bool = False) -> str:
    """Shortens a text in the middle until it is at most `limit` points wide.

    The end of a name says as much as its beginning (`layers.0 … q_proj`), so both are kept.
    """
    text = text[:400] + text[-400:] if len(text) > 800 else text
    if width(text, size, bold) <= limit:
        return text
    keep = len(text)
    while keep > 2:
        keep -= 1
        head = keep - keep // 2
        short = text[:head].rstrip() + "…" + text[len(text) - keep // 2 :].lstrip()
        if width(short, size, bold) <= limit:
            return short
    return "…"


def _advance(char: str, table: tuple[int, ...]) -> int:
    code = ord(char)
    if 32 <= code < 127:
        return table[code - 32]
    if char in _OTHER:
        return _OTHER[char]
    if unicodedata.combining(char):
        return 0
    return _WIDE if unicodedata.east_asian_width(char) in "WF" or code > 0x1F000 else _UNKNOWN
