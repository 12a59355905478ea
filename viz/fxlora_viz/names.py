"""Names and numbers as a reader sees them, made safe for DOT and XML."""

from __future__ import annotations

import unicodedata
from typing import Any

_DTYPES = {
    "float32": "f32",
    "float64": "f64",
    "float16": "f16",
    "bfloat16": "bf16",
    "complex64": "c64",
}
_BIDI_AND_ODD = frozenset("\u2028\u2029\ufeff\ufffe\uffff")


def clean(text: object, limit: int = 300) -> str:
    """Returns a text on one line, without control characters, of at most `limit` characters.

    Control characters are not allowed in XML; bidirectional overrides would let a module's name
    rewrite the text beside it. Both become a space.
    """
    raw = str(text)
    if len(raw) > limit:
        raw = raw[: limit // 2] + "…" + raw[len(raw) - limit // 2 :]
    if raw.isascii() and raw.isprintable():  # nearly all are
        return " ".join(raw.split())
    safe = "".join(" " if _odd(c) else c for c in raw)
    return " ".join(safe.split())


def _odd(char: str) -> bool:
    return char in _BIDI_AND_ODD or unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def identifier(key: str, taken: dict[str, str]) -> str:
    """Returns a key as letters, digits and underscores; different keys stay different.

    Graphviz writes `-` as an entity and CSS needs escapes for the rest: underscores only.

    Args:
        key: what to name.
        taken: identifier -> key, of everything named so far; the new name is added.
    """
    plain = "".join(c if c.isascii() and c.isalnum() else "_" for c in key[:100])
    name, n = plain, 1
    while taken.setdefault(name, key) != key:
        n += 1
        name = f"{plain}_{n}"
    return name


def quantity(n: int) -> str:
    """Returns a count as people say it.

    >>> quantity(325), quantity(525336576), quantity(8030261248)
    ('325', '525.3 M', '8.03 B')
    """
    if n < 10_000:
        return str(n)
    for unit, size, digits in (("K", 10**3, 1), ("M", 10**6, 1), ("B", 10**9, 2), ("T", 10**12, 2)):
        # 999,999 is 1.0 M, never 1000.0 K.
        if round(n / size, digits) < 1000:
            return f"{n / size:.{digits}f} {unit}"
    return f"{n:.3g}"


def percent(part: int, whole: int) -> str:
    """Returns a share in percent with three significant digits, and no claim beyond them."""
    share = 100 * part / whole if whole else 0.0
    if share == 0 or share >= 99.995:
        return f"{share:.0f} %"
    return f"{share:.2f} %" if share >= 0.1 else f"{share:.2g} %"


def number(value: Any) -> str:
    """Returns a factor as people write it."""
    return f"{value:.4g}" if isinstance(value, (int, float)) else clean(value, 24)


def times(shape: Any) -> str:
    """Returns a weight's shape, `4096 × 1024`."""
    return " × ".join(str(d) for d in shape)


def tensor(shape: Any, dtype: Any) -> str:
    """Returns a tensor's type, `bf16 [1, 16, 4096]`; empty when the trace knows none."""
    if shape is None:
        return ""
    name = str(dtype).removeprefix("torch.") if dtype is not None else ""
    dims = ", ".join(clean(d, 40) for d in shape)
    return f"{_DTYPES.get(name, name)} [{dims}]".strip()
