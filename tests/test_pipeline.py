"""The pass manager: order, accounts, verification, and what it leaves behind on failure."""

import tempfile
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import onnx
import pytest
from pydantic import Field

from onnxslim_passes import pipeline
from onnxslim_passes.calibration import Samples
from onnxslim_passes.errors import (
    PassFailedError,
    RecipeError,
    RuntimeRefusedError,
    SamplesError,
    UnsupportedModelError,
    UsageError,
    VerificationError,
)
from onnxslim_passes.evaluation import OutputFidelity
from onnxslim_passes.model import Model, load
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options
from onnxslim_passes.passes.store_weights import StoreWeights
from onnxslim_passes.pipeline import Pipeline
from onnxslim_passes.report.manifest import read_manifest
from onnxslim_passes.verification import is_faulty


@pytest.fixture(autouse=True)
def reproducers_among_the_test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class Toy(Pass):
    """What the passes below share: a decision for each weight."""

    summary: ClassVar[str] = "A pass for tests."

    def change(self, values: np.ndarray) -> np.ndarray:
        return values

    def apply(self, model: Model, context: Context) -> PassResult:
        decisions = []
        for weight in model.weights():
            weight.values = self.change(weight.values)
            decisions.append(Decision(where=weight.where, taken=True, reason="changed"))
        return PassResult(True, tuple(decisions))


@pass_options
class Scale(Toy):
    name: ClassVar[str] = "scale"
    stage: ClassVar[Stage] = Stage.PRUNE
    factor: Annotated[float, Field(description="of all weights")] = 1.01

    def change(self, values: np.ndarray) -> np.ndarray:
        return values * values.dtype.type(self.factor)


@pass_options
class Lying(Scale):
    """Claims to be lossless."""

    name: ClassVar[str] = "lying"
    lossless: ClassVar[bool] = True


@pass_options
class Breaking(Toy):
    name: ClassVar[str] = "breaking"
    stage: ClassVar[Stage] = Stage.QUANTIZE

    def change(self, values: np.ndarray) -> np.ndarray:
        return values * np.float32(np.nan)


@pass_options
class Raising(Toy):
    name: ClassVar[str] = "raising"
    stage: ClassVar[Stage] = Stage.CLUSTER

    def change(self, values: np.ndarray) -> np.ndarray:
        raise IndexError("too far")


@pass_options
class Tuning(Toy):
    name: ClassVar[str] = "tuning"
    stage: ClassVar[Stage] = Stage.TUNE


@pass_options
class Needing(Toy):
    name: ClassVar[str] = "needing"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    needs_samples: ClassVar[bool] = True


@pass_options
class Refusing(Toy):
    name: ClassVar[str] = "refusing"
    stage: ClassVar[Stage] = Stage.PREPARE

    def requires(self, model: Model) -> None:
        raise UnsupportedModelError("'w' is not to my taste")


@pytest.fixture
def model() -> Model:
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 18]>
        g (float[N, 32] x) => (float[N, 32] y)
        { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }"""
    )
    for name in ("w", "v"):
        values = rng.normal(size=(32, 32)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return load(proto)


@pytest.fixture
def samples() -> Samples:
    rng = np.random.default_rng(1)
    feeds = [{"x": rng.normal(size=(4, 32)).astype(np.float32)} for _ in range(3)]
    return Samples.from_feeds(feeds)


def serialized(model: Model) -> bytes:
    return model.to_proto().SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([], "no pass to run"),
        ([Breaking(), Scale()], "scale .stage PRUNE. cannot stand after breaking"),
        ([StoreWeights(), Tuning()], "store-weights must be the last pass"),
    ],
)
def test_impossible_orders_are_refused_before_any_work(passes: list[Pass], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Pipeline(passes, store=False)


def test_tuning_may_stand_anywhere_before_storing() -> None:
    names = [p.name for p in Pipeline([Tuning(), Scale(), Tuning(), Breaking(), Tuning()]).passes]
    assert names == ["tuning", "scale", "tuning", "breaking", "tuning", "store-weights"]


def test_a_run_accounts_for_itself(model: Model, samples: Samples) -> None:
    before = serialized(model)
    result = Pipeline([Scale()], store=False).run(model, samples=samples)
    report = result.report
    assert serialized(model) == before
    (record,) = report.passes
    assert (record.name, record.changed, record.taken) == ("scale", True, 2)
    # Two factors of 1.01: y is 2.01% too large, which is 33.9 dB.
    assert report.fidelity["sqnr_db"] == pytest.approx(33.9, abs=0.05)
    assert report.before["parameters"] == report.after["parameters"] == 2048
    assert report.latency["speedup"] > 0
    assert report.samples == "3 feeds of feeds"
    manifest = read_manifest(result.model)
    assert manifest is not None
    assert manifest.recipe == [{"name": "scale"}]
    assert [d.where for _, d in manifest.decisions] == ["w", "v"]


def test_outputs_are_compared_on_feeds_spread_over_the_samples(
    model: Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxslim_passes.verification.VERIFICATION_FEEDS", 2)
    report = Pipeline([Scale()], store=False).run(model, samples=samples).report
    assert report.samples == "2 of 3 feeds of feeds"


def test_the_same_seed_gives_the_same_bytes(model: Model, samples: Samples) -> None:
    runs = [Pipeline([Scale()]).run(model, samples=samples, seed=1).model for _ in range(2)]
    assert serialized(runs[0]) == serialized(runs[1])


def test_without_samples_the_outputs_are_compared_on_random_inputs(model: Model) -> None:
    report = Pipeline([Scale()], store=False).run(model).report
    assert any("random inputs" in warning for warning in report.warnings)
    assert report.fidelity["sqnr_db"] == pytest.approx(33.9, abs=0.05)


def test_a_pass_that_needs_samples_says_so_before_any_work(model: Model) -> None:
    with pytest.raises(UsageError, match="needing needs calibration samples: give --calibration"):
        Pipeline([Needing()]).run(model)


def test_samples_that_do_not_fit_are_refused(model: Model) -> None:
    wrong = Samples.from_feeds([{"z": np.ones((1, 32), np.float32)}])
    with pytest.raises(SamplesError, match=r"'z' is not an input of the model\. It has: x"):
        Pipeline([Scale()]).run(model, samples=wrong)


def test_a_model_that_the_runtime_refuses_is_refused() -> None:
    strange = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 18, "nowhere": 1]>
        g (float[1] x) => (float[1] y) { y = nowhere.Strange(x) }"""
    )
    with pytest.raises(RuntimeRefusedError, match="Strange"):
        Pipeline([Scale()]).run(load(strange))


