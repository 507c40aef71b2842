"""MNIST as `--training` takes it: `benchmarks/deep_compression/mnist.py:training`.

In each epoch the images are distorted anew, each in its own way: networks of this size know the
training images by heart, and have nothing to learn from them a second time (Simard, Steinkraus and
Platt 2003, Best Practices for Convolutional Neural Networks Applied to Visual Document Analysis).

The folder of models is that of the environment variable MODELS, by default ../shared/models beside
the repository.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("MODELS", ROOT / "../shared/models"))
SIDE = 28
PART = 100

# How far images are distorted: standard deviations, but for the largest shift.
SHIFT_PIXELS = 0.5
ROTATION = 0.06
STRETCH = 0.05
ELASTIC_PIXELS = 0.5
ELASTIC_KNOTS = 6

Array = npt.NDArray[Any]


def read(part: str) -> tuple[Array, Array]:
    """Images, float32 (N, 1, 28, 28) in 0..1 as the networks were trained, and digits, int64."""
    with np.load(FOLDER / "data" / f"mnist_{part}.npz") as data:
        return data["x"][:, None].astype(np.float32) / 256, data["y"].astype(np.int64)


def training(epoch: int) -> Iterator[dict[str, Array]]:
    """The 60,000 training images, as they are in epoch 0; the test images are not read."""
    images, digits = read("train")
    random = np.random.default_rng(epoch)
    for start in range(0, len(images), PART):
        part = images[start : start + PART]
        seen = distorted(part, random) if epoch else part
        yield {"image": seen, "labels": digits[start : start + PART]}


def distorted(images: Array, random: np.random.Generator) -> Array:
    """Images shifted, turned, stretched, sheared and bent, each at random.

    Args:
        images: float32 (N, 1, 28, 28).
        random: where chance comes from.

    Returns:
        Likewise; each pixel interpolated between the four around the place it comes from, and 0
        where that is outside.
    """
    count = len(images)
    places = _affine(count, random) + _elastic(count, random)
    # One pixel of black around all, so that every place has four neighbours.
    side = SIDE + 2
    pixels = np.pad(images[:, 0], ((0, 0), (1, 1), (1, 1))).reshape(-1)
    np.clip(places + 1, 0, SIDE + 0.999, out=places)
    low = places.astype(np.int32)
    row, column = np.moveaxis(places - low.astype(np.float32), 1, 0)
    first = np.arange(count, dtype=np.int32)[:, None, None] * side**2
    corner = first + low[:, 0] * side + low[:, 1]
    upper, lower = (
        pixels[at] + column * (pixels[at + 1] - pixels[at]) for at in (corner, corner + side)
    )
    return np.asarray(upper + row * (lower - upper))[:, None]


def _affine(count: int, random: np.random.Generator) -> Array:
    """Where pixels come from under linear maps about the centre: float32 (count, 2, 28, 28)."""
    angle = random.normal(0, ROTATION, count)
    maps = np.eye(2) + random.normal(0, STRETCH, (count, 2, 2))
    turns = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    maps = np.einsum("ijn,njk->nik", turns, maps).astype(np.float32)
    centre = np.float32((SIDE - 1) / 2)
    grid = np.mgrid[:SIDE, :SIDE].reshape(2, -1) - centre
    shifts = centre + random.uniform(-SHIFT_PIXELS, SHIFT_PIXELS, (count, 2, 1))
    places = maps @ grid.astype(np.float32) + shifts.astype(np.float32)
    return places.reshape(count, 2, SIDE, SIDE)


def _elastic(count: int, random: np.random.Generator) -> Array:
    """Smooth displacements in pixels: float32 (count, 2, 28, 28)."""
    knots = random.normal(0, 1, (count, 2, ELASTIC_KNOTS, ELASTIC_KNOTS)).astype(np.float32)
    distance = np.linspace(0, ELASTIC_KNOTS - 1, SIDE)[:, None] - np.arange(ELASTIC_KNOTS)
    weights = np.exp(-(distance**2)).astype(np.float32)
    weights /= np.sqrt((weights**2).sum(axis=1, keepdims=True))
    return np.float32(ELASTIC_PIXELS) * (weights @ knots @ weights.T)
