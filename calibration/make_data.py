"""Writes the sample files of this folder: `python calibration/make_data.py`.

Needs NumPy and scikit-learn, whose `load_digits` ships 1797 handwritten digits of 8 x 8 pixels
(UCI Optical Recognition of Handwritten Digits, test part). Every fourth image is for testing, the
rest for training and calibration.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from readers import waves
from sklearn.datasets import load_digits

HERE = Path(__file__).resolve().parent


def digits() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(train, test), each `image` float32 (N, 1, 8, 8) in [0, 1] and `labels` int64 (N,)."""
    pixels, labels = load_digits(return_X_y=True)
    image = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    test = np.arange(len(image)) % 4 == 3
    train, tested = (
        {"image": image[rows], "labels": labels[rows].astype(np.int64)} for rows in (~test, test)
    )
    return train, tested


def write_waves(folder: Path, count: int = 12) -> None:
    """One wave a file, float32 (length, 1): no batch axis, of 40 to 80 steps."""
    folder.mkdir(exist_ok=True)
    for number, feed in zip(range(count), waves(), strict=False):
        np.save(folder / f"wave_{number:02}.npy", feed["wave"][0])


def main() -> None:
    """Writes all files."""
    train, test = digits()
    for name, part in (("digits.npz", train), ("digits_test.npz", test)):
        np.savez_compressed(HERE / name, image=part["image"], labels=part["labels"])
    write_waves(HERE / "waves")


if __name__ == "__main__":
    main()
