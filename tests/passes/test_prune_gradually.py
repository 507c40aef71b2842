"""Pruning while training: how many zeros, whose, and what the network still can."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydantic
import pytest

from onnxslim_passes import Context, FineTune, Pipeline, PruneGradually, PruneMagnitude
from onnxslim_passes.errors import UnknownNameError, UsageError
from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import Decision, PassResult
from onnxslim_passes.runtime import open_session
from tests.training.nets import mlp, points, samples, with_weights

WIDE = """
<ir_version: 9, opset_import: ["" : 18], producer_name: "test">
net (float[N, 4] x) => (float[N, 3] y)
<float[4, 40] w1, float[40] b1, float[40, 3] w2, float[3] b2>
{
    [first] h = Gemm (x, w1, b1)
    a = Relu (h)
    [second] y = Gemm (a, w2, b2)
}
"""
QUICK = {"min_elements": 1, "epochs": 5, "prune_steps": 5, "batch_size": 8, "learning_rate": 0.02}


def run(model: Model, **options: Any) -> tuple[PassResult, dict[str, Decision]]:
    context = Context(training=samples(120), reference=model.copy())
    result = PruneGradually(**QUICK | options).apply(model, context)
    return result, {decision.where: decision for decision in result.decisions}


def values(model: Model) -> dict[str, npt.NDArray[Any]]:
    return {str(constant.name): constant.values for constant in model.constants()}


def zeros(model: Model) -> dict[str, float]:
    return {name: float((array == 0).mean()) for name, array in values(model).items()}


def accuracy(model: Model) -> float:
    x, labels = points(300, seed=5)
    with open_session(model) as session:
        return float((session.run({"x": x})["y"].argmax(axis=1) == labels).mean())


def learned() -> Model:
    """A network that knows the rule of `points`."""
    model = mlp(WIDE)
    context = Context(training=samples(120), reference=model.copy())
    PruneGradually(
        sparsity=0.01, teacher=False, **QUICK | {"epochs": 8, "learning_rate": 0.03}
    ).apply(model, context)
    return model


def test_all_weights_together_end_at_the_sparsity() -> None:
    model = mlp(WIDE)
    result, decisions = run(model, sparsity=0.6)
    found = values(model)
    pruned = sum(int((found[name] == 0).sum()) for name in ("w1", "w2"))
    assert result.changed
    assert pruned == round(0.6 * (160 + 120))
    assert (found["b1"] != 0).all()
    left = int((found["w1"] != 0).sum())
    assert decisions["w1"].reason == f"{left} of 160 elements are left, trained"
    assert decisions["w1"].figures["nonzero"] == left
    assert decisions["b1"].taken
    for array in found.values():
        assert not np.signbit(array[array == 0]).any()


def test_each_weight_at_the_sparsity_but_for_overrides() -> None:
    model = mlp(WIDE)
    override = [{"nodes": "second", "sparsity": 0.25}]
    run(model, sparsity=0.7, scope="weight", overrides=override)
    assert zeros(model)["w1"] == 0.7
    assert zeros(model)["w2"] == 0.25


def test_a_sensitive_weight_keeps_more() -> None:
    large = np.arange(160).reshape(4, 40) < 8
    w1 = np.random.default_rng(0).normal(0, np.where(large, 3, 1e-3))
    model = mlp(WIDE, w1=w1)
    run(model, sparsity=0.7, scope="sensitivity")
    found = zeros(model)
    assert found["w1"] > found["w2"]
    assert 160 * found["w1"] + 120 * found["w2"] == pytest.approx(0.7 * 280, abs=2)


def test_pruning_while_training_loses_less_than_pruning_at_once() -> None:
    model = learned()
    at_once, slowly = model.copy(), model.copy()
    PruneMagnitude(sparsity=0.85, scope="global", min_elements=1).apply(at_once, Context())
    run(slowly, sparsity=0.85)
    assert accuracy(slowly) > accuracy(at_once) + 0.1
    assert accuracy(slowly) > accuracy(model) - 0.25


def test_what_was_cut_may_come_back() -> None:
    model = mlp(WIDE)
    start = values(model)["w1"].copy()
    run(model, sparsity=0.6, regrow=True, learning_rate=0.05, ramp="steps")
    kept = values(model)["w1"] != 0
    order = np.argsort(np.abs(start), axis=None)
    weakest = np.zeros(160, np.bool_)
    weakest[order[:60]] = True
    assert kept.reshape(-1)[weakest].any()


def test_zeros_that_are_there_stay_unless_they_may_regrow() -> None:
    model = mlp(WIDE)
    PruneMagnitude(sparsity=0.4, min_elements=1).apply(model, Context())
    gone = {name: array == 0 for name, array in values(model).items()}
    run(model, sparsity=0.7)
    for name in ("w1", "w2"):
        assert (values(model)[name][gone[name]] == 0).all()


@pytest.mark.parametrize("scope", ["global", "weight", "sensitivity"])
def test_a_second_run_changes_nothing(scope: str) -> None:
    model = mlp(WIDE)
    assert run(model, sparsity=0.5, scope=scope)[0].changed
    result, decisions = run(model, sparsity=0.5, scope=scope)
    assert not result.changed
    assert "as sparse as it is to be" in decisions["w1"].reason


def test_the_same_bytes_twice() -> None:
    def once() -> bytes:
        model = mlp(WIDE)
        run(model, sparsity=0.6, regrow=True)
        data: bytes = model.to_proto().SerializeToString(deterministic=True)
        return data

    assert once() == once()


def test_in_a_pipeline() -> None:
    pipeline = Pipeline([PruneGradually(sparsity=0.5, **QUICK)], store=False)
    result = pipeline.run(mlp(WIDE), training=samples(80, labelled=False), measure=False)
    assert result.report.passes[0].changed
    with pytest.raises(UsageError, match="needs samples to train on"):
        pipeline.run(mlp(WIDE))


class KilledError(Exception):
    """The process is gone."""


class Counting:
    """Counts the steps of training, and kills at one of them."""

    def __init__(self, last: int | None = None) -> None:
        self.steps = self.total = 0
        self.last = last

    def track(self, items: Iterable[Any], label: str, total: int | None = None) -> Iterable[Any]:
        trains = label in ("prune-gradually", "fine-tune")
        self.total += (total or 0) if trains else 0
        for item in items:
            if trains:
                self.steps += 1
                if self.steps == self.last:
                    raise KilledError
            yield item


# 108 samples in batches of 8 are 14 steps an epoch; pruning has 5 epochs, tuning 3.
@pytest.mark.parametrize(
    ("last", "left", "total"), [(5, 112, 112), (45, 70, 112), (72, 42, 42), (100, 14, 42)]
)
def test_a_killed_pipeline_goes_on_to_the_same_bytes(
    tmp_path: Path, last: int, left: int, total: int
) -> None:
    tuning = FineTune(epochs=3, batch_size=8)
    pipeline = Pipeline([PruneGradually(sparsity=0.5, **QUICK), tuning], store=False)

    def compressed(progress: Counting, checkpoints: Path | None) -> bytes:
        found = pipeline.run(
            mlp(WIDE),
            training=samples(120),
            measure=False,
            progress=progress,
            checkpoints=checkpoints,
        )
        data: bytes = found.model.to_proto().SerializeToString(deterministic=True)
        return data

    whole = compressed(Counting(), None)
    with pytest.raises(KilledError):
        compressed(Counting(last), tmp_path / "made")
    again = Counting()
    assert compressed(again, tmp_path / "made") == whole
    # A bar begins where its run was taken up, and ends at all of its steps.
    assert (again.steps, again.total) == (left, total)


def test_a_checkpoint_is_for_the_same_options_only(tmp_path: Path) -> None:
    def steps(**options: Any) -> int:
        counting, model = Counting(), mlp(WIDE)
        context = Context(
            training=samples(120), reference=model.copy(), progress=counting, checkpoints=tmp_path
        )
        PruneGradually(**QUICK | options).apply(model, context)
        return counting.steps

    assert [steps(sparsity=0.5), steps(sparsity=0.5), steps(sparsity=0.6)] == [70, 0, 70]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_not_pruned_says_why() -> None:
    model = mlp(WIDE)
    _, decisions = run(model, overrides=[{"nodes": "w2", "sparsity": 0}])
    assert zeros(model)["w2"] == 0
    assert decisions["w2"].reason.startswith("tuned")
    text = WIDE.replace("40", "2")
    small = Model.from_proto(with_weights(text))
    result, told = run(small, min_elements=512)
    assert not result.changed
    assert told["w1"].reason == "trained along, but has fewer elements than min_elements=512"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 2, "ramp_epochs": 3}, "has to be reached by the end"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"ramp": "square"}, "'cubic', 'linear' or 'steps'"),
        ({"overrides": [{"nodes": "w1"}]}, "changes nothing"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        PruneGradually(**options)


def test_misspelt_names_are_errors() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'first'"):
        PruneGradually(overrides=[{"nodes": "frist", "sparsity": 0.5}]).requires(mlp(WIDE))
