"""How close the outputs of two models are, over all samples and without keeping any."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxslim_passes.errors import SamplesError, VerificationError
from onnxslim_passes.runtime import Array, Feed, Session

# Elements summed up at a time: few enough for the cache, and for OpenBLAS to keep to one thread,
# whose other threads cost ten times the sums.
_PIECE = 1 << 13


@dataclass(frozen=True)
class OutputFidelity:
    """How close one output is.

    Attributes:
        name: The output's name in the reference.
        sqnr_db: Signal to quantization noise, 10 log10(sum r^2 / sum (r - c)^2) in dB over all
            elements of all samples. Infinity if identical; -infinity if NaN, infinities or the
            shape differ. NaN for outputs that hold no floats.
        cosine: Cosine of the angle between all reference and all candidate values, -1 to 1. NaN
            for outputs that hold no floats.
        max_error: The largest |r - c|. NaN for outputs that hold no floats.
        agreement: The fraction of equal elements, for outputs that hold no floats; else None.
    """

    name: str
    sqnr_db: float
    cosine: float
    max_error: float
    agreement: float | None = None


@dataclass(frozen=True)
class Fidelity:
    """How close all outputs are.

    Attributes:
        outputs: One for each output, in the model's order.
        samples: The number of feeds compared.
    """

    outputs: tuple[OutputFidelity, ...]
    samples: int

    @property
    def sqnr_db(self) -> float:
        """The worst of the float outputs; without any, infinity if all agree and else NaN."""
        worst = min((o.sqnr_db for o in self._floats), default=math.nan)
        return math.inf if not self._floats and self.agreement in (None, 1.0) else worst

    @property
    def cosine(self) -> float:
        """The worst of the float outputs; without any, 1 if all agree and else NaN."""
        worst = min((o.cosine for o in self._floats), default=math.nan)
        return 1.0 if not self._floats and self.agreement in (None, 1.0) else worst

    @property
    def max_error(self) -> float:
        """The largest of the float outputs; without any, 0 if all agree and else NaN."""
        worst = max((o.max_error for o in self._floats), default=math.nan)
        return 0.0 if not self._floats and self.agreement in (None, 1.0) else worst

    @property
    def agreement(self) -> float | None:
        """The worst of the outputs that hold no floats; None if there are none."""
        return min((o.agreement for o in self.outputs if o.agreement is not None), default=None)

    @property
    def _floats(self) -> tuple[OutputFidelity, ...]:
        return tuple(o for o in self.outputs if o.agreement is None)


def compare_outputs(reference: Session, candidate: Session, feeds: Iterable[Feed]) -> Fidelity:
    """Runs both models on all feeds.

    Outputs are matched by name, or by place if the names differ. Sums are taken in float64.

    Raises:
        SamplesError: There are no feeds.
        VerificationError: The models have different numbers of outputs.
        RuntimeRefusedError: One of them does not run.
    """
    names = [spec.name for spec in reference.outputs]
    expected = ((feed, reference.run(feed)) for feed in feeds)
    return compare_results(names, reference.label, expected, candidate)


def compare_results(
    names: Sequence[str],
    label: str,
    expected: Iterable[tuple[Feed, Mapping[str, Any]]],
    candidate: Session,
) -> Fidelity:
    """Runs a model on feeds of which the results are known; errors as of `compare_outputs`.

    Args:
        names: The outputs of the reference, in order.
        label: How messages call the reference.
        expected: Feeds, and what the reference gives on each.
        candidate: The model.
    """
    pairs = _pairs(names, label, candidate)
    sums = [OutputSums(name) for name, _ in pairs]
    wanted = [spec.name for spec in candidate.inputs]
    count = 0
    for feed, known in expected:
        # A pass may have removed an input that nothing used.
        found = candidate.run({name: feed[name] for name in wanted if name in feed})
        for (left, right), output in zip(pairs, sums, strict=True):
            output.update(known[left], found[right])
        count += 1
    if count == 0:
        raise SamplesError("Outputs cannot be compared: there are no samples.")
    return Fidelity(tuple(output.result() for output in sums), count)


def _pairs(left: Sequence[str], label: str, candidate: Session) -> list[tuple[str, str]]:
    """The names of each output in both models."""
    right = [o.name for o in candidate.outputs]
    if len(left) != len(right):
        raise VerificationError(
            f"The outputs differ: {', '.join(left)} in {label}, "
            f"{', '.join(right)} in {candidate.label}."
        )
    if set(left) == set(right):
        right = list(left)
    return list(zip(left, right, strict=True))


def worst_error(outputs: Iterable["OutputSums"]) -> float:
    """The error of the worst float output, its power over that of the signal.

    0 without an output of floats or without an error, 1e300 at most.
    """
    figures = [output.result().sqnr_db for output in outputs]
    worst = min((figure for figure in figures if not math.isnan(figure)), default=math.inf)
    return float(10.0 ** min(-worst / 10, 300.0))


class OutputSums:
    """The sums of one output so far; r is the reference, c the candidate."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._rr = self._cc = self._rc = self._noise = 0.0
        self._max_error = 0.0
        self._equal = self._elements = 0
        self._float = False
        self._broken = False  # NaN, infinities or shapes differ

    def update(self, reference: Any, candidate: Any) -> None:
        """Takes in one run: arrays, or lists of arrays or dicts."""
        r, c = flatten(reference), flatten(candidate)
        if not (_is_float(r) or _is_float(c)):
            self._elements += max(r.size, c.size)
            self._equal += int(np.sum(r == c)) if r.shape == c.shape else 0
            return
        self._float = True
        if r.shape != c.shape:
            self._broken = True
            return
        r, c = r.reshape(-1), c.reshape(-1)
        for start in range(0, r.size, _PIECE):
            piece = slice(start, start + _PIECE)
            self._add(r[piece].astype(np.float64), c[piece].astype(np.float64))

    def _add(self, r: Array, c: Array) -> None:
        # NaN and infinity reach the sum of squares, and two infinities at the same place too.
        if not np.isfinite(r @ r + c @ c):
            finite = np.isfinite(r) & np.isfinite(c)
            self._broken |= not np.array_equal(r[~finite], c[~finite], equal_nan=True)
            r, c = r[finite], c[finite]
        error = r - c
        self._rr += float(r @ r)
        self._cc += float(c @ c)
        self._rc += float(r @ c)
        self._noise += float(error @ error)
        largest = max(error.max(initial=0.0), -error.min(initial=0.0))
        self._max_error = max(self._max_error, float(largest))

    def result(self) -> OutputFidelity:
        """The figures of all runs so far."""
        if not self._float:
            agreement = self._equal / self._elements if self._elements else 1.0
            return OutputFidelity(self.name, math.nan, math.nan, math.nan, agreement)
        if self._broken:
            return OutputFidelity(self.name, -math.inf, self._cosine(), math.inf)
        return OutputFidelity(self.name, self._sqnr_db(), self._cosine(), self._max_error)

    def _sqnr_db(self) -> float:
        if self._noise == 0:
            return math.inf
        # A quotient of sums may underflow to 0.
        quotient = self._rr / self._noise
        return 10 * math.log10(quotient) if quotient > 0 else -math.inf

    def _cosine(self) -> float:
        if self._noise == 0:
            return 1.0
        norm = math.sqrt(self._rr) * math.sqrt(self._cc)
        return max(-1.0, min(1.0, self._rc / norm)) if norm > 0 else 0.0


def flatten(value: Any) -> Array:
    """An output as one array.

    A list of dicts (ZipMap: a row a sample, class -> probability) becomes a matrix with its columns
    in the order of the keys; a list of arrays their values one after the other; None is empty.
    """
    if isinstance(value, Mapping):
        return flatten([value])
    if isinstance(value, list):
        rows: Sequence[Any] = value
        if rows and isinstance(rows[0], Mapping):
            rows = [np.array([row[key] for key in sorted(row)]) for row in rows]
        pieces = [flatten(row).ravel() for row in rows]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    return np.zeros(0, np.float32) if value is None else np.asarray(value)


def _is_float(array: Array) -> bool:
    """Whether the values are floats, those of ml_dtypes included (their kind is "V")."""
    return array.dtype.kind in "fcV"
