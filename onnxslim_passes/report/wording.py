"""What a report says in words: numbers with units, the headline, rows of figures and reasons.

Terminal and HTML say the same, because both take it from here.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from onnxslim_passes.report.records import Decision, PassRecord, Report

# How reports call samples that were made up.
RANDOM_SAMPLES = "random inputs"

# More reasons than these go to `explain`; a person reads the first few.
SHOWN_REASONS = 4

NOT_MEASURED = "not measured"

_SAME_SPEED = 0.05
_NUMBER = re.compile(r"\d[\d.,]*")


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


# ---------------- a report


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


def figure_rows(report: Report) -> Iterator[tuple[str, str, str, str]]:
    """What was measured before and after: label, original, result, ratio; all of them texts."""
    for label, key, text in (
        ("file", "file_bytes", bytes_text),
        ("file after zstd -19", "zstd_bytes", bytes_text),
        ("parameters", "parameters", count_text),
        ("non-zero parameters", "nonzero_parameters", count_text),
        ("multiply-adds", "macs", count_text),
    ):
        before, after = report.before.get(key), report.after.get(key)
        if before is not None and after is not None:
            yield label, text(before), text(after), times_text(before / after) if after else ""
        elif before is not None or after is not None:  # zstd -19 takes too long on large files
            first, second = (NOT_MEASURED if n is None else text(n) for n in (before, after))
            yield label, first, second, ""
    if report.latency:
        figures = report.latency
        times = seconds_text(figures["reference_s"]), seconds_text(figures["candidate_s"])
        yield "latency, one thread", *times, times_text(figures["speedup"])
    if report.metric:
        metric = report.metric
        yield metric["name"], f"{metric['before']:.4g}", f"{metric['after']:.4g}", ""


def metric_text(report: Report) -> str:
    """The task metric before and after in one line; empty if none was asked for."""
    if not report.metric:
        return ""
    metric = report.metric
    change = f"{metric['before']:.4g} -> {metric['after']:.4g}, drop {metric['drop']:.2g}"
    return f"{metric['name']} {change}"


def pass_text(record: PassRecord) -> str:
    """A pass with the options that differ from their defaults."""
    options = ", ".join(f"{key}={_option(value)}" for key, value in record.options.items())
    return f"{record.name} ({options})" if options else record.name


def _option(value: Any) -> str:
    """An option's value; overrides for some nodes as the command line takes them."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return f"[{', '.join(override_text(item) for item in value)}]"
    return str(value)


def override_text(table: Mapping[str, Any]) -> str:
    """Other options for some nodes, as ``pattern=key:value+key:value``."""
    given = {key: value for key, value in table.items() if key != "nodes"}
    words = [
        f"{key}:{str(value).lower() if isinstance(value, bool) else value}"
        for key, value in given.items()
    ]
    return f"{table['nodes']}={'+'.join(words)}"


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


def zeros_note(report: Report) -> str:
    """What must be said of zeros that save no time; empty if nothing must."""
    before, after = report.before, report.after
    # Rounding to integers makes a few zeros as well; they are not worth a word.
    fewer = after["nonzero_parameters"] < 0.8 * before["nonzero_parameters"]
    if not fewer or before.get("macs") != after.get("macs"):
        return ""
    return "Unstructured zeros shrink the file, not the time; ONNX Runtime multiplies them."
