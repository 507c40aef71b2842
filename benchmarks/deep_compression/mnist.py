"""MNIST as `--training` takes it: `benchmarks/deep_compression/mnist.py:training`.

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

Array = npt.NDArray[Any]


def read(part: str) -> tuple[Array, Array]:
    """Images, float32 (N, 1, 28, 28) in 0..1 as the networks were trained, and digits, int64."""
    with np.load(FOLDER / "data" / f"mnist_{part}.npz") as data:
        return data["x"][:, None].astype(np.float32) / 256, data["y"].astype(np.int64)


def training() -> Iterator[dict[str, Array]]:
    """The 60,000 training images; the test images are not read."""
    images, digits = read("train")
    for start in range(0, len(images), 1000):
        part = slice(start, start + 1000)
        yield {"image": images[part], "labels": digits[part]}
