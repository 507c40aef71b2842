"""Metrics by name and by function."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

from onnxslim_passes.calibration import Samples
from onnxslim_passes.errors import SamplesError, UnknownNameError, UsageError
from onnxslim_passes.evaluation import METRICS, open_metric
from onnxslim_passes.runtime import Session, open_session


def identity(kind: str = "float[N, 3]") -> Session:
    text = (
        f'<ir_version: 8, opset_import: ["": 18]> g ({kind} x) => ({kind} y) {{ y = Identity(x) }}'
    )
    return open_session(onnx.parser.parse_model(text))


def data(*pairs: tuple[Any, Any]) -> Callable[[Any], Iterator[Any]]:
    feeds = [({"x": np.asarray(x, np.float32)}, np.asarray(labels)) for x, labels in pairs]
    return Samples.from_feeds(feeds).labelled


SCORES = [[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]


@pytest.mark.parametrize(
    ("name", "pairs", "value"),
    [
        ("top1", [(SCORES, [1, 0, 1])], 100 * 2 / 3),
        ("top1", [(SCORES[:2], [1, 0]), (SCORES[2:], [1])], 100 * 2 / 3),
        ("top1", [(SCORES, [[1], [0], [1]])], 100 * 2 / 3),
        ("top5", [(SCORES, [1, 0, 1])], 100.0),
        ("mse", [([[1, 2, 3]], [[1, 2, 5]])], 4 / 3),
        ("mae", [([[1, 2, 3]], [[1, 2, 5]]), ([[1, 1, 1]], [[1, 1, 1]])], 1 / 3),
        ("cosine", [([[3, 4, 0]], [[4, 3, 0]]), ([[0, 0, 0]], [[4, 3, 0]])], 0.48),
    ],
)
def test_named(name: str, pairs: list, value: float) -> None:
    metric = open_metric(name, data(*pairs))
    assert metric(identity()) == pytest.approx(value)
    assert metric(identity()) == pytest.approx(value)


def test_top1_of_classes() -> None:
    feeds = [({"x": np.array([3, 1, 2])}, np.array([3, 1, 1]))]
    metric = open_metric("top1", Samples.from_feeds(feeds).labelled)
    assert metric(identity("int64[N]")) == pytest.approx(200 / 3)


def test_drop_follows_the_direction() -> None:
    assert open_metric("top1", data()).drop(90, 89.5) == 0.5
    assert open_metric("mse", data()).drop(1, 1.5) == 0.5


def test_every_metric_is_described() -> None:
    assert all(m.summary and m.summary[0].islower() for m in METRICS.values())


def test_function(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def metric(session):\n"
        "    return session.run(None, {'x': np.full((1, 3), 2, np.float32)})[0].sum()\n"
        "def broken(session):\n"
        "    return session.no_such_thing\n"
        "def nothing(session): pass\n"
        "def nan(session): return float('nan')\n"
    )
    file = tmp_path / "mine.py"
    metric = open_metric(f"{file}:metric", None)
    assert metric.higher_is_better
    assert metric(identity()) == 6
    for name, text in (
        ("broken", r"AttributeError.*\(mine.py, line 5\)"),
        ("nothing", "returned None, expected a number"),
        ("nan", "returned nan"),
    ):
        with pytest.raises(UsageError, match=text):
            open_metric(f"{file}:{name}", None)(identity())
    with pytest.raises(UsageError, match=r"no function 'metrics'. Did you mean 'metric'\?"):
        open_metric(f"{file}:metrics", None)
    with pytest.raises(UsageError, match="there is no file"):
        open_metric(f"{tmp_path / 'none.py'}:metric", None)


@pytest.mark.parametrize(
    ("name", "pairs", "text"),
    [
        ("top1", [(SCORES, [1, 0])], r"shape \(2,\) for predictions of shape \(3,\)"),
        ("mse", [(SCORES, [1, 0, 1])], "'labels' have shape"),
        ("mse", [], "no samples"),
    ],
)
def test_data_that_does_not_fit(name: str, pairs: list, text: str) -> None:
    with pytest.raises(SamplesError, match=text):
        open_metric(name, data(*pairs))(identity())


def test_one_score_is_no_class() -> None:
    with pytest.raises(SamplesError, match="a score for each class"):
        open_metric("top1", data(([[1]], [1])))(identity("float[N, 1]"))


def test_no_labels() -> None:
    metric = open_metric("top1", Samples.from_feeds([{"x": np.ones((1, 3), "f")}]).labelled)
    with pytest.raises(SamplesError, match="labels are needed"):
        metric(identity())


def test_unknown_name() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown metric 'top-1'. Did you mean 'top1'\?"):
        open_metric("top-1", None)
    with pytest.raises(UsageError, match="needs evaluation data"):
        open_metric("top1", None)
