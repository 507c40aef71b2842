"""Made-up inputs, for smoke tests: the figures that come of them mean nothing.

Floats are standard normal, integers 0 or 1 (valid as token ids, masks and indices), booleans true,
strings "text". Axes of free length are guessed, axes of one name alike.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from onnxslim_passes.errors import SamplesError
from onnxslim_passes.runtime import Array, InputSpec

Shapes = dict[str, tuple[int, ...]]

# (height, width) of images and lengths of sequences; the commoner first.
_SPATIAL = ((64, 64), (224, 224), (48, 192), (32, 32), (28, 28), (256, 256), (299, 299), (1, 1))
_LENGTHS = (16, 1, 64, 128, 512, 576)
_BATCHES = (1, 2)
_CHANNELS = 3


def shape_guesses(inputs: Sequence[InputSpec]) -> Iterator[Shapes]:
    """Yields different shapes for all inputs, the likeliest first; at least one.

    Raises:
        SamplesError: An input is not a tensor.
    """
    for spec in inputs:
        if spec.dtype is None:
            raise SamplesError(
                f"Random inputs cannot be made for input {spec.name!r} ({spec.type}); "
                "give calibration data."
            )
    seen: list[Shapes] = []
    images = any(len(s.shape) >= 4 and None in _free(s.shape[1:]) for s in inputs)
    first: tuple[tuple[int, int], ...] = _SPATIAL if images else _SPATIAL[:1]
    for batch, length, spatial in product(_BATCHES, _LENGTHS, first):
        named: dict[str, int] = {}
        shapes = {s.name: _shape(s, batch, length, spatial, named) for s in inputs}
        if shapes not in seen:
            seen.append(shapes)
            yield shapes


def _free(shape: Sequence[int | str | None]) -> list[None]:
    return [None for d in shape if not isinstance(d, int)]


def _shape(
    spec: InputSpec, batch: int, length: int, spatial: tuple[int, int], named: dict[str, int]
) -> tuple[int, ...]:
    """One guess for one input; `named` keeps the lengths given to named axes."""
    result = []
    for axis, dim in enumerate(spec.shape):
        if isinstance(dim, int):
            result.append(dim)
            continue
        guess = _guess(spec.shape, axis, batch, length, spatial)
        result.append(named.setdefault(dim, guess) if dim is not None else guess)
    return tuple(result)


def _guess(
    shape: Sequence[int | str | None], axis: int, batch: int, length: int, spatial: tuple[int, int]
) -> int:
    """The length of one free axis."""
    dim, rank = shape[axis], len(shape)
    if axis == 0 or (isinstance(dim, str) and "batch" in dim.lower()):
        return batch
    if rank < 4:
        return length
    channels_last = isinstance(shape[-1], int) and not isinstance(shape[1], int)
    channel_axis = rank - 1 if channels_last else 1
    if axis == channel_axis:
        return _CHANNELS
    last = channel_axis - 1 if channels_last else rank - 1
    return spatial[1] if axis == last else spatial[0]


def random_feeds(
    inputs: Sequence[InputSpec], shapes: Shapes, seed: int, count: int
) -> Iterator[dict[str, Array]]:
    """Yields `count` feeds of the given shapes; the same for the same seed."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        yield {spec.name: _values(spec, shapes[spec.name], generator) for spec in inputs}


def _values(spec: InputSpec, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    dtype = spec.dtype
    assert dtype is not None  # shape_guesses has refused the others
    if dtype.hasobject:
        return np.full(shape, "text", dtype)
    if dtype.kind == "b":
        return np.ones(shape, dtype)
    if dtype.kind in "iu":
        return generator.integers(0, 2, shape).astype(dtype)
    return np.asarray(generator.standard_normal(shape)).astype(dtype)
