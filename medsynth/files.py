"""Files that are there as a whole or not at all, whatever stops the writer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

HALF_WRITTEN = ".*.partial"
"""Names of the files that :func:`replacing` writes and a kill leaves, as a glob pattern."""
_READABLE = 0o666  # before the umask


@contextlib.contextmanager
def replacing(path: Path, *, mode: int = _READABLE, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a file beside ``path`` to write, and put it in the place of ``path`` when the block ends.

    A reader finds the old content or the new one; when the block raises, the old one stays and nothing is left beside
    it (a kill leaves ``.NAME.partial``, which the next writer takes away). One writer at a time.

    Args:
        path: the file; its folder must be there.
        mode: permissions from the first byte on, before the umask.
        durable: bring content and name to disk first, so that a power cut, too, leaves the old or the new one. False
            for many files of which any can be made again.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    scratch = path.with_name(f".{path.name}.partial")
    scratch.unlink(missing_ok=True)
    handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def replace_bytes(path: Path, content: bytes, *, mode: int = _READABLE, durable: bool = True) -> None:
    """Replace a file by ``content`` as a whole; see :func:`replacing`."""
    with replacing(path, mode=mode, durable=durable) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Bring the names in ``folder`` to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
