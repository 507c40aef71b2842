"""Labelled batches: samples in memory, grouped by shape, split and shuffled by a seed.

Data that differs from epoch to epoch (`Samples.has_epochs`), such as images distorted at random, is
read anew for each; a sample keeps its place, so that none moves between training and validation.

Samples are single rows of the user's feeds where all inputs count samples along their first axis,
and whole feeds otherwise (a recurrent state, a batch that the model fixes). Rows of unlike shapes,
such as lines of text of other widths, never share a batch.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onnxslim_passes.calibration import Samples
from onnxslim_passes.errors import SamplesError, UsageError
from onnxslim_passes.runtime import InputSpec
from onnxslim_passes.training.losses import LabelSpec
from onnxslim_passes.training.parameters import Array

__all__ = ["Batch", "TrainingData", "check_labels"]


@dataclass(frozen=True)
class Batch:
    """One step's worth.

    Attributes:
        feed: arrays by input name, `labels` not among them.
        labels: or None.
        count: samples in it.
    """

    feed: dict[str, Array]
    labels: Array | None
    count: int


@dataclass
class _Block:
    """Samples of one shape.

    Attributes:
        arrays: by input name; the first axis counts samples, unless it is one whole feed.
        labels: or None.
        count: rows that can be picked: samples, or 1 for a whole feed.
        samples: how many samples it stands for.
        whole: whether it is one feed that cannot be cut.
    """

    arrays: dict[str, Array]
    labels: Array | None
    count: int
    samples: int
    whole: bool

    def batch(self, rows: Array) -> Batch:
        """Some of its rows, in that order."""
        if self.whole:
            return Batch(self.arrays, self.labels, self.samples)
        labels = None if self.labels is None else self.labels[rows]
        return Batch({name: array[rows] for name, array in self.arrays.items()}, labels, len(rows))

    def signature(self) -> object:
        """What must be the same of the block in every epoch."""
        return self.count, self.samples, _signature(self.arrays, self.labels)


@dataclass(frozen=True)
class TrainingData:
    """Samples to train or to validate on.

    Attributes:
        name: what messages call them.
        rows: for each block the rows that belong to it, ascending.
    """

    name: str
    _blocks: tuple[_Block, ...]
    rows: tuple[Array, ...] = field(default=())
    _anew: Callable[[int], tuple[_Block, ...]] | None = field(default=None, repr=False)

    @classmethod
    def read(cls, samples: Samples, inputs: Sequence[InputSpec]) -> "TrainingData":
        """Reads all samples into memory.

        Args:
            samples: the user's data.
            inputs: of the model.

        Raises:
            SamplesError: they do not fit the model, or some have labels and some have none.
        """
        blocks = _blocks(samples, inputs)
        anew = (
            (lambda epoch: _blocks(samples.in_epoch(epoch), inputs)) if samples.has_epochs else None
        )
        return cls(samples.name, blocks, tuple(np.arange(b.count) for b in blocks), anew)

    def in_epoch(self, epoch: int) -> "TrainingData":
        """The same samples as one epoch of training sees them, from 1.

        Raises:
            SamplesError: they are not as many, or not of the same shapes, as outside of training.
        """
        if self._anew is None:
            return self
        blocks = self._anew(epoch)
        found, wanted = ([block.signature() for block in held] for held in (blocks, self._blocks))
        if found != wanted:
            raise SamplesError(
                f"{self.name}: epoch {epoch} has other samples than epoch 0; a function with an "
                "argument epoch must yield as many, in the same order and of the same shapes."
            )
        return replace(self, _blocks=blocks)

    @property
    def count(self) -> int:
        """How many samples."""
        return sum(
            block.samples if block.whole and len(rows) else len(rows)
            for block, rows in zip(self._blocks, self.rows, strict=True)
        )

    @property
    def label_dtype(self) -> np.dtype[np.generic] | None:
        """Element type of the labels, or None without."""
        labels = self._blocks[0].labels
        return None if labels is None else labels.dtype

    def constant_scalars(self) -> dict[str, Array]:
        """Inputs of rank 0 that have the same value in all samples."""
        first = self._blocks[0].arrays
        return {
            name: array
            for name, array in first.items()
            if array.ndim == 0
            and all(np.array_equal(block.arrays[name], array) for block in self._blocks)
        }

    def shapes(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """The shapes of the arrays of every block."""
        for block in self._blocks:
            yield {name: array.shape for name, array in block.arrays.items()}

    def with_labels_as(self, spec: LabelSpec) -> "TrainingData":
        """The data with its labels in the element type and rank of `spec`.

        Raises:
            SamplesError: the labels do not fit; the message says how.
        """

        def fitted(blocks: tuple[_Block, ...]) -> tuple[_Block, ...]:
            return tuple(
                replace(b, labels=check_labels(b.labels, spec, self.name, whole=b.whole))
                for b in blocks
            )

        read = self._anew
        anew = None if read is None else (lambda epoch: fitted(read(epoch)))
        return replace(self, _blocks=fitted(self._blocks), _anew=anew)

    def split(self, share: float, seed: int) -> tuple["TrainingData", "TrainingData | None"]:
        """Two parts, the second with about `share` of the samples and at least one.

        It is None for a share of 0, and where there is a single sample.

        Raises:
            UsageError: one of them would be empty.
        """
        places = [(b, int(row)) for b, rows in enumerate(self.rows) for row in rows]
        if share == 0 or len(places) < 2:
            return self, None
        held = max(1, round(share * len(places)))
        if held >= len(places):
            raise UsageError(
                f"validation_split={share:g} of {len(places)} samples leaves none to train on; "
                "give more data, or validation_split=0."
            )
        order = np.random.default_rng([seed, _SPLIT]).permutation(len(places))
        chosen = {places[index] for index in order[:held]}
        parts = [
            tuple(
                np.array([row for row in rows if ((b, int(row)) in chosen) == wanted], np.int64)
                for b, rows in enumerate(self.rows)
            )
            for wanted in (False, True)
        ]
        return replace(self, rows=parts[0]), replace(self, rows=parts[1])

    def batch_size(self, wanted: int | None) -> int:
        """How many samples a batch has: as wanted, or by default 32, or all if there are fewer.

        Raises:
            UsageError: more are wanted than there are.
        """
        if wanted is None:
            return min(_DEFAULT_BATCH, self.count)
        whole = any(block.whole for block in self._blocks)
        if not whole and wanted > self.count:
            raise UsageError(
                f"batch_size {wanted} is more than the {self.count} samples of {self.name} "
                f"that are left to train on; use {self.count} or less."
            )
        return wanted

    def batches(self, batch_size: int, seed: int, epoch: int) -> list[tuple[int, Array]]:
        """The batches of an epoch: a block and its rows each; `batch` makes one of them.

        The order depends on `seed` and `epoch` only, so that a run can begin in the middle.
        """
        random = np.random.default_rng([seed, _SHUFFLE, epoch])
        cut = []
        for place, (block, rows) in enumerate(zip(self._blocks, self.rows, strict=True)):
            mixed = random.permutation(rows)
            size = 1 if block.whole else batch_size
            cut += [(place, mixed[at : at + size]) for at in range(0, len(mixed), size)]
        return [cut[index] for index in random.permutation(len(cut))]

    def in_order(self, batch_size: int) -> list[tuple[int, Array]]:
        """The batches in the order of the data."""
        cut = []
        for place, (block, rows) in enumerate(zip(self._blocks, self.rows, strict=True)):
            size = 1 if block.whole else batch_size
            cut += [(place, rows[at : at + size]) for at in range(0, len(rows), size)]
        return cut

    def batch(self, place: tuple[int, Array]) -> Batch:
        """The arrays of a batch."""
        block, rows = place
        return self._blocks[block].batch(rows)


_DEFAULT_BATCH = 32
# Streams of random numbers that have nothing to do with each other.
_SPLIT, _SHUFFLE = 1, 2


def _blocks(samples: Samples, inputs: Sequence[InputSpec]) -> tuple[_Block, ...]:
    """Reads all samples; see `TrainingData.read`."""
    cut = _can_be_cut(inputs)
    groups: dict[object, list[tuple[dict[str, Array], Array | None]]] = defaultdict(list)
    blocks = []
    for feed, labels in samples.examples(inputs):
        rows = _rows(feed, labels) if cut else None
        if rows is None:
            size = _samples(feed, labels)
            blocks.append(_Block(feed, labels, count=1, samples=size, whole=True))
        else:
            groups[_signature(feed, labels)].append((feed, labels))
    blocks += [_joined(parts) for parts in groups.values()]
    if len({block.labels is None for block in blocks}) > 1:
        raise SamplesError(f"{samples.name}: some samples have labels and some have none.")
    return tuple(blocks)


def _can_be_cut(inputs: Sequence[InputSpec]) -> bool:
    """Whether all inputs have a free first axis."""
    return all(spec.shape and not isinstance(spec.shape[0], int) for spec in inputs)


def _rows(feed: Mapping[str, Array], labels: Array | None) -> int | None:
    """The number of samples, where all arrays agree on it along their first axis."""
    arrays = [*feed.values(), *([] if labels is None else [labels])]
    counts = {array.shape[0] if array.ndim else -1 for array in arrays}
    return counts.pop() if len(counts) == 1 and -1 not in counts else None


def _samples(feed: Mapping[str, Array], labels: Array | None) -> int:
    """How many samples a feed stands for that cannot be cut."""
    if labels is not None and labels.ndim:
        return int(labels.shape[0])
    return next((int(array.shape[0]) for array in feed.values() if array.ndim), 1)


def _signature(feed: Mapping[str, Array], labels: Array | None) -> object:
    shapes = [(name, array.shape[1:], array.dtype.str) for name, array in sorted(feed.items())]
    return (tuple(shapes), None if labels is None else (labels.shape[1:], labels.dtype.str))


def _joined(parts: Sequence[tuple[dict[str, Array], Array | None]]) -> _Block:
    arrays = {name: np.concatenate([feed[name] for feed, _ in parts]) for name in parts[0][0]}
    given = [labels for _, labels in parts if labels is not None]
    labels = np.concatenate(given) if given else None
    count = len(next(iter(arrays.values())))
    return _Block(arrays, labels, count=count, samples=count, whole=False)


def check_labels(labels: Array | None, spec: LabelSpec, name: str, *, whole: bool) -> Array:
    """The labels as the loss takes them.

    Args:
        labels: as the user gave them, the first axis counts samples.
        spec: what is expected.
        name: of the data, for messages.
        whole: they belong to one feed, so that sizes of the first axis are compared, too.

    Returns:
        The same numbers in the element type of `spec`; axes of length 1 are added or dropped.

    Raises:
        SamplesError: they are missing, of another kind or shape, or out of range.
    """
    if labels is None:
        raise SamplesError(f"{name}: the loss needs labels; add an array 'labels'.")
    wanted = f"{spec.what}: {spec.dtype} {_shape_text(spec.shape)}"
    numbers = labels.dtype.kind in "iub" or (labels.dtype.kind == "f" and spec.dtype != "int64")
    if not numbers:
        raise SamplesError(f"{name}: 'labels' are {labels.dtype.name}, expected {wanted}.")
    fitted = _fitted(labels, spec.shape)
    if fitted is None:
        raise SamplesError(f"{name}: 'labels' have shape {labels.shape}, expected {wanted}.")
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise SamplesError(f"{name}: 'labels' hold NaN or infinite values.")
    if spec.classes is not None and fitted.size:
        low, high = int(fitted.min()), int(fitted.max())
        if low < spec.lowest or high >= spec.classes:
            raise SamplesError(
                f"{name}: 'labels' run from {low} to {high}, but the model has {spec.classes} "
                f"classes; expected numbers from {spec.lowest} to {spec.classes - 1}."
            )
    return fitted.astype(spec.dtype)


def _fitted(labels: Array, shape: tuple[int | str, ...]) -> Array | None:
    """Labels with the wanted rank, or None if their sizes are others."""
    if labels.ndim != len(shape):
        kept = [size for size in labels.shape[1:] if size != 1]
        free = [size for size in shape[1:] if size != 1]
        if labels.ndim == 0 or len(kept) != len(free):
            return None
        sizes = iter(kept)
        tail = [1 if size == 1 else next(sizes) for size in shape[1:]]
        labels = labels.reshape(labels.shape[0], *tail) if shape else labels
    pairs = zip(labels.shape[1:], shape[1:], strict=True)
    same = all(not isinstance(size, int) or found == size for found, size in pairs)
    return labels if same else None


def _shape_text(shape: tuple[int | str, ...]) -> str:
    return "(" + ", ".join(str(size) for size in shape) + ")"
