"""Which layers cost a compressed model its fidelity: each one alone, and all up to each one.

Three figures a layer, all signal-to-noise ratios in dB on the same samples:

- *local*: the layer's own output, everything before it float. One run of the measuring model
  gives it for all layers.
- *output*: the model's outputs with this layer compressed and all others float. It costs a load
  and a run of the model a layer, so that only the layers with the most local error are tried, on
  fewer samples. It is what ranks layers: a local error may be forgotten, or amplified, behind.
- *accumulated*: the same tensor in both models, all layers before it compressed.

What is named as a remedy is tried, too: the compressed model with those layers float again.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from onnxslim_passes.errors import SamplesError
from onnxslim_passes.evaluation.fidelity import Fidelity, OutputSums
from onnxslim_passes.evaluation.transplant import Layer, Twins
from onnxslim_passes.model import Model
from onnxslim_passes.runtime import Array, Feed, Session, open_session

__all__ = ["LayerError", "LayerErrors", "Mended", "compare_layers"]

# Samples that local and accumulated errors, and effects on the outputs, are measured on. More move
# the figures by tenths of a dB.
MEASURED_SAMPLES = 64
EFFECT_SAMPLES = 32

# A remedy names the layers that make this part of the noise, but not more of them than this.
_REMEDY_SHARE = 0.75
_REMEDY_LAYERS = 5

# Float32 reordered.
_IDENTICAL_DB = 90.0

Item = TypeVar("Item")
Feeds = Callable[[], Iterable[Feed]]


class Progress(Protocol):
    """Something that shows how far long work has come."""

    def track(self, items: Iterable[Item], label: str, total: int | None = None) -> Iterable[Item]:
        """The same items, shown as they are taken."""
        ...


class _Silent:
    def track(self, items: Iterable[Item], label: str, total: int | None = None) -> Iterable[Item]:
        return items


@dataclass(frozen=True)
class LayerError:
    """The error of one layer.

    Attributes:
        name: of its node in the reference, with the number of others in it.
        operator: of that node.
        nodes: the nodes of the reference in it that have weights, or its last one.
        weights: names of their constants.
        tensor: what it makes, by its name in the reference.
        changed: whether the two models compute it differently.
        local_db: SQNR of `tensor` if only this layer is compressed; infinite if it is not changed.
        output_db: SQNR of the model's worst output if only this layer is compressed; None if it
            was not tried.
        accumulated_db: SQNR of `tensor` in the compressed model.
    """

    name: str
    operator: str
    nodes: tuple[str, ...]
    weights: tuple[str, ...]
    tensor: str
    changed: bool
    local_db: float
    output_db: float | None
    accumulated_db: float


@dataclass(frozen=True)
class Mended:
    """What leaving some layers in float would bring.

    Attributes:
        layers: the worst ones.
        before_db: SQNR of the compressed model's worst output.
        after_db: the same with `layers` as they are in the reference.
    """

    layers: tuple[LayerError, ...]
    before_db: float
    after_db: float


@dataclass(frozen=True)
class LayerErrors:
    """All layers' errors.

    Attributes:
        layers: in the order of the reference.
        samples: how many samples local and accumulated errors were measured on.
        effect_samples: how many samples effects on the outputs were measured on.
        mended: the remedy, tried; None if no layer is changed.
    """

    layers: tuple[LayerError, ...]
    samples: int
    effect_samples: int
    mended: Mended | None

    def ranked(self) -> list[LayerError]:
        """The changed layers, the one that costs the outputs most first.

        Those whose effect was tried come first; the others follow by their local error.
        """

        def order(layer: LayerError) -> tuple[bool, float]:
            if layer.output_db is None:
                return True, layer.local_db
            return False, layer.output_db

        return sorted((layer for layer in self.layers if layer.changed), key=order)

    def falls(self, step_db: float = 1.0) -> list[LayerError]:
        """The layers behind which the accumulated SQNR is lower than ever before by `step_db`.

        In the order of the reference; what is as good as identical is no fall.
        """
        lowest, found = _IDENTICAL_DB, []
        for layer in self.layers:
            if layer.accumulated_db <= lowest - step_db:
                found.append(layer)
                lowest = layer.accumulated_db
        return found


def compare_layers(
    reference: Model,
    candidate: Model,
    feeds: Feeds,
    *,
    top: int = 16,
    progress: Progress | None = None,
) -> LayerErrors:
    """Measures all layers.

    Args:
        reference: the float model.
        candidate: what was made from it, with the same inputs.
        feeds: reads the samples from the start; the first axis of an input counts them.
        top: how many layers, those with the most local error, are tried in the whole model.
        progress: is shown the samples, then the layers.

    Raises:
        SamplesError: there are no samples.
        UnsupportedModelError: the models have nothing in common to compare.
        RuntimeRefusedError: they do not run.
    """
    shown = progress or _Silent()
    twins = Twins(reference, candidate)
    first = next(iter(feeds()), None)
    if first is None:
        raise SamplesError("Layers cannot be compared: there are no samples.")
    _part_strangers(twins, first)
    layers = [x for x in twins.layers if x.changed or x.weighted]
    measured = _Measured(twins, layers)
    few: list[Feed] = []
    count = effect_count = 0
    for feed in shown.track(_first(feeds(), MEASURED_SAMPLES), "comparing layers"):
        measured.update(feed)
        if effect_count < EFFECT_SAMPLES:
            few.append(feed)
            effect_count += _length(feed)
        count += _length(feed)
    measured.close()
    effects = _Effects(twins, reference, few)
    tried = measured.worst(top)
    found = {
        layer: effects.of([layer], "reference")
        for layer in shown.track(tried, "one layer at a time", len(tried))
    }
    errors = {layer: measured.error(layer, found.get(layer)) for layer in layers}
    return LayerErrors(
        layers=tuple(errors.values()),
        samples=count,
        effect_samples=effect_count,
        mended=_mended(effects, errors),
    )


def _first(feeds: Iterable[Feed], samples: int) -> Iterator[Feed]:
    """Feeds until there are enough samples."""
    count = 0
    for feed in feeds:
        yield feed
        count += _length(feed)
        if count >= samples:
            return


def _length(feed: Feed) -> int:
    """Samples in a feed: the length of the first axis of the first input that has one."""
    lengths = (np.shape(array)[0] for array in feed.values() if np.ndim(array))
    return max(1, next(lengths, 1))


# ---------------- tensors that only share a name

# A layer as bad as this is looked at, and held to be meant so if lines through its channels explain
# its signal as well as this, and its error.
_SUSPICIOUS_DB, _EXPLAINED_DB, _GAIN_DB = 10.0, 15.0, 10.0

# In a channel, before lines are drawn through it.
_FEWEST_VALUES = 16

# Layers looked at in one run of the models; their values are held together.
_AT_ONCE = 8


def _part_strangers(twins: Twins, feed: Feed) -> None:
    """Parts tensors whose channels are scaled in the candidate, as equalization does on purpose.

    Where one is parted, what follows from it is measured anew, from the tensors before it.
    """
    settled: set[str] = set()
    while True:
        changed = [layer for layer in twins.layers if layer.changed]
        if not changed:
            return
        with open_session(twins.probing(changed), lean=True) as session:
            sums = iter(session.run(feed).values())
            bad = [layer for layer in changed if _db(next(sums), next(sums)) < _SUSPICIOUS_DB]
        open_ones = {layer.tensor for layer in bad} - settled
        # Only what does not follow from an open one can be judged.
        now = [x for x in bad if x.tensor in open_ones and not twins.before(x) & open_ones]
        if not now:
            return
        for start in range(0, len(now), _AT_ONCE):
            few = now[start : start + _AT_ONCE]
            with open_session(twins.values(few), lean=True) as session:
                values = iter(session.run(feed).values())
            for layer in few:
                if _is_rescaled(next(values), next(values)):
                    twins.part(layer.tensor)
                else:
                    settled.add(layer.tensor)


def _is_rescaled(reference: Array, candidate: Array) -> bool:
    """Whether each channel of one is a multiple of the other's plus a constant, by and large."""
    if reference.shape != candidate.shape:
        return True
    error = float(np.sum((reference - candidate) ** 2, dtype=np.float64))
    axes = {1, reference.ndim - 1} if reference.ndim > 1 else {0}
    return any(_is_explained(reference, candidate, axis, error) for axis in axes)


