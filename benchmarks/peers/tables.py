"""The results as a page in Markdown."""

import datetime
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

from peers.goals import Verdict, verdicts
from peers.results import Row, Rows

_HEADINGS = (
    "model",
    "file",
    "tool",
    "CPU s",
    "peak MB",
    "MB",
    "SQNR dB",
    "cosine",
    "score",
    "speed",
)


def page(rows: Sequence[Row], versions: Iterable[str], notes: Iterable[str]) -> str:
    """The whole page; `rows` in the order of the table."""
    by_key: Rows = {row.key: row for row in rows}
    lines = [
        "# Quantization beside onnxruntime and NNCF",
        "",
        "Written by `benchmarks/quantization_peers.py`; what the columns mean is in "
        "[benchmarks/README.md](../README.md).",
        "",
        f"- Machine: {cpu_name()}, {os.cpu_count()} cores, {platform.system()}",
        f"- Versions: {', '.join(versions)}",
        f"- Date: {datetime.datetime.now(datetime.UTC).date()}",
        *(f"- {note}" for note in notes),
        "",
        result_table(rows),
        "",
        "## Goals",
        "",
        goal_table(verdicts(by_key)),
    ]
    return "\n".join(lines) + "\n"


def result_table(rows: Iterable[Row]) -> str:
    """A line for each row."""
    return _table(_HEADINGS, (_cells(row) for row in rows))


def goal_table(found: Iterable[Verdict]) -> str:
    """A line for each goal."""
    headings = ("model", "file", "goal", "found", "")
    return _table(
        headings,
        ((v.model, v.variant, v.goal, v.found, "met" if v.met else "**missed**") for v in found),
    )


def _cells(row: Row) -> Sequence[str]:
    start = (row.model, row.variant, row.tool, _figure(row.cpu_s, 1), _figure(row.peak_mb, 0))
    if row.failure:
        return (*start, f"fails: {_short(row.failure)}", "", "", "", "")
    return (
        *start,
        _figure(row.mb, 2),
        _figure(row.sqnr_db, 1),
        _figure(row.cosine, 4),
        _figure(row.score, 2),
        _figure(row.speed, 2),
    )


def _short(failure: str, length: int = 90) -> str:
    """A reason that fits a cell: the exception without its module, cut at `length` characters."""
    kind, colon, rest = failure.partition(":")
    text = f"{kind.rpartition('.')[2]}{colon}{rest}".replace("|", "/")
    return text if len(text) <= length else text[: length - 3] + "..."


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def cpu_name() -> str:
    """The processor's name, with what matters to 8-bit kernels."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in info.read_text().splitlines())
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    flags = fields.get("flags", "").split()
    kinds = [flag for flag in ("avx2", "avx512f", "avx_vnni", "avx512_vnni") if flag in flags]
    return f"{fields.get('model name', platform.machine())} ({', '.join(kinds)})"
