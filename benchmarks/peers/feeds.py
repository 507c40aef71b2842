"""Feeds as files, so that every tool reads the same samples: a folder with an .npz for each."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Feed = dict[str, npt.NDArray[Any]]


def save_feeds(folder: Path, feeds: Iterable[Mapping[str, npt.NDArray[Any]]]) -> None:
    """Writes each feed, in order; the folder must be empty or new."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, feed in enumerate(feeds):
        arrays: dict[str, Any] = dict(feed)
        np.savez(folder / f"{index:04}.npz", **arrays)


def read_feeds(folder: Path) -> Iterator[Feed]:
    """Reads them one at a time."""
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            yield dict(arrays)
