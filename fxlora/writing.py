"""A file written whole or not at all; into a pipe or a device, straight."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

# What these folders hold stands for something that is open already: `/dev/stdout` may be a pipe, a
# terminal, or somebody's log.
_OPEN_ALREADY = ("/dev/", "/proc/")


def write_whole(path: str | os.PathLike[str], content: bytes) -> Path:
    """Writes a file by way of a neighbour, so that no reader ever sees half of it.

    A link stays one, and the file it leads to is written. What is no file (a pipe, a device) has
    the content written into it.

    Returns:
        The path, as it was given.

    Raises:
        OSError: when it cannot be written; an older file is as it was.
    """
    given = os.fspath(path)
    if not given:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), given)
    mode = _mode(given)
    if mode is not None and stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), given)
    if mode is not None and _is_open_already(given, mode):
        with open(given, "ab") as stream:
            stream.write(content)
    else:
        _replaced(Path(os.path.realpath(given)), content, mode)
    return Path(path)


def _mode(path: str) -> int | None:
    """Returns the mode of what a path leads to; None where nothing is."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


def _is_open_already(path: str, mode: int) -> bool:
    return not stat.S_ISREG(mode) or os.path.abspath(path).startswith(_OPEN_ALREADY)


def _replaced(target: Path, content: bytes, mode: int | None) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, _new_mode() if mode is None else stat.S_IMODE(mode))
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _new_mode() -> int:
    """Returns the mode a new file gets; a temporary one is its owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
