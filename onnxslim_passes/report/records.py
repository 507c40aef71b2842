"""What a run says: decisions, a record a pass, and the report, as plain data that JSON can hold."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onnxslim_passes.errors import OutputError, UsageError

Figure = int | float | str

REPORT_SUFFIXES = (".json", ".html")

SHORT_NAME = "name"
"""The figure of a decision with the name in the file of a weight whose name was shortened."""

AT_LOAD = "load"
"""What stands in place of a pass for decisions taken before the first one."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a pass decided about one candidate, and why.

    Attributes:
        where: the node or weight, by the name a user finds in the file.
        taken: True if the candidate was changed.
        reason: why; a whole phrase in the field's terms.
        figures: numbers behind the reason, e.g. ``{"sparsity": 0.8, "before_bytes": 4096}``.
    """

    where: str
    taken: bool
    reason: str
    figures: Mapping[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PassRecord:
    """What one pass of a pipeline did.

    Attributes:
        name: of the pass.
        options: those that differ from their defaults.
        changed: whether the model differs from before.
        seconds: wall-clock time.
        before_bytes: size of the model before, everything in one file.
        after_bytes: size after.
        decisions: one for every candidate.
        fidelity: error against the original right after this pass, if that was asked for:
            ``sqnr_db``, ``cosine``, ``max_error``.
    """

    name: str
    options: Mapping[str, Any]
    changed: bool
    seconds: float
    before_bytes: int
    after_bytes: int
    decisions: tuple[Decision, ...]
    fidelity: Mapping[str, float] | None = None

    @property
    def taken(self) -> int:
        """How many candidates were changed."""
        return sum(decision.taken for decision in self.decisions)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a pipeline's run says.

    Attributes:
        source: file name of the model, or "" if it was not a file.
        source_sha256: of that file, or of the serialized message.
        versions: of onnxslim-passes, onnx and onnxruntime.
        seed: of everything random.
        target: the runtime the result is meant for.
        samples: what the figures were measured on, e.g. "64 feeds of calib.npz", or "".
        passes: one record a pass, in order.
        preparations: what was decided before the first pass.
        fidelity: error of the result against the original on the samples: ``sqnr_db``,
            ``cosine``, ``max_error`` of the worst output, and ``outputs`` one by one; empty if
            the model could not be run for lack of samples.
        before: sizes of the original: ``file_bytes``, ``zstd_bytes``, ``parameters``,
            ``nonzero_parameters``, ``macs``.
        after: the same of the result.
        latency: ``reference_s``, ``candidate_s``, ``speedup``, measured in turn in one run; empty
            if nothing was measured.
        metric: a task metric of the original and the result: ``name``, ``before``, ``after``,
            ``drop`` (positive is worse), ``higher_is_better``; empty if none was asked for.
        warnings: what a user must know to read the figures rightly.
    """

    source: str
    source_sha256: str
    versions: Mapping[str, str]
    seed: int
    target: str
    samples: str
    passes: tuple[PassRecord, ...]
    preparations: tuple[Decision, ...] = ()
    fidelity: Mapping[str, Any] = field(default_factory=dict)
    before: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)
    latency: Mapping[str, Any] = field(default_factory=dict)
    metric: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """Original bytes / compressed bytes of the files."""
        return float(self.before["file_bytes"] / self.after["file_bytes"])

    def decisions(self) -> Iterator[tuple[str, Decision]]:
        """Every decision with the name of the pass that took it."""
        for decision in self.preparations:
            yield AT_LOAD, decision
        for record in self.passes:
            for decision in record.decisions:
                yield record.name, decision

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold; infinities and NaN are texts."""
        plain = jsonable(asdict(self))
        assert isinstance(plain, dict)
        return plain

    def save(self, path: str | Path, *, result: str = "result") -> None:
        """Writes the report, as JSON for programs or as one HTML page for people.

        Args:
            path: ends in one of `REPORT_SUFFIXES`.
            result: what the page calls the compressed model.

        Raises:
            UsageError: `path` ends otherwise.
            OutputError: it cannot be written.
        """
        path = Path(path)
        kind = check_report_suffix(path)
        if kind == ".html":
            # Here, so that those who want no page need not load a template engine.
            from onnxslim_passes.report.html import render_html

            text = render_html(self, result)
        else:
            text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}.") from error


def check_report_suffix(path: Path) -> str:
    """The suffix of a report's path, in lower case.

    Raises:
        UsageError: reports are not written in that format.
    """
    suffix = path.suffix.lower()
    if suffix not in REPORT_SUFFIXES:
        raise UsageError(
            f"{path}: a report is .json or .html; name a file that ends in one of them"
        )
    return suffix


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
