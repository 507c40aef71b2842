"""Sample readers to copy: each function yields samples for `--calibration readers.py:FUNCTION`.

A reader is a function without required arguments that yields one feed after the other: a
dictionary from the model's input name to an array with the dtype and rank the model wants. Batches
may differ in size and, where the model allows it, in length. `labels` (int64, one a sample) is
needed for metrics such as `top1` and for losses, not for calibration.

The digits come from the `.npz` files beside this script; waves and sentences are computed here.
Only NumPy is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
BATCH = 32

Feed = dict[str, np.ndarray]

# ---------------- digits: one stored layout, converted to what each model wants


def _digits(name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches (image, labels) of a stored file: float32 (N, 1, 8, 8) in [0, 1], int64 (N,)."""
    with np.load(HERE / name, allow_pickle=False) as data:
        image, labels = data["image"], data["labels"]
    for start in range(0, len(image), BATCH):
        yield image[start : start + BATCH], labels[start : start + BATCH]


def digits_nhwc() -> Iterator[Feed]:
    """Training images with the channel axis last, as TensorFlow and JAX have it: (N, 8, 8, 1)."""
    for image, _ in _digits("digits.npz"):
        yield {"image": np.ascontiguousarray(image.transpose(0, 2, 3, 1))}


def digits_nhwc_test() -> Iterator[Feed]:
    """Test images (N, 8, 8, 1) with labels."""
    for image, labels in _digits("digits_test.npz"):
        yield {"image": np.ascontiguousarray(image.transpose(0, 2, 3, 1)), "labels": labels}


def digits_flat() -> Iterator[Feed]:
    """Training images as rows of 64 features, as scikit-learn has them: (N, 64)."""
    for image, _ in _digits("digits.npz"):
        yield {"features": image.reshape(len(image), 64)}


def digits_flat_test() -> Iterator[Feed]:
    """Test images (N, 64) with labels."""
    for image, labels in _digits("digits_test.npz"):
        yield {"features": image.reshape(len(image), 64), "labels": labels}


# ---------------- waves: batches of different lengths

WAVE_KINDS = ("sine", "square", "sawtooth", "chirp")


def wave(kind: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """One noisy wave of WAVE_KINDS[kind]: float32 (length, 1), amplitude 0.5 to 1.5."""
    period = rng.uniform(10, 20)  # in steps, so the shortest wave holds at least two periods
    phase = rng.uniform(0, 1) + np.arange(length) / period
    if WAVE_KINDS[kind] == "chirp":  # the frequency grows threefold from start to end
        phase += np.arange(length) ** 2 / (length * period)
    fraction = phase % 1.0
    shape = {
        "sine": np.sin(2 * np.pi * phase),
        "chirp": np.sin(2 * np.pi * phase),
        "square": np.where(fraction < 0.5, 1.0, -1.0),
        "sawtooth": 2 * fraction - 1,
    }[WAVE_KINDS[kind]]
    noisy = rng.uniform(0.5, 1.5) * shape + rng.normal(0, 0.4, length)
    return noisy.astype(np.float32)[:, None]


def wave_batches(batches: int, size: int, seed: int) -> Iterator[Feed]:
    """Batches {"wave": float32 (size, length, 1), "labels": int64 (size,)}, length 40 to 80."""
    rng = np.random.default_rng(seed)
    for _ in range(batches):
        length = int(rng.integers(40, 81))
        labels = rng.integers(0, len(WAVE_KINDS), size)
        waves = np.stack([wave(int(kind), length, rng) for kind in labels])
        yield {"wave": waves, "labels": labels.astype(np.int64)}


def waves() -> Iterator[Feed]:
    """Calibration: 16 batches of 8 waves, every batch of another length."""
    for feed in wave_batches(16, 8, seed=1):
        yield {"wave": feed["wave"]}


def waves_test() -> Iterator[Feed]:
    """Test: 64 batches of 8 waves with labels."""
    return wave_batches(64, 8, seed=2)


# ---------------- sentences: integer inputs

PADDING, NOT, WORDS = 0, 1, 512


def word_scores() -> np.ndarray:
    """What each word adds to the mood of a sentence: int64 (WORDS,) of -1, 0 and 1."""
    scores = np.arange(WORDS) % 3 - 1
    scores[[PADDING, NOT]] = 0
    return scores


def sentence_batches(batches: int, size: int, seed: int) -> Iterator[Feed]:
    """Batches {"tokens": int64 (size, length), "labels": int64 (size,)}, length 8 to 24.

    The label is 1 where the scores of the words add up to more than 0; the word NOT turns the
    score of the word after it around. Sums of 0 do not occur. Sentences end in padding.
    """
    rng = np.random.default_rng(seed)
    scores = word_scores()
    for _ in range(batches):
        length = int(rng.integers(8, 25))
        rows: list[np.ndarray] = []
        moods: list[int] = []
        while len(rows) < size:
            used = int(rng.integers(4, length + 1))
            row = np.full(length, PADDING, np.int64)
            row[:used] = rng.integers(2, WORDS, used)
            row[:used][rng.random(used) < 0.15] = NOT
            sign = np.where(np.r_[0, row[:-1]] == NOT, -1, 1)
            mood = int((scores[row] * sign).sum())
            if mood != 0:
                rows.append(row)
                moods.append(int(mood > 0))
        yield {"tokens": np.stack(rows), "labels": np.array(moods, np.int64)}


def sentences() -> Iterator[Feed]:
    """Calibration: 16 batches of 16 sentences, every batch of another length."""
    for feed in sentence_batches(16, 16, seed=1):
        yield {"tokens": feed["tokens"]}


def sentences_test() -> Iterator[Feed]:
    """Test: 64 batches of 16 sentences with labels."""
    return sentence_batches(64, 16, seed=2)
