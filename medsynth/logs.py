"""Progress and messages: rich on a terminal, JSON lines in a batch job; never a patient identifier or a path of one."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
_BATCH_INTERVAL_S = 10.0


def say(message: str, **fields: Any) -> None:
    """Write one message with its fields to standard error (a JSON line when that is no terminal)."""
    if sys.stderr.isatty():
        from rich.console import Console

        tail = "  ".join(f"[dim]{key}[/]={_short(value)}" for key, value in fields.items())
        Console(stderr=True, highlight=False).print(f"{message}  {tail}".rstrip())
        return
    record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "message": message, **fields}
    print(json.dumps(record, default=str), file=sys.stderr, flush=True)


def progress(items: Iterable[T], what: str, total: int | None = None, inner: bool = False) -> Iterator[T]:
    """Yield ``items`` while showing a bar (terminal) or a line every ten seconds (batch job).

    Args:
        items: to go through.
        what: is done, in a few words.
        total: number of items, if it is known.
        inner: whether another progress shows what these items are a part of: a terminal has room for one bar.
    """
    if sys.stderr.isatty():
        if inner:
            yield from items
            return
        from rich.console import Console
        from rich.progress import track

        yield from track(items, description=what, total=total, console=Console(stderr=True), transient=True)
        return
    started = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= _BATCH_INTERVAL_S:
            last = now
            left = (total - done) * (now - started) / done if total else None
            say(what, done=done, total=total, elapsed_s=round(now - started), left_s=left and round(left))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
