"""Samples: checked feeds for a model, from whatever the user has.

Example:
    samples = Samples.open("calib.npz")
    samples.check(session.inputs)  # every name, type, shape and value, before any work
    for feed in samples.feeds(session.inputs):
        session.run(feed)
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxslim_passes.calibration.random_inputs import random_feeds, shape_guesses
from onnxslim_passes.calibration.readers import (
    LABELS,
    Feeds,
    FeedsReader,
    FolderReader,
    FunctionReader,
    Item,
    NpzReader,
    Reader,
)
from onnxslim_passes.errors import RuntimeRefusedError, SamplesError, nearest
from onnxslim_passes.evaluation.functions import is_function_spec
from onnxslim_passes.runtime import Array, InputSpec, Session

Feed = dict[str, Array]


class Samples:
    """Feeds that can be read again and again, one at a time.

    Make one with `open`, `from_feeds`, `random` or `runnable_random`.

    Attributes:
        name: What messages call them.
        is_random: True if they are made up, so that figures on them mean nothing.
        count: How many there are: samples of an `.npz`, files of a folder, feeds of a function.
            None until they were read to the end once, e.g. by `check`.
        feed_count: How many feeds they make; None likewise.
    """

    def __init__(self, reader: Reader, *, is_random: bool = False, trusted: bool = False) -> None:
        self._reader = reader
        self._trusted = trusted
        self._checked: tuple[InputSpec, ...] | None = None
        self.name = reader.name
        self.is_random = is_random
        self.count: int | None = None
        self.feed_count: int | None = None

    @classmethod
    def open(cls, spec: str | Path, *, batch_size: int = 16) -> "Samples":
        """Opens data by its name.

        Args:
            spec: An `.npz` with an array for each input, whose first axis counts samples; a folder
                of `.npz` or `.npy` files, a sample each; or `file.py:function`, a generator of
                `{input name: array}`. Arrays called `labels` are not fed. A function with an
                argument `epoch` may yield other samples in each epoch of training; see `in_epoch`.
            batch_size: Samples a feed, where the model leaves the batch free and the arrays of an
                `.npz` have the rank of the model's inputs.

        Raises:
            SamplesError: There is no such file, folder or function.
        """
        text, path = str(spec), Path(spec)
        if batch_size < 1:
            raise SamplesError(f"batch_size is {batch_size}; expected 1 or more.")
        if path.is_dir():
            return cls(FolderReader(path))
        if path.is_file() and path.suffix != ".py":
            if path.suffix != ".npz":
                raise SamplesError(
                    f"{text}: expected an .npz file, a folder or file.py:function, "
                    f"got a {path.suffix or 'file without suffix'} file."
                )
            return cls(NpzReader(path, batch_size))
        if is_function_spec(text):
            return cls(FunctionReader(text))
        if path.suffix == ".py":
            raise SamplesError(f"{text}: which function? Write {text}:function.")
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise SamplesError(
            f"{text}: no such file or folder.{nearest(path.name, siblings)} Expected an .npz file, "
            "a folder or file.py:function."
        )

    @classmethod
    def from_feeds(
        cls, feeds: Feeds | Callable[..., Feeds], *, name: str = "feeds", trusted: bool = False
    ) -> "Samples":
        """Takes feeds `{input name: array}`.

        Args:
            feeds: A list, or a callable that makes a fresh iterable. A callable with an argument
                `epoch` may make other feeds for each; see `in_epoch`.
            name: What messages call them.
            trusted: They come from the runtime: nothing is checked, and they may hold NaN.
        """
        return cls(FeedsReader(feeds, name), trusted=trusted)

    @classmethod
    def random(cls, inputs: Sequence[InputSpec], *, seed: int = 0, count: int = 8) -> "Samples":
        """Makes up `count` feeds of the first guess of shapes; see `random_inputs`."""
        return cls._made_up(inputs, next(shape_guesses(inputs)), seed, count)

    @classmethod
    def runnable_random(cls, session: Session, *, seed: int = 0, count: int = 8) -> "Samples":
        """Makes up feeds of the first guess of shapes that the model runs with.

        Raises:
            SamplesError: It runs with none of them.
        """
        tried, last = 0, ""
        for shapes in shape_guesses(session.inputs):
            samples = cls._made_up(session.inputs, shapes, seed, count)
            try:
                session.run(next(samples.feeds(session.inputs)))
            except RuntimeRefusedError as error:
                tried, last = tried + 1, str(error)
                continue
            return samples
        raise SamplesError(
            f"Random inputs cannot be made for this model: it ran with none of {tried} guesses of "
            f"shapes. Give calibration data. The last error was: {last}"
        )

    @classmethod
    def _made_up(
        cls, inputs: Sequence[InputSpec], shapes: dict[str, tuple[int, ...]], seed: int, count: int
    ) -> "Samples":
        reader = FeedsReader(lambda: random_feeds(inputs, shapes, seed, count), "random inputs")
        return cls(reader, is_random=True)

    def check(self, inputs: Sequence[InputSpec]) -> None:
        """Reads all of them once and holds each against the model's inputs.

        Raises:
            SamplesError: There are none; an input is missing or unknown; its type, rank or a fixed
                axis differs; it holds NaN or infinity. The message names the input and what was
                expected.
        """
        if self._checked == tuple(inputs):
            return
        for _ in self._items(inputs):
            pass
        self._checked = tuple(inputs)

    def feeds(self, inputs: Sequence[InputSpec], *, most: int | None = None) -> Iterator[Feed]:
        """Yields checked feeds from the start; see `check` for the errors.

        Args:
            inputs: What the model takes.
            most: With more feeds than this, as many evenly spread ones, the first among them.
        """
        total = 0 if most is None else self._total(inputs)
        for index, item in enumerate(self._items(inputs)):
            if most is None or total <= most or index * most % total < most:
                yield dict(item.arrays)

    def _total(self, inputs: Sequence[InputSpec]) -> int:
        """How many feeds there are; reads them unless that is known."""
        if self.feed_count is None:
            self.check(inputs)
        return self.feed_count or 0

    def labelled(self, inputs: Sequence[InputSpec]) -> Iterator[tuple[Feed, Array]]:
        """Yields checked feeds with their labels.

        Raises:
            SamplesError: As `check`; or the data has no labels.
        """
        for item in self._items(inputs):
            if item.labels is None:
                raise SamplesError(
                    f"{item.where}: labels are needed; add an array {LABELS!r} to the data."
                )
            yield dict(item.arrays), item.labels

    def examples(self, inputs: Sequence[InputSpec]) -> Iterator[tuple[Feed, Array | None]]:
        """Yields checked feeds with their labels, or None where the data has none."""
        for item in self._items(inputs):
            yield dict(item.arrays), item.labels

    @property
    def has_epochs(self) -> bool:
        """Whether the data may differ from one epoch of training to the next."""
        return isinstance(self._reader, FunctionReader | FeedsReader) and self._reader.has_epochs

    def in_epoch(self, epoch: int) -> "Samples":
        """The samples as one epoch of training sees them, themselves unless `has_epochs`.

        Args:
            epoch: From 1; 0 is what everything but training sees.
        """
        if isinstance(self._reader, FunctionReader | FeedsReader) and self._reader.has_epochs:
            return Samples(self._reader.in_epoch(epoch), trusted=self._trusted)
        return self

    def fingerprint(self) -> str:
        """A SHA-256 over the data, 64 hexadecimal digits; the same data gives the same."""
        return self._reader.digest()

    def _items(self, inputs: Sequence[InputSpec]) -> Iterator[Item]:
        specs = {spec.name: spec for spec in inputs}
        count = feed_count = 0
        for item in self._reader.items(inputs):
            yield item if self._trusted else _checked(item, specs)
            count += item.samples
            feed_count += 1
        if count == 0:
            raise SamplesError(f"{self.name}: holds no samples; at least one is needed.")
        self.count, self.feed_count = count, feed_count

    def __repr__(self) -> str:
        return f"Samples({self.name!r})"


def _checked(item: Item, specs: dict[str, InputSpec]) -> Item:
    """The item with its arrays in native form, in the order of the model's inputs."""
    for name in item.arrays:
        if name not in specs:
            raise SamplesError(
                f"{item.where}: {name!r} is not an input of the model"
                f"{nearest(str(name), specs) or '.'} "
                f"It has: {', '.join(f'{n}: {s}' for n, s in specs.items()) or 'none'}."
            )
    arrays = {}
    for name, spec in specs.items():
        if name not in item.arrays:
            raise SamplesError(
                f"{item.where}: input {name!r} of the model is missing; expected {spec}."
            )
        value = item.arrays[name]
        arrays[name] = value if spec.dtype is None else _array(value, spec, item.where)
    return Item(item.where, arrays, item.labels, item.samples)