def test_values_that_are_no_numbers_are_found(model: Model, samples: Samples) -> None:
    with pytest.raises(VerificationError, match="'y' has NaN"):
        Pipeline([Scale(), Breaking()], store=False).run(model, samples=samples)
    with pytest.raises(VerificationError, match=r"^breaking: After breaking output 'y'"):
        Pipeline([Scale(), Breaking()], store=False, verify_each=True).run(model, samples=samples)


@pytest.mark.parametrize("verify_each", [False, True])
def test_a_lossless_pass_is_held_to_it(model: Model, samples: Samples, verify_each: bool) -> None:
    pipeline = Pipeline([Lying()], store=False, verify_each=verify_each)
    with pytest.raises(VerificationError, match=r"must leave the outputs as they are.*33\.9 dB"):
        pipeline.run(model, samples=samples)


@pytest.mark.parametrize(
    ("sqnr_db", "max_error", "agreement", "faulty"),
    [
        (100.0, 1.0, None, False),
        (59.0, 1e-3, None, True),
        (42.0, 1e-7, None, False),  # a sigmoid near zero on noise: rounding is all there is
        (10.0, 1e-7, None, True),
        (-np.inf, np.inf, None, True),
        (np.nan, np.nan, 0.99, False),
    ],
)
def test_what_rounding_can_explain(
    sqnr_db: float, max_error: float, agreement: float | None, faulty: bool
) -> None:
    output = OutputFidelity("y", sqnr_db, 1.0, max_error, agreement)
    assert is_faulty(output) == faulty


def test_requirements_are_asked_with_the_name_of_the_pass(model: Model) -> None:
    with pytest.raises(UnsupportedModelError, match="refusing: 'w' is not to my taste"):
        Pipeline([Refusing()]).run(model)


def test_a_failure_leaves_a_reproducer(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "failure"
    pipeline = Pipeline([Scale(factor=2.0), Raising(), Breaking()], reproducer=folder)
    with pytest.raises(PassFailedError, match=r"raising: IndexError: too far.*failure"):
        pipeline.run(model)
    left = load(folder / "model.onnx")
    first = {c.name: c.values for c in model.constants()}
    for constant in left.constants():
        np.testing.assert_array_equal(constant.values, 2 * first[constant.name])
    recipe = (folder / "recipe.toml").read_text()
    assert "scale" not in recipe
    assert recipe.index("raising") < recipe.index("breaking") < recipe.index("store-weights")
    assert "too far" in (folder / "error.txt").read_text()


def test_overridable_weights_become_certain(model: Model) -> None:
    proto = model.to_proto()
    declared = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [32, 32])
    proto.graph.input.append(declared)
    result = Pipeline([Scale()], store=False).run(load(proto))
    assert [i.name for i in result.model.to_proto().graph.input] == ["x"]
    (decision,) = result.report.preparations
    assert (decision.where, decision.taken) == ("w", True)


class Shown:
    """A progress that remembers its labels."""

    def __init__(self):
        self.labels = []

    def track(self, items, label, total=None):
        self.labels.append((label, total))
        return items


def test_verification_and_latency_show_progress(model):
    shown = Shown()
    Pipeline([Scale()]).run(model, progress=shown)
    assert ("Verifying", 8) in shown.labels
    assert "Measuring latency" in dict(shown.labels)


def test_freed_memory_goes_back_after_each_pass(model, samples, monkeypatch):
    trimmed = []
    monkeypatch.setattr(pipeline, "trim_heap", lambda: trimmed.append("a pass"))
    Pipeline([Scale(), Scale(factor=1.02)], store=False).run(model, samples=samples, measure=False)
    assert trimmed == ["a pass"] * 2