def _is_explained(reference: Array, candidate: Array, axis: int, error: float) -> bool:
    """Whether the best line through each channel leaves little of the error, and of the signal."""
    shape = (reference.shape[axis], -1)
    x = np.moveaxis(reference, axis, 0).reshape(shape).astype(np.float64)
    y = np.moveaxis(candidate, axis, 0).reshape(shape).astype(np.float64)
    # With few values a channel, any two are on a line.
    if x.shape[1] < _FEWEST_VALUES:
        return False
    x = x - x.mean(axis=1, keepdims=True)
    y = y - y.mean(axis=1, keepdims=True)
    xx, xy, yy = (x * x).sum(axis=1), (x * y).sum(axis=1), (y * y).sum(axis=1)
    fit = np.divide(xy * xy, xx * yy, out=np.zeros_like(xx), where=xx * yy > 0)
    left = float(np.sum(yy * (1 - fit).clip(0)))
    # Of the reference's signal: a channel that the candidate lost is on a line, too.
    lost = float(np.sum(xx * (1 - fit).clip(0)))
    return _db(error, left) >= _GAIN_DB and _db(float(xx.sum()), lost) >= _EXPLAINED_DB


# ---------------- sums


class _Measured:
    """Local and accumulated errors, summed over feeds in float64."""

    def __init__(self, twins: Twins, layers: Sequence[Layer]) -> None:
        self._layers = list(layers)
        self._session = open_session(twins.measuring(layers), lean=True)
        self._signal = dict.fromkeys(layers, 0.0)
        self._local = dict.fromkeys(layers, 0.0)
        self._accumulated = dict.fromkeys(layers, 0.0)

    def update(self, feed: Feed) -> None:
        """Takes in one run."""
        sums = itertools.starmap(lambda _, value: float(value), self._session.run(feed).items())
        for layer in self._layers:
            self._signal[layer] += next(sums)
            self._local[layer] += next(sums) if layer.changed else 0.0
            self._accumulated[layer] += next(sums)

    def close(self) -> None:
        self._session.close()

    def worst(self, count: int) -> list[Layer]:
        """The changed layers with the most local error."""
        changed = [layer for layer in self._layers if layer.changed]
        return sorted(changed, key=lambda layer: _db(self._signal[layer], self._local[layer]))[
            :count
        ]

    def error(self, layer: Layer, output_db: float | None) -> LayerError:
        signal = self._signal[layer]
        return LayerError(
            name=layer.name,
            operator=layer.operator,
            nodes=layer.nodes,
            weights=layer.weights,
            tensor=layer.tensor,
            changed=layer.changed,
            local_db=_db(signal, self._local[layer]),
            output_db=output_db,
            accumulated_db=_db(signal, self._accumulated[layer]),
        )


