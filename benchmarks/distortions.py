"""Samples that differ from epoch to epoch: few are given, and a teacher can label any."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxslim_passes.calibration import Samples

Array = npt.NDArray[Any]
Feed: TypeAlias = dict[str, Array]
Distortion: TypeAlias = Callable[[Sequence[Feed], np.random.Generator], list[Feed]]

_SHIFT = 4


def distorted_samples(feeds: Sequence[Feed], distort: Distortion, name: str) -> Samples:
    """The feeds as they are outside of training, and distorted anew in each epoch."""

    def in_epoch(epoch: int) -> Sequence[Feed]:
        return distort(feeds, np.random.default_rng(epoch)) if epoch else feeds

    return Samples.from_feeds(in_epoch, name=name)


def moved_photographs(feeds: Sequence[Feed], random: np.random.Generator) -> list[Feed]:
    """Small photographs `image`, (N, height, width, 3), shifted by up to 4 pixels, half mirrored.

    The border is reflected, as usual for CIFAR (He et al. 2016, section 4.2, has zeros there).
    """
    moved = []
    for feed in feeds:
        images = feed["image"]
        padded = np.pad(images, ((0, 0), (_SHIFT, _SHIFT), (_SHIFT, _SHIFT), (0, 0)), "reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[1:3], axis=(1, 2))
        top, left = random.integers(0, 2 * _SHIFT + 1, (2, len(images)))
        chosen = np.moveaxis(windows[np.arange(len(images)), top, left], 1, -1)
        mirrored = random.random(len(images)) < 0.5
        turned = np.where(mirrored[:, None, None, None], chosen[:, :, ::-1], chosen)
        moved.append({**feed, "image": turned})
    return moved


def joined_lines(feeds: Sequence[Feed], random: np.random.Generator) -> list[Feed]:
    """Lines of text `x`, (1, 3, height, width): each continued by another from a random place.

    Brightness, contrast and height differ, too. Widths stay.
    """
    lines = [feed["x"] for feed in feeds]
    joined = []
    for line in lines:
        other = lines[random.integers(len(lines))]
        width = line.shape[-1]
        cut = int(random.integers(width // 4, width))
        rest = np.resize(np.arange(other.shape[-1]) + random.integers(other.shape[-1]), width - cut)
        mixed = np.concatenate([line[..., :cut], other[..., rest % other.shape[-1]]], axis=-1)
        mixed = np.roll(mixed, (random.integers(-3, 4), random.integers(width)), axis=(-2, -1))
        contrast, brightness = random.uniform(0.7, 1.2), random.normal(0, 0.1)
        noise = random.normal(0, random.uniform(0, 0.1), (1, 1, *mixed.shape[2:]))
        joined.append({"x": np.clip(mixed * contrast + brightness + noise, -1, 1).astype("f")})
    return joined