def _array(value: Any, spec: InputSpec, where: str) -> Array:
    """The value as the model takes it; nothing is cast."""
    assert spec.dtype is not None
    array = np.asarray(value)
    place = f"{where}: input {spec.name!r}"
    if array.dtype.kind == "V" and array.dtype.itemsize == spec.dtype.itemsize:
        array = array.view(spec.dtype)  # .npy files forget the names of bfloat16 and float8
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    same = array.dtype.kind in "OSU" if spec.dtype.hasobject else array.dtype == spec.dtype
    if not same:
        found = type(value).__name__ if array.dtype.hasobject else array.dtype.name
        raise SamplesError(
            f"{place} is {found}, expected {spec}; convert the data, it is not cast silently."
        )
    if spec.shape:
        _check_shape(array.shape, spec, place)
    if array.dtype.kind in "fcV" and not np.isfinite(array).all():
        bad = int(np.size(array) - np.isfinite(array).sum())
        raise SamplesError(
            f"{place} holds {bad} values that are NaN or infinite, out of {array.size}; "
            "all must be finite."
        )
    return array


def _check_shape(shape: tuple[int, ...], spec: InputSpec, place: str) -> None:
    """Rank and fixed axes."""
    if len(shape) != len(spec.shape):
        raise SamplesError(
            f"{place} has {len(shape)} axes, shape {shape}; expected {len(spec.shape)}: {spec}."
        )
    for axis, (found, wanted) in enumerate(zip(shape, spec.shape, strict=True)):
        if isinstance(wanted, int) and found != wanted:
            raise SamplesError(
                f"{place} has length {found} along axis {axis}, shape {shape}; expected {spec}."
            )
