"""The judge: what it opens and runs, and that its verdict does not depend on how data arrives."""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import onnx.numpy_helper
import onnx.parser
import pytest

from onnxslim_passes.calibration import Samples
from onnxslim_passes.model import Model, load
from onnxslim_passes.passes.base import Context, Pass, PassResult, Stage, pass_options
from onnxslim_passes.pipeline import Pipeline
from onnxslim_passes.runtime import Feed, Session


@pass_options
class Rotating(Pass):
    """Changes nothing, or all weights by a factor that a test sets."""

    name: ClassVar[str] = "rotating"
    summary: ClassVar[str] = "for tests"
    stage: ClassVar[Stage] = Stage.PRUNE
    lossless: ClassVar[bool] = True
    factor: ClassVar[float] = 1.0

    def apply(self, model: Model, context: Context) -> PassResult:
        for weight in model.weights():
            weight.values = weight.values * np.float32(self.factor)
        return PassResult(True, ())


@pass_options
class Scaling(Rotating):
    name: ClassVar[str] = "scaling"
    lossless: ClassVar[bool] = False
    factor: ClassVar[float] = 1.01


class Sessions:
    """Counts sessions and runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = self.open = self.most = self.runs = 0
        init, close, run = Session.__init__, Session.close, Session.run

        def counted_init(session: Session, *args: object) -> None:
            self.opened, self.open = self.opened + 1, self.open + 1
            self.most = max(self.most, self.open)
            init(session, *args)  # type: ignore[arg-type] # handed on as they are

        def counted_close(session: Session) -> None:
            self.open -= 1
            close(session)

        def counted_run(session: Session, feed: Feed) -> dict[str, object]:
            self.runs += 1
            return run(session, feed)

        monkeypatch.setattr(Session, "__init__", counted_init)
        monkeypatch.setattr(Session, "close", counted_close)
        monkeypatch.setattr(Session, "run", counted_run)


@pytest.fixture
def model() -> Model:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 18]>
        g (float[N, 8] x) => (float[N, 8] y) { h = MatMul(x, w)  y = Relu(h) }"""
    )
    weight = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return load(proto)


def feeds() -> Iterator[Feed]:
    rng = np.random.default_rng(1)
    for _ in range(3):
        yield {"x": rng.normal(size=(4, 8)).astype(np.float32)}


@pytest.mark.parametrize("pass_", [Rotating(), Scaling()])
def test_each_model_is_opened_and_run_once_by_itself(
    model: Model, pass_: Pass, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = Samples.from_feeds(list(feeds()))
    counts = Sessions(monkeypatch)
    Pipeline([pass_], store=False).run(model, samples=samples, measure=False)
    assert (counts.opened, counts.most, counts.open) == (2, 1, 0)
    assert counts.runs == 2 * 3


def test_the_original_runs_once_for_any_number_of_verdicts(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = Samples.from_feeds(list(feeds()))
    counts = Sessions(monkeypatch)
    pipeline = Pipeline([Scaling()] * 3, store=False, verify_each=True)
    report = pipeline.run(model, samples=samples, measure=False).report
    assert (counts.opened, counts.most, counts.runs) == (5, 1, 5 * 3)
    errors = [record.fidelity["sqnr_db"] for record in report.passes]
    assert errors == pytest.approx([-20 * np.log10(1.01**n - 1) for n in (1, 2, 3)], abs=1e-3)


def test_data_that_is_drawn_anew_is_compared_feed_by_feed(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(2)

    def draw() -> Iterator[Feed]:
        yield {"x": rng.normal(size=(4, 8)).astype(np.float32)}

    counts = Sessions(monkeypatch)
    samples = Samples.from_feeds(draw)
    report = Pipeline([Scaling()], store=False).run(model, samples=samples, measure=False).report
    assert report.fidelity["sqnr_db"] == pytest.approx(40, abs=1e-3)
    assert counts.open == 0
