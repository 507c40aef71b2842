"""What a person reads: numbers in words, tables and progress bars for the terminal.

Results go to stdout, progress to stderr and only if that is a terminal.
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from types import TracebackType
from typing import Any, Self, TypeVar

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

__all__ = [
    "TerminalProgress",
    "bytes_text",
    "count_text",
    "db_text",
    "jsonable",
    "print_json",
    "result_console",
    "seconds_text",
    "table",
    "times_text",
]

Item = TypeVar("Item")

# Wide enough for a table in a log file; a terminal says its own width.
WIDTH_OF_A_PIPE = 120


def result_console() -> Console:
    """The console for results: stdout, without markup, emoji or guessed highlighting."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(
        file=sys.stdout,
        width=WIDTH_OF_A_PIPE if piped else None,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=False,
    )


# ---------------- numbers


def bytes_text(count: float) -> str:
    """Bytes in decimal units with three digits: ``"10.9 MB"``."""
    value, unit = float(count), "B"
    for bigger in ("kB", "MB", "GB", "TB"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, bigger
    if unit == "B":
        return f"{value:.0f} B"
    return f"{_three_digits(value)} {unit}"


def count_text(count: float) -> str:
    """A count with three digits and k, M or G: ``"2.72 M"``; exact below a thousand."""
    value, unit = float(count), ""
    for bigger in (" k", " M", " G", " T"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, bigger
    return f"{value:.0f}" if not unit else f"{_three_digits(value)}{unit}"


def _three_digits(value: float) -> str:
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"


def seconds_text(seconds: float) -> str:
    """A duration: ``"350 us"``, ``"12.3 ms"``, ``"4.2 s"``, ``"3 min 20 s"``."""
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    if seconds >= 1e-3:
        return f"{_three_digits(seconds * 1e3)} ms"
    return f"{seconds * 1e6:.0f} us"


def times_text(ratio: float) -> str:
    """A ratio: ``"3.7x"``, ``"0.98x"``, ``"39x"``."""
    if not math.isfinite(ratio):
        return "-"
    digits = 2 if ratio < 2 else 1 if ratio < 19.95 else 0
    return f"{ratio:.{digits}f}x"


def db_text(decibels: float) -> str:
    """A signal-to-noise ratio: ``"19.8 dB"``; identical outputs have no noise."""
    if decibels == math.inf:
        return "identical"
    if decibels == -math.inf or math.isnan(decibels):
        return "not a number"
    return f"{decibels:.1f} dB"


# ---------------- tables


def table(*columns: str, right: Sequence[str] = (), title: str | None = None) -> Table:
    """An empty table; the columns named in `right` hold numbers.

    Only the last column may fold, so that numbers and names stay whole while there is room.
    """
    result = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False
    )
    for column in columns:
        number = column in right
        result.add_column(
            column, justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    return result


def pairs(items: Iterable[tuple[str, str]]) -> Table:
    """Names on the left, values on the right."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in items:
        grid.add_row(name, Text(value))
    return grid


# ---------------- JSON


def jsonable(value: Any) -> Any:
    """Plain data that JSON can hold; infinities and NaN become the text "inf", "-inf", "nan"."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return [jsonable(item) for item in sorted(value)]
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def print_json(value: Any) -> None:
    """Prints a result as JSON on stdout."""
    json.dump(jsonable(value), sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")


# ---------------- progress


class TerminalProgress:
    """Progress bars on stderr, one a piece of long work; nothing if stderr is not a terminal.

    A context manager; the bars vanish when it ends.
    """

    def __init__(self) -> None:
        console = Console(file=sys.stderr)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def track(self, items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
        """The same items, shown as they are taken."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        bar = self._bars.add_task(label, total=total)
        try:
            for item in items:
                yield item
                self._bars.advance(bar)
        finally:
            self._bars.remove_task(bar)
