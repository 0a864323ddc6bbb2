"""The files below the hospital's folder: links to folders are followed, folders that may not be read are told."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path


def files_below(root: Path, closed: list[Path] | None = None) -> Iterator[Path]:
    """Yield every file below ``root``, in no order that means something; a folder that links lead to twice, once.

    Args:
        root: the hospital's folder, or a part of it.
        closed: gets the folders that may not be read, in which patients may be. Python's own glob passes them over
            in silence, and links to folders, too.
    """
    closed = [] if closed is None else closed
    seen = set()
    left = [root]
    while left:
        folder = left.pop()
        try:
            state = folder.stat()
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            closed.append(folder)
            continue
        for entry in entries:
            try:
                if entry.is_dir():
                    left.append(folder / entry.name)
                elif entry.is_file():
                    yield folder / entry.name
            except OSError as error:  # a link to itself, or a folder of which only the names may be read
                if error.errno != errno.ELOOP:
                    closed.append(folder / entry.name)
