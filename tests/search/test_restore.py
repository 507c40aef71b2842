"""Leaving the worst layers in float until a metric holds."""

import dataclasses

import numpy as np
import pytest

from onnxslim_passes import (
    ClusterWeights,
    Pipeline,
    PruneMagnitude,
    QuantizeStatic,
    QuantizeWeights,
    Samples,
)
from onnxslim_passes.evaluation.fidelity import compare_outputs
from onnxslim_passes.evaluation.layers import compare_layers
from onnxslim_passes.model import load
from onnxslim_passes.passes.base import RunSettings
from onnxslim_passes.runtime import open_session
from onnxslim_passes.search import leave_out, restore, widen
from onnxslim_passes.search.restore import MAX_RUNS, _Counts
from tests.evaluation.test_layers import MODEL, built, feeds


@pytest.fixture
def model():
    """With one huge value in the weight of node "three"."""
    proto = load(built(MODEL))
    weight = next(c for c in proto.constants() if c.name == "w3")
    values = weight.values.copy()
    values[0, 0, 0, 0] = 60.0
    weight.values = values
    return proto


def noise(model):
    """A metric that is a drop already: minus the SQNR of the outputs."""

    def drop(candidate):
        with open_session(model) as one, open_session(candidate) as other:
            return -compare_outputs(one, other, feeds()).sqnr_db

    return drop


def run(pipeline, model):
    return pipeline.run(model, samples=Samples.from_feeds(feeds()), measure=False)


def restored(pipeline, model, limit):
    return restore(
        pipeline,
        model,
        run(pipeline, model),
        RunSettings(samples=Samples.from_feeds(feeds())),
        drop_of=noise(model),
        limit=limit,
    )


INT8 = QuantizeStatic(per_channel=False, placement="everywhere")


def test_the_one_bad_layer_goes_back_to_float(model):
    pipeline = Pipeline([INT8], store=False)
    first = noise(model)(run(pipeline, model).model)
    found = restored(pipeline, model, first - 6)
    assert found.labels == ("three",)
    assert found.drop <= first - 6
    assert noise(model)(found.result.model) == pytest.approx(found.drop)
    (line,) = [w for w in found.result.report.warnings if "left in float" in w]
    assert line.startswith("1 layer was left in float to keep the drop at")
    assert "three" in line
    assert "held out" in line
    reasons = {d.where: d.reason for _, d in found.result.report.decisions() if not d.taken}
    assert reasons["three"] == "excluded by 'three'"
    assert found.result.report.latency


def test_it_works_for_pruning_and_clustering_too(model):
    pipeline = Pipeline([PruneMagnitude(sparsity=0.5), ClusterWeights(bits=2)])
    first = noise(model)(run(pipeline, model).model)
    found = restored(pipeline, model, first - 3)
    assert found.drop <= first - 3
    assert 0 < len(found.labels) < 4
    assert set(found.labels) <= {"w1", "w2", "w3", "w4"}


def test_a_limit_out_of_reach_gives_the_best_there_is(model):
    found = restored(Pipeline([INT8], store=False), model, -1000.0)
    assert found.drop > -1000
    assert found.runs <= MAX_RUNS


def test_it_is_deterministic(model):
    pipeline = Pipeline([INT8], store=False)
    first = noise(model)(run(pipeline, model).model)
    one, two = (restored(pipeline, model, first - 6).result for _ in range(2))
    assert one.model.to_proto().SerializeToString(
        deterministic=True
    ) == two.model.to_proto().SerializeToString(deterministic=True)


@pytest.mark.parametrize("needed", [1, 2, 3, 5, 13, 31, 32, 60, 99])
def test_counts_end_at_the_fewest_or_close_by(needed):
    drops = {0: 1.0}
    counts = _Counts(100, drops, 0.0)
    for count in counts:
        assert count not in drops
        drops[count] = 0.0 if count >= needed else 1.0
    assert len(drops) <= MAX_RUNS
    assert drops[counts.best()] == 0.0
    assert needed <= counts.best() <= (needed if needed <= 8 else 100)


def test_counts_without_layers_try_nothing():
    drops = {0: 1.0}
    counts = _Counts(0, drops, 0.0)
    assert list(counts) == []
    assert counts.best() == 0


def test_overrides_name_what_the_passes_named(model):
    passes = (PruneMagnitude(sparsity=0.5, exclude=("w1",)), INT8)
    report = run(Pipeline(passes, store=False), model).report
    layers = compare_layers(model, run(Pipeline(passes, store=False), model).model, feeds).layers
    three = [layer for layer in layers if layer.nodes == ("three",)]
    override = leave_out(passes, report.decisions(), three)
    assert override.passes[0].exclude == ("w1", "w3")
    assert override.passes[1].exclude == ("three",)
    assert override.labels == ("w3", "three")
    untouched = dataclasses.replace(three[0], nodes=("absent",), weights=())
    assert leave_out(passes, report.decisions(), [untouched]).changed == ()


def test_without_any_samples_layers_are_ranked_on_random_inputs(model):
    pipeline = Pipeline([ClusterWeights(bits=2)])
    first = pipeline.run(model, measure=False)
    drop = noise(model)(first.model)
    found = restore(pipeline, model, first, RunSettings(), drop_of=noise(model), limit=drop - 1)
    assert found.drop <= drop - 1
    assert np.isfinite(found.drop)


def test_weights_of_few_bits_get_eight_before_any_stays_float(model):
    pipeline = Pipeline([QuantizeWeights(bits=3, min_elements=1)], store=False)
    first = noise(model)(run(pipeline, model).model)
    found = restored(pipeline, model, first - 6)
    assert found.drop <= first - 6
    (line,) = [w for w in found.result.report.warnings if "given more bits" in w]
    assert "held out" in line
    bits = {d.where: d.figures.get("bits") for _, d in found.result.report.decisions() if d.taken}
    # A small weight that 8 bits would not make smaller stays float.
    assert {bits.get(label) for label in found.labels} <= {8, None}
    assert 8 in bits.values()
    assert 3 in bits.values()


def test_what_eight_bits_cannot_hold_stays_float(model):
    pipeline = Pipeline([QuantizeWeights(bits=3, per="tensor", min_elements=1)], store=False)
    eight = Pipeline([QuantizeWeights(bits=8, per="tensor", min_elements=1)], store=False)
    limit = noise(model)(run(eight, model).model) - 3
    found = restored(pipeline, model, limit)
    assert found.drop <= limit
    assert any("left in float" in line for line in found.result.report.warnings)


@pytest.mark.parametrize(("target", "kind"), [("qnn", "uint16"), ("cpu", None)])
def test_activations_get_sixteen_bits_where_the_target_takes_them(model, target, kind):
    report = run(Pipeline([INT8], store=False), model).report
    layers = compare_layers(model, run(Pipeline([INT8], store=False), model).model, feeds).layers
    three = [layer for layer in layers if layer.nodes == ("three",)]
    override = widen([INT8], report.decisions(), three, target=target)
    given = [(each.nodes, each.activations) for each in override.passes[0].overrides]
    assert given == ([("three", kind)] if kind else [])
    assert override.labels == (("three",) if kind else ())
