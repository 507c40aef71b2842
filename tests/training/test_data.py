"""Batches: every sample once, the same order for one seed, and labels that fit."""

import numpy as np
import pytest

from onnxslim_passes.calibration import Samples
from onnxslim_passes.errors import SamplesError, UsageError
from onnxslim_passes.runtime import InputSpec
from onnxslim_passes.training.data import TrainingData, check_labels
from onnxslim_passes.training.losses import LabelSpec
from tests.training.nets import samples

FLOAT = np.dtype(np.float32)
INPUTS = [InputSpec(name="x", dtype=FLOAT, shape=("N", 4))]
CLASSES = LabelSpec("labels", "int64", ("N",), 3, "class numbers")


def read(source=None, inputs=INPUTS):
    return TrainingData.read(source or samples(), inputs)


def all_rows(data, places):
    return np.concatenate([data.batch(place).feed["x"] for place in places])


def test_an_epoch_has_every_sample_once():
    data = read()
    rows = all_rows(data, data.batches(16, 0, 1))
    expected = all_rows(data, data.in_order(60))
    np.testing.assert_array_equal(np.sort(rows, axis=0), np.sort(expected, axis=0))
    assert [data.batch(place).count for place in data.in_order(16)] == [16, 16, 16, 12]


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        data = read()
        return all_rows(data, data.batches(16, seed, epoch)).tobytes()

    assert order(0, 1) == order(0, 1)
    assert len({order(0, 1), order(0, 2), order(1, 1)}) == 3


def test_a_split_keeps_its_parts_apart():
    train, held = read().split(0.25, seed=3)
    assert (train.count, held.count) == (45, 15)
    both = [all_rows(part, part.in_order(60)) for part in (train, held)]
    together = np.concatenate(both)
    assert len(np.unique(together, axis=0)) == 60


def test_labels_go_with_their_samples():
    data = read()
    for place in data.batches(7, 0, 1):
        batch = data.batch(place)
        x = batch.feed["x"]
        np.testing.assert_array_equal(batch.labels, np.argmax(x[:, :3] + 0.3 * x[:, 3:], axis=1))


def moving(tmp_path, count="6"):
    """Samples 0 to 5, in epoch e plus 100 e."""
    path = tmp_path / "moving.py"
    path.write_text(
        "import numpy as np\n"
        "def feeds(epoch):\n"
        f"    for number in range({count}):\n"
        "        x = np.full((1, 4), number + 100 * epoch, np.float32)\n"
        "        yield {'x': x, 'labels': np.array([number % 3])}\n"
    )
    return Samples.open(f"{path}:feeds")


def test_samples_that_change_keep_their_places(tmp_path):
    data = read(moving(tmp_path)).with_labels_as(CLASSES)
    train, held = data.split(0.3, seed=0)
    before = all_rows(train, train.in_order(4))
    for epoch in (2, 1):
        fresh = train.in_epoch(epoch)
        np.testing.assert_array_equal(all_rows(fresh, fresh.in_order(4)), before + 100 * epoch)
        assert fresh.batch(fresh.in_order(4)[0]).labels.dtype == np.int64
    assert all_rows(held, held.in_order(4)).max() < 6
    assert read().in_epoch(1).count == 60


def test_an_epoch_must_have_the_same_samples(tmp_path):
    data = read(moving(tmp_path, count="6 + epoch"))
    with pytest.raises(SamplesError, match="epoch 2 has other samples than epoch 0"):
        data.in_epoch(2)


def test_rows_of_unlike_shapes_never_share_a_batch():
    inputs = [InputSpec(name="x", dtype=FLOAT, shape=("N", "T"))]
    feeds = [{"x": np.zeros((3, width), np.float32)} for width in (4, 5, 4)]
    data = read(Samples.from_feeds(feeds), inputs)
    shapes = sorted(data.batch(place).feed["x"].shape for place in data.batches(8, 0, 1))
    assert shapes == [(3, 5), (6, 4)]


def test_feeds_without_a_common_first_axis_stay_whole():
    inputs = [*INPUTS, InputSpec(name="state", dtype=FLOAT, shape=(2, "N"))]
    feeds = [{"x": np.zeros((3, 4), np.float32), "state": np.zeros((2, 3), np.float32)}] * 2
    data = read(Samples.from_feeds(feeds), inputs)
    assert [data.batch(place).count for place in data.batches(8, 0, 1)] == [3, 3]


def test_a_batch_larger_than_the_data_is_refused():
    assert read().batch_size(None) == 32
    with pytest.raises(UsageError, match="batch_size 61 is more than the 60 samples of points"):
        read().batch_size(61)


def test_a_split_that_leaves_nothing_is_refused():
    with pytest.raises(UsageError, match="leaves none to train on"):
        read(samples(3)).split(0.9, seed=0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "the loss needs labels"),
        (np.array([0, 1, 3]), "run from 0 to 3, but the model has 3 classes"),
        (np.array([0, -1, 2]), "run from -1 to 2"),
        (np.zeros((3, 2), np.int64), r"have shape \(3, 2\), expected class numbers: int64 \(N\)"),
        (np.array([0.0, 1.0, 2.0]), "are float64, expected class numbers"),
        (np.array(["a", "b", "c"]), "expected class numbers"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(SamplesError, match=message):
        check_labels(labels, CLASSES, "points", whole=False)


def test_labels_gain_or_lose_axes_of_one():
    assert check_labels(np.array([[0], [2]]), CLASSES, "points", whole=False).shape == (2,)
    column = LabelSpec("labels", "float32", ("N", 1), None, "a number")
    found = check_labels(np.array([0, 2]), column, "points", whole=False)
    assert (found.shape, found.dtype.name) == ((2, 1), "float32")


def test_labels_that_are_not_finite_are_refused():
    spec = LabelSpec("labels", "float32", ("N",), None, "a number")
    with pytest.raises(SamplesError, match="NaN or infinite"):
        check_labels(np.array([0.0, np.nan]), spec, "points", whole=False)
