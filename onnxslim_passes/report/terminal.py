"""What a person reads: numbers in words, tables and progress bars for the terminal.

Results go to stdout, progress to stderr and only if that is a terminal.
"""

import json
import math
import os
import re
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

from onnxslim_passes.report.records import Decision, PassRecord, Report, jsonable

__all__ = [
    "TerminalProgress",
    "bytes_text",
    "count_text",
    "db_text",
    "fidelity_table",
    "headline",
    "pairs",
    "print_json",
    "reason_rows",
    "reasons_grid",
    "report_view",
    "result_console",
    "seconds_text",
    "section",
    "speed_text",
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


# ---------------- a report

# How reports call samples that were made up.
RANDOM_SAMPLES = "random inputs"

# More reasons than these go to `explain`; a person reads the first few.
SHOWN_REASONS = 4

_SAME_SPEED = 0.05
_NUMBER = re.compile(r"\d[\d.,]*")


def headline(report: Report, output: str) -> str:
    """The result in one line: sizes, ratio, speed, fidelity.

    Args:
        report: of the run.
        output: name of the file written.
    """
    before, after = report.before["file_bytes"], report.after["file_bytes"]
    source = report.source or "model"
    parts = [f"{source} {bytes_text(before)} -> {output} {bytes_text(after)}"]
    parts[0] += f" ({times_text(report.ratio)})"
    if report.latency:
        # Another target's speed cannot be told here; that of its model on this CPU means little.
        on_cpu = report.target.startswith("cpu")
        speed = speed_text(report.latency["speedup"])
        parts.append(speed if on_cpu else f"not run on {report.target}")
    if report.fidelity:
        decibels = report.fidelity["sqnr_db"]
        # Made-up inputs say that the model runs, not how good it is; the first line must not lie.
        made_up = " on random inputs" if RANDOM_SAMPLES in report.samples else ""
        same = decibels == math.inf
        parts.append(f"{'identical outputs' if same else f'{db_text(decibels)} SQNR'}{made_up}")
    return ", ".join(parts)


def speed_text(speedup: float) -> str:
    """A ratio of latencies in plain words; slower is called slower."""
    if speedup > 1 + _SAME_SPEED:
        return f"{times_text(speedup)} faster"
    if speedup < 1 - _SAME_SPEED:
        return f"SLOWER than the original: {times_text(speedup)} of its speed"
    return "same speed"


def report_view(report: Report) -> RenderableType:
    """The report below its headline: metric, warnings, figures, passes, what was passed over."""
    parts: list[RenderableType] = []
    if report.metric:
        metric = report.metric
        change = f"{metric['before']:.4g} -> {metric['after']:.4g}, drop {metric['drop']:.2g}"
        parts.append(Text(f"{metric['name']} {change}", "bold"))
    parts += [Text(f"warning: {line}", "yellow") for line in report.warnings]
    parts += [Text(), _figures_view(report), Text()]
    if report.fidelity:
        title = f"Outputs of the result against the original, {report.samples}"
        parts.append(section(title, fidelity_table(report.fidelity["outputs"])))
    parts += [_passes_view(report), *_passed_over_views(report), *_notes(report)]
    return Group(*parts)


def _figures_view(report: Report) -> RenderableType:
    listed = table("", "original", "result", "ratio", right=["original", "result", "ratio"])
    for label, key, text in (
        ("file", "file_bytes", bytes_text),
        ("file after zstd -19", "zstd_bytes", bytes_text),
        ("parameters", "parameters", count_text),
        ("non-zero parameters", "nonzero_parameters", count_text),
        ("multiply-adds", "macs", count_text),
    ):
        before, after = report.before.get(key), report.after.get(key)
        if before is not None and after is not None:
            ratio = times_text(before / after) if after else ""
            listed.add_row(label, text(before), text(after), ratio)
    if report.latency:
        figures = report.latency
        times = seconds_text(figures["reference_s"]), seconds_text(figures["candidate_s"])
        listed.add_row("latency, one thread", *times, times_text(figures["speedup"]))
    if report.metric:
        metric = report.metric
        values = f"{metric['before']:.4g}", f"{metric['after']:.4g}"
        listed.add_row(metric["name"], *values, "")
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
            _with_options(record),
            f"{record.taken} of {len(record.decisions)}",
            bytes_text(record.before_bytes),
            bytes_text(record.after_bytes),
            seconds_text(record.seconds),
        ]
        if each:
            cells.append(db_text(record.fidelity["sqnr_db"]) if record.fidelity else "")
        listed.add_row(*map(Text, cells))
    return section("Passes", listed)


def _with_options(record: PassRecord) -> str:
    options = ", ".join(f"{key}={value}" for key, value in record.options.items())
    return f"{record.name} ({options})" if options else record.name


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


def reason_rows(decisions: Iterable[Decision], shown: int = SHOWN_REASONS) -> list[tuple[int, str]]:
    """Decisions counted by reason, the commonest first, each with an example.

    Reasons that differ only in their numbers count as one.
    """
    found: dict[str, list[Decision]] = {}
    for decision in decisions:
        found.setdefault(_NUMBER.sub("#", decision.reason), []).append(decision)
    ordered = sorted(found.values(), key=len, reverse=True)
    rows = []
    for alike in ordered[:shown]:
        first, same = alike[0], len({decision.reason for decision in alike}) == 1
        example = f"e.g. {first.where}" if len(alike) > 1 else first.where
        text = f"{first.reason} ({example})" if same else f"such as {first.where}: {first.reason}"
        rows.append((len(alike), text))
    rest = sum(map(len, ordered[shown:]))
    return [*rows, (rest, "for other reasons")] if rest else rows


def _notes(report: Report) -> Iterator[RenderableType]:
    before, after = report.before, report.after
    # Rounding to integers makes a few zeros as well; they are not worth a word.
    fewer = after["nonzero_parameters"] < 0.8 * before["nonzero_parameters"]
    if fewer and before.get("macs") == after.get("macs"):
        yield Text(
            "Note: unstructured zeros shrink the file, not the time; ONNX Runtime multiplies them."
        )
