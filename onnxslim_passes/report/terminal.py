"""What a person reads: numbers in words, tables and progress bars for the terminal.

Results go to stdout, progress to stderr and only if that is a terminal.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from types import TracebackType
from typing import Any, Self, TypeVar

from rich import box
from rich.console import Console, Group, RenderableType
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

from onnxslim_passes.report.records import Report, jsonable
from onnxslim_passes.report.wording import (
    bytes_text,
    db_text,
    figure_rows,
    metric_text,
    pass_text,
    reason_rows,
    seconds_text,
    zeros_note,
)

__all__ = [
    "TerminalProgress",
    "fidelity_table",
    "pairs",
    "print_json",
    "reasons_grid",
    "report_view",
    "result_console",
    "section",
    "table",
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


# ---------------- tables


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table; the columns named in `right` hold numbers.

    Only the last column may fold, so that numbers and names stay whole while there is room.
    """
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        number = column in right
        result.add_column(
            column, justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    return result


def section(title: str, *body: RenderableType) -> RenderableType:
    """A heading, what stands below it, and a blank line."""
    return Group(Text(title, "bold"), *body, Text())


def pairs(items: Iterable[tuple[str, str]]) -> Table:
    """Names on the left, values on the right."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in items:
        grid.add_row(name, Text(value))
    return grid


# ---------------- JSON


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
        """The same items, shown as they are taken; if there are fewer than `total`, the last."""
        count = len(items) if isinstance(items, Sized) else total
        if total is None:
            total = count
        done = 0 if total is None or count is None else total - count
        bar = self._bars.add_task(label, total=total, completed=done)
        try:
            for item in items:
                yield item
                self._bars.advance(bar)
        finally:
            self._bars.remove_task(bar)

    def say(self, text: str) -> None:
        """A line on stderr that stays, above the bars; also where stderr is no terminal."""
        self._bars.console.print(Text(text), soft_wrap=True)

    def counter(self) -> "Counter":
        """A bar for work whose length is known when it begins."""
        return Counter(self._bars)


class Counter:
    """A bar that is advanced by hand; not shown before `start`."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._bar = bars.add_task("", total=None, visible=False)

    def start(self, total: int, done: int = 0) -> None:
        """Shows it: so many steps, some of which may be done."""
        self._bars.update(self._bar, total=total, completed=done, visible=True)

    def advance(self, label: str) -> None:
        """One step more."""
        self._bars.update(self._bar, description=label, advance=1)


# ---------------- a report


def report_view(report: Report) -> RenderableType:
    """The report below its headline: metric, warnings, figures, passes, what was passed over."""
    parts: list[RenderableType] = []
    if report.metric:
        parts.append(Text(metric_text(report), "bold"))
    parts += [Text(f"warning: {line}", "yellow") for line in report.warnings]
    parts += [Text(), _figures_view(report), Text()]
    if report.fidelity:
        title = f"Outputs of the result against the original, {report.samples}"
        parts.append(section(title, fidelity_table(report.fidelity["outputs"])))
    parts += [_passes_view(report), *_passed_over_views(report)]
    if note := zeros_note(report):
        parts.append(Text(f"Note: {note[0].lower()}{note[1:]}"))
    return Group(*parts)


def _figures_view(report: Report) -> RenderableType:
    listed = table("", "original", "result", "ratio", right=["original", "result", "ratio"])
    for row in figure_rows(report):
        listed.add_row(*row)
    return listed


def fidelity_table(outputs: Iterable[Mapping[str, Any]]) -> RenderableType:
    """The error of each output: ``name``, ``sqnr_db``, ``cosine``, ``max_error``, ``agreement``."""
    right = ["SQNR", "cosine", "max error", "agreement"]
    listed = table("output", *right, right=right)
    for output in outputs:
        agreement = output["agreement"]
        if agreement is not None:
            # Classes and the like: equal or not, there is no noise between them.
            listed.add_row(Text(output["name"]), "", "", "", f"{agreement:.2%}")
            continue
        figures = f"{output['cosine']:.5f}", f"{output['max_error']:.3g}"
        listed.add_row(Text(output["name"]), db_text(output["sqnr_db"]), *figures, "")
    return listed


def _passes_view(report: Report) -> RenderableType:
    right = ["changed", "before", "after", "time"]
    columns = ["pass", *right]
    each = any(record.fidelity for record in report.passes)
    columns += ["SQNR so far"] if each else []
    listed = table(*columns, right=[*right, "SQNR so far"])
    for record in report.passes:
        cells = [
            pass_text(record),
            f"{record.taken} of {len(record.decisions)}",
            bytes_text(record.before_bytes),
            bytes_text(record.after_bytes),
            seconds_text(record.seconds),
        ]
        if each:
            cells.append(db_text(record.fidelity["sqnr_db"]) if record.fidelity else "")
        listed.add_row(*map(Text, cells))
    return section("Passes", listed)


def _passed_over_views(report: Report) -> Iterator[RenderableType]:
    """What each pass left alone and why, the commonest reasons first."""
    rows = [
        (record.name, *row)
        for record in report.passes
        for row in reason_rows(decision for decision in record.decisions if not decision.taken)
    ]
    if rows:
        yield section("Passed over, and why", reasons_grid(rows))


def reasons_grid(rows: Iterable[tuple[str, int, str]]) -> RenderableType:
    """Label, count and reason in columns, so that long reasons stay readable."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, count, reason in rows:
        grid.add_row(Text(label), str(count), Text(reason))
    return grid