def _db(signal: float, noise: float) -> float:
    """The ratio in dB; -infinity where the noise is not a number."""
    if noise == 0:
        return math.inf
    if not math.isfinite(noise) or signal == 0:
        return -math.inf
    # Sums beyond float32 (masks of -3.4e38) leave no ratio, but no error worth a name either.
    return 10 * math.log10(signal / noise) if math.isfinite(signal) else math.inf


class _Effects:
    """The outputs of hybrids against the reference's, which are kept."""

    def __init__(self, twins: Twins, reference: Model, feeds: Sequence[Feed]) -> None:
        self._twins, self._feeds = twins, feeds
        with open_session(reference) as session:
            self._expected = [session.run(feed) for feed in feeds]

    def of(self, layers: Iterable[Layer], base: Any) -> float:
        """SQNR of the worst output of a hybrid."""
        with open_session(self._twins.hybrid(layers, base)) as session:
            return self._sqnr_db(session)

    def _sqnr_db(self, session: Session) -> float:
        sums = [OutputSums(name) for name in self._expected[0]]
        for feed, expected in zip(self._feeds, self._expected, strict=True):
            found = session.run({spec.name: feed[spec.name] for spec in session.inputs})
            for output in sums:
                output.update(expected[output.name], found[output.name])
        return Fidelity(tuple(output.result() for output in sums), len(self._feeds)).sqnr_db


def _mended(effects: _Effects, errors: dict[Layer, LayerError]) -> Mended | None:
    """The fewest layers that make most of the noise, tried in float."""
    tried = [
        (layer, error)
        for layer, error in errors.items()
        if error.output_db is not None and not math.isnan(error.output_db)
    ]
    ranked = sorted(tried, key=lambda entry: entry[1].output_db)  # type: ignore[arg-type, return-value]  # those with None are left out
    noise = [10 ** (-float(error.output_db or 0.0) / 10) for _, error in ranked]
    if not any(noise):
        return None
    total, made, chosen = sum(noise), 0.0, 0
    while chosen < min(_REMEDY_LAYERS, len(ranked)) and not made >= _REMEDY_SHARE * total:
        made += noise[chosen]
        chosen += 1
    return Mended(
        layers=tuple(error for _, error in ranked[:chosen]),
        before_db=effects.of([], "candidate"),
        after_db=effects.of([layer for layer, _ in ranked[:chosen]], "candidate"),
    )
