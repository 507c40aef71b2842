"""The files of calibration/ are what its scripts make, and its readers yield valid feeds."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.models.test_models import CALIBRATION, load_script

READERS = [
    f"{name}{part}"
    for name in ("digits_nhwc", "digits_flat", "waves", "sentences")
    for part in ("", "_test")
]


@pytest.fixture
def readers() -> ModuleType:
    return load_script(CALIBRATION / "readers.py")


@pytest.fixture
def make_data(readers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setitem(sys.modules, "readers", readers)
    return load_script(CALIBRATION / "make_data.py")


def test_digits_are_what_the_script_makes(make_data: ModuleType) -> None:
    for name, made in zip(("digits.npz", "digits_test.npz"), make_data.digits(), strict=True):
        with np.load(CALIBRATION / name) as stored:
            assert set(stored.files) == {"image", "labels"}
            for key in made:
                np.testing.assert_array_equal(stored[key], made[key])
                assert stored[key].dtype == made[key].dtype


def test_waves_are_what_the_script_makes(make_data: ModuleType, tmp_path: Path) -> None:
    make_data.write_waves(tmp_path / "waves")
    made = {path.name: np.load(path) for path in (tmp_path / "waves").iterdir()}
    stored = {path.name: np.load(path) for path in (CALIBRATION / "waves").iterdir()}
    assert made.keys() == stored.keys()
    assert len({len(array) for array in stored.values()}) > 4, "lengths differ"
    for name, array in stored.items():
        # sin may differ in its last bit from one NumPy build to the next.
        np.testing.assert_allclose(made[name], array, rtol=0, atol=1e-6)


def test_training_and_test_digits_do_not_overlap() -> None:
    with (
        np.load(CALIBRATION / "digits.npz") as train,
        np.load(CALIBRATION / "digits_test.npz") as t,
    ):
        known = {image.tobytes() for image in train["image"]}
        assert not [image for image in t["image"] if image.tobytes() in known]


@pytest.mark.parametrize("name", READERS)
def test_readers_start_anew_and_say_the_same(readers: ModuleType, name: str) -> None:
    first, second = list(getattr(readers, name)()), list(getattr(readers, name)())
    assert len(first) == len(second) > 4
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert ("labels" in a) == name.endswith("_test")
        assert len({len(array) for array in a.values()}) == 1
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize(("name", "key"), [("waves", "wave"), ("sentences", "tokens")])
def test_lengths_vary_from_batch_to_batch(readers: ModuleType, name: str, key: str) -> None:
    assert len({feed[key].shape[1] for feed in getattr(readers, name)()}) > 4


def test_labels_of_sentences_follow_the_rule(readers: ModuleType) -> None:
    scores = readers.word_scores()
    for feed in readers.sentences_test():
        for row, label in zip(feed["tokens"].tolist(), feed["labels"], strict=True):
            mood = sum(
                scores[word] * (-1 if before == readers.NOT else 1)
                for before, word in zip([readers.PADDING, *row[:-1]], row, strict=True)
            )
            assert (mood > 0) == label
            assert mood != 0
